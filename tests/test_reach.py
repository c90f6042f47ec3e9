"""Half precision, wrappers, frozen models, outputs for every position, and serving."""

import copy
import warnings

import pytest
import torch
from cases import loader_of
from kinds import CLASSES, mlp
from torch import nn

from ella import ELLA, Categorical, LastLayer, NeuralEF, Nystrom, Training
from ella.baselines import MAP, TemperatureScaling
from ella.inputs import Rows
from ella.linearize import Linearized
from ella.network import Network

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. ")

N = 24
NEURAL = NeuralEF(
    rank=3, num_inputs=48, width=8, num_directions=12, teacher=Training(steps=20, batch_size=16)
)
METHODS = {"neural": NEURAL, "nystrom": Nystrom(3, 12), "last layer": LastLayer()}
QUIET = {"progress": False}


def made(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, Y = normal(N, 4), torch.arange(N) % CLASSES
LOADER = loader_of(X, Y, 7)
VAL_LOADER = loader_of(normal(N, 4, seed=1), Y, 7)


# Half precision


def convnet():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("make", [mlp, convnet])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_close_to_single(dtype, make, method, tmp_path):
    full, half = made(make), made(make).to(dtype)
    full.load_state_dict({k: t.to(full.state_dict()[k]) for k, t in half.state_dict().items()})
    expected = ELLA(full, eigenfunctions=METHODS[method], **QUIET).fit(LOADER)
    ella = ELLA(half, eigenfunctions=METHODS[method], **QUIET).fit(LOADER)
    probs = ella.predict_proba(X)
    assert probs.dtype == torch.float32
    torch.testing.assert_close(probs.sum(1), torch.ones(N))
    torch.testing.assert_close(probs, expected.predict_proba(X), atol=0.05, rtol=0)
    variance = ella.features(X).variance().mean()
    torch.testing.assert_close(variance, expected.features(X).variance().mean(), rtol=0.2, atol=0)
    ella.calibrate(VAL_LOADER).save(tmp_path / "ella")
    again = ELLA.load(tmp_path / "ella", half, progress=False)
    assert torch.equal(again.predict_proba(X), ella.predict_proba(X))
    for name in ("entropy", "mutual_information", "logit_variance"):
        assert torch.isfinite(getattr(ella.uncertainty(X), name)).all()


# Where it is called


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("method", METHODS)
def test_fit_does_not_mind_the_callers_mode(mode, method):
    def probabilities():
        ella = ELLA(made(mlp), eigenfunctions=METHODS[method], **QUIET)
        return ella.fit(loader_of(X + 0, Y, 7)).calibrate(VAL_LOADER).predict_proba(X + 0)

    expected = probabilities()
    with mode():
        found = probabilities()
    assert torch.equal(found, expected)
    assert not found.requires_grad


def test_a_frozen_model_loads_and_predicts(tmp_path):
    model = made(mlp)
    ella = ELLA(model, eigenfunctions=NEURAL, **QUIET).fit(LOADER).calibrate(VAL_LOADER)
    ella.save(tmp_path / "ella")
    frozen = copy.deepcopy(model).requires_grad_(False)
    again = ELLA.load(tmp_path / "ella", frozen, progress=False)
    assert torch.equal(again.predict_proba(X), ella.predict_proba(X))
    assert again.uncertainty(X).entropy.shape == (N,)
    again.calibrate(VAL_LOADER).partial_fit(LOADER)
    with pytest.raises(ValueError, match="no trainable parameter"):
        ELLA(frozen, **QUIET).fit(LOADER)


def test_wrappers_share_files(tmp_path):
    model = made(mlp)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    inside = copy.deepcopy(model)
    inside[2] = torch.compile(inside[2], backend="eager")
    forms = [model, compiled, inside, nn.DataParallel(copy.deepcopy(model))]
    for method in (NEURAL, Nystrom(3, 12), LastLayer()):
        for i, form in enumerate(forms):
            ella = ELLA(form, eigenfunctions=method, **QUIET).fit(LOADER)
            ella.save(tmp_path / f"{i}")
            for other in forms:
                again = ELLA.load(tmp_path / f"{i}", other, progress=False)
                assert torch.equal(again.predict_proba(X), ella.predict_proba(X))


def test_lightning_and_peft_models(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)

    ella = ELLA(made(Module), eigenfunctions=NEURAL, **QUIET).fit(LOADER)
    assert ella.predict_proba(X).shape == (N, CLASSES)


def test_adapters_are_what_is_linearized(tmp_path):
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        model = made(lambda: peft.get_peft_model(mlp(), config))
    p = sum(each.numel() for each in model.parameters() if each.requires_grad)
    ella = ELLA(model, eigenfunctions=NEURAL, **QUIET).fit(LOADER)
    assert ella.linearized.num_parameters == p
    assert not any("base_model" in name for name in ella.linearized.trainable)
    torch.testing.assert_close(ella.gaussian(X).mean, model(X).detach())
    ella.save(tmp_path / "ella")
    again = ELLA.load(tmp_path / "ella", model.get_base_model(), progress=False)
    assert torch.equal(again.predict_proba(X), ella.predict_proba(X))


def quantized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})


def traced():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(mlp(), X)


REFUSED = {
    "scripted": (traced, "is or holds TorchScript"),
    "script inside": (lambda: nn.Sequential(traced(), nn.Linear(CLASSES, 3)), "holds TorchScript"),
    "quantized": (quantized, "is quantized"),
    "exported": (lambda: torch.export.export(mlp(), (X,)), "is an exported program"),
    "export's module": (lambda: torch.export.export(mlp(), (X,)).module(), "exported program"),
    "a function": (lambda: torch.tanh, "must be a torch.nn.Module; got builtin"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("method", [ELLA, MAP, Network])
def test_what_is_no_module_gets_one_sentence(kind, method):
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=f"`model` .*{message.removeprefix('`model` ')}"):
        method(make())


# Outputs for every position


class Segmenter(nn.Module):
    """Images (n, 1, 6, 8) to logits (n, 3, 6, 8), with a coarser grid inside."""

    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Tanh())
        self.up = nn.Upsample(scale_factor=2)
        self.head = nn.Conv2d(5, CLASSES, 1)

    def forward(self, x):
        return self.head(torch.cat([self.up(self.down(x)), x], dim=1))


class Tagger(nn.Module):
    """Token ids to logits (n, positions, 3)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, input_ids, attention_mask):
        h = self.layer(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        return self.head(h)


def segmentation(n=16, seed=0):
    x = normal(n, 1, 6, 8, seed=seed)
    y = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    y[:, 0] = -100
    return x, y


def tagging(n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 9, (n, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (n, 1), generator=generator)).long()
    y = (ids % CLASSES).masked_fill(mask == 0, -100)
    return {"input_ids": ids * mask, "attention_mask": mask}, y


DENSE = {
    "segmentation": (Segmenter, segmentation, 1),
    "tagging": (Tagger, tagging, 2),
}
IGNORING = Categorical(ignore_index=-100)


def dense(kind, method, **options):
    make, data, _ = DENSE[kind]
    model, (x, y) = made(make).double(), data()
    x = x.double() if isinstance(x, torch.Tensor) else x
    options = {"likelihood": IGNORING, "positions": 5, **QUIET, **options}
    return ELLA(model, eigenfunctions=method, **options).fit(loader_of(x, y, 6)), model, x, y


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("method", [NEURAL, Nystrom(3, 12)], ids=["neural", "nystrom"])
def test_every_position_is_predicted(kind, method, tmp_path):
    ella, model, x, y = dense(kind, method)
    axis = DENSE[kind][2]
    other, labels = DENSE[kind][1](seed=1)
    other = other.double() if isinstance(other, torch.Tensor) else other
    ella.calibrate(loader_of(other, labels, 6))
    logits = model.eval()(**x) if isinstance(x, dict) else model.eval()(x)
    probs = ella.predict_proba(x)
    assert probs.shape == logits.shape
    torch.testing.assert_close(probs.sum(axis), torch.ones_like(probs.sum(axis)))
    assert ella.predict(x).shape == y.shape
    assert torch.equal(ella.predict(x), probs.argmax(axis))
    scores = ella.uncertainty(x)
    assert all(v.shape == y.shape for v in vars(scores).values() if v is not None)
    assert (scores.logit_variance > 0).any()
    tau = ella.hyperparameters.logit_temperature
    mean = ella.gaussian(x).mean.view(*logits.movedim(axis, -1).shape).movedim(-1, axis)
    torch.testing.assert_close(mean * tau, logits.detach())
    torch.testing.assert_close(ella.predict_proba(loader_of(x, y, 6)), probs)
    ella.save(tmp_path / "ella")
    again = ELLA.load(tmp_path / "ella", model, progress=False)
    assert torch.equal(again.predict_proba(x), probs)
    scaled = TemperatureScaling(model, likelihood=IGNORING, **QUIET).fit(loader_of(x, y, 6))
    assert scaled.calibrate(loader_of(other, labels)).predict_proba(x).shape == probs.shape


@pytest.mark.parametrize("kind", DENSE)
def test_products_at_rows_equal_those_of_a_wrapper(kind):
    """A row is an example whose outputs are those at one position."""
    make, data, axis = DENSE[kind]
    model, (x, _) = made(make).double().eval(), data(4)
    x = x.double() if isinstance(x, torch.Tensor) else x
    example, position = torch.tensor([2, 0, 2]), torch.tensor([3, 5, 1])
    linearized = Linearized(model)
    rows = Rows(x, example, position)
    found = linearized.jacobian(rows)
    out = (model(**x) if isinstance(x, dict) else model(x)).movedim(axis, -1).flatten(1, -2)
    parameters = list(model.parameters())
    expected = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, parameters, retain_graph=True)])
        for i, j in zip(example, position, strict=True)
        for v in out[i, j]
    ]
    torch.testing.assert_close(found.flatten(0, 1), torch.stack(expected))
    torch.testing.assert_close(linearized(rows), out[example, position].detach())
    v = torch.randn(2, linearized.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(linearized.jvp(rows, v), found @ v.T)


@pytest.mark.parametrize("kind", DENSE)
def test_sums_over_all_positions_are_those_of_the_sample_scaled(kind):
    """With room for every position, G is the sum over all that count; a sample estimates it."""
    whole, _, x, y = dense(kind, Nystrom(3, 12), positions=10_000)
    prior = whole.features(x)
    kept = y.flatten() != -100
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for phi, f in zip(prior.factor[kept], prior.mean[kept], strict=True):
        p = f.softmax(0)
        expected += phi.T @ (torch.diag(p) - p[:, None] * p) @ phi
    torch.testing.assert_close(whole.curvature, expected)
    assert whole._fit.sums.num_examples == int(kept.sum())
    few, *_ = dense(kind, Nystrom(3, 12), positions=3)
    assert few._fit.sums.num_examples == int(kept.sum())
    found = few._fit.sums.prior_variance / whole._fit.sums.prior_variance
    assert 0.5 < found < 2


@pytest.mark.parametrize("labels", [torch.zeros(16, 8, 6), torch.zeros(16)])
def test_labels_of_another_grid(labels):
    x, _ = segmentation()
    with pytest.raises(ValueError, match=r"Batch 0: Labels must have shape \(n, 6, 8\)"):
        ELLA(made(Segmenter), **QUIET).fit(loader_of(x, labels.long(), 6))


def test_ignored_labels_are_named(tmp_path):
    x, y = segmentation()
    with pytest.raises(ValueError, match=r"must lie in 0..2.*ignore_index"):
        ELLA(made(Segmenter), **QUIET).fit(loader_of(x, y, 6))


# Serving


@pytest.mark.parametrize("method", ["neural", "nystrom"])
def test_large_tensors_are_predicted_in_pieces(method, monkeypatch):
    ella = ELLA(made(mlp), eigenfunctions=METHODS[method], memory_budget=2**20, **QUIET)
    ella.fit(LOADER)
    x = normal(500, 4, seed=3)
    sizes = []
    evaluate = ella._evaluate
    monkeypatch.setattr(ella, "_evaluate", lambda x: sizes.append(len(x)) or evaluate(x))
    probs = ella.predict_proba(x)
    assert len(sizes) > 3
    assert sum(sizes) == 500
    ella.memory_budget = 2**40
    sizes.clear()
    torch.testing.assert_close(ella.predict_proba(x), probs)
    assert sizes == [500]
