"""Half precision, wrappers, frozen models, outputs for every position, and serving."""

import copy
import math
import warnings

import pytest
import torch
from cases import loader_of, train
from kinds import CLASSES, mlp
from torch import nn

from ella import ELLA, Categorical, LastLayer, NeuralEF, Nystrom, Training
from ella.baselines import MAP, LastLayerLaplace, TemperatureScaling
from ella.inputs import Rows
from ella.linearize import Linearized
from ella.metrics import expected_calibration_error
from ella.network import Network
from ella.predictive import LogitGaussian
from ella.sketches import folded, random_signs

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
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
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
def test_last_layer_at_every_position(kind):
    """φφᵀ is the kernel of the last layer, linear or a convolution of size 1, at each row."""
    ella, model, x, _ = dense(kind, LastLayer(residual="none"))
    last = Linearized(model, trainable=("head.weight", "head.bias"))
    example, position = torch.arange(16), torch.arange(16) % (6 if kind == "tagging" else 48)
    expected = last.kernel_blocks(Rows(x, example, position))
    positions = len(ella.features(x).mean) // 16
    factor = ella.features(x).factor[example * positions + position]
    torch.testing.assert_close(factor @ factor.mT, expected)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("structure", ["full", "kron"])
def test_last_layer_laplace_at_every_position(kind, structure):
    """With all positions it is that of a loader of the layer's inputs, one row at a time."""
    pytest.importorskip("laplace")
    make, data, axis = DENSE[kind]
    model, (x, y) = made(make).double().eval(), data()
    x, y = x.double() if isinstance(x, torch.Tensor) else x, y.clamp_min(0)
    found = LastLayerLaplace(model, structure=structure, **QUIET)
    found.positions = 100
    found.fit(loader_of(x, y, 6))
    inputs = []
    model.head.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    model(**x) if isinstance(x, dict) else model(x)
    rows = (inputs[0].movedim(1, -1) if axis == 1 else inputs[0]).flatten(0, -2).detach()
    linear = nn.Linear(rows.shape[1], CLASSES).double()
    with torch.no_grad():
        linear.weight.copy_(model.head.weight.view(CLASSES, -1))
        linear.bias.copy_(model.head.bias)
    alone = LastLayerLaplace(nn.Sequential(nn.Identity(), linear), structure=structure, **QUIET)
    alone.fit([(rows, y.flatten())])
    torch.testing.assert_close(
        found.gaussian(x).covariance(), alone.gaussian(rows).covariance(), rtol=1e-4, atol=1e-6
    )


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


# Any size


@pytest.mark.parametrize("p", [10, 4096, 5000, 3 * 256 * 8 + 5])
def test_a_sketch_adds_signed_weights(p):
    rows, signs = normal(2, 3, p), random_signs(p, 0, torch.device("cpu"))
    expected = torch.zeros(2, 3, 8)
    for j in range(p):
        expected[..., j % 8] += signs[j] * rows[..., j]
    torch.testing.assert_close(folded(rows, signs, 8), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(random_signs(p, 0, torch.device("cpu")), signs)


def test_sketched_products_are_right_on_average():
    a, b = normal(2, 500, seed=1)
    found = []
    for seed in range(400):
        left, right = (folded(v, random_signs(500, seed, v.device), 64) for v in (a, b))
        found.append(left @ right)
    found = torch.stack(found)
    assert (found.mean() - a @ b).abs() < 4 * found.std() / 20


def wide(c=CLASSES, width=40):
    return nn.Sequential(
        *(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        nn.Linear(width, c),
    )


def sampled(model, num_directions, budget=2**30):
    """A sample of 100 inputs as they are and 100 augmented ones; S and κ of the former."""
    method = NeuralEF(
        rank=8, num_inputs=200, num_directions=num_directions, teacher=Training(steps=30)
    )
    x, y = normal(200, 4, seed=4).to(next(model.parameters())), torch.arange(200) % CLASSES
    linearized = Linearized(model, memory_budget=budget)
    sample = method.sample(linearized, loader_of(x, y, 50), seed=0, progress=False)
    jacobian = Linearized(model).jacobian(sample.inputs.parts[0][:100]).flatten(0, 1)
    inside = (sample.kernel_features[:100] / sample.scale).flatten(0, 1)
    return sample, inside @ inside.mT, jacobian @ jacobian.mT


def test_the_kernel_is_exact_where_directions_span_all_of_a_short_row():
    """67 weights are not folded, and as many directions leave nothing out."""
    model = made(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES))).double()
    sample, found, expected = sampled(model, 67)
    torch.testing.assert_close(found, expected)
    norms = sample.diagonal[:100].flatten() / sample.scale**2
    torch.testing.assert_close(norms, expected.diagonal())


def test_directions_are_the_leading_ones():
    """Folded to 4,096 numbers, r directions leave little more than the best r would."""
    _, found, expected = sampled(made(lambda: wide(width=80)).double(), 24)
    values = torch.linalg.eigvalsh(expected).flip(0)
    best = values[24:].square().sum().sqrt() / values.norm()
    assert best < (found - expected).norm() / expected.norm() < 2 * best + 0.05


def test_a_budget_too_small_for_one_jacobian_is_enough():
    model = made(wide)
    sample, found, expected = sampled(model, 32, budget=2**11)
    assert sample.blocks is None
    assert (found - expected).norm() < 0.2 * expected.norm()
    x, y = normal(200, 4, seed=4), torch.arange(200) % CLASSES
    ella = ELLA(model, eigenfunctions=NEURAL, memory_budget=2**11, **QUIET)
    assert ella.fit(loader_of(x, y, 50)).predict_proba(X).shape == (N, CLASSES)


def test_of_many_outputs_some_stand_for_all():
    """Sampled outputs give nearly the variance that all give, and the same logits."""
    c = 100
    x, y = normal(300, 4, seed=4), torch.arange(300) % c
    loader, model = loader_of(x, y, 50), made(lambda: wide(c))
    small = {"rank": 8, "num_inputs": 300, "width": 64, "augment": None}
    teacher = Training(steps=600)
    exact = Linearized(model).kernel_diagonal(x)
    found = {}
    for name, directions in (("all", 60), ("some", 30)):
        method = NeuralEF(num_directions=directions, teacher=teacher, **small)
        sample = method.sample(Linearized(model), loader, seed=0, progress=False)
        assert (sample.outputs is None) == (name == "all")
        prior = method.learn(sample, seed=0, progress=False)(x)
        assert prior.factor.shape == (300, c, 8)
        torch.testing.assert_close(prior.mean, model(x).detach())
        found[name] = (prior.variance() / exact).log().abs().mean().item()
    assert found["some"] < found["all"] + 0.25


class Nothing:
    """A method whose eigenfunctions and residual are all the same number."""

    rank = 1

    def __init__(self, value):
        self.value = value

    def fit(self, linearized, loader, *, seed, progress):
        self.network = linearized.network
        return self

    def __call__(self, x):
        mean = self.network(x)
        return LogitGaussian(mean, torch.zeros(*mean.shape, 1), torch.full_like(mean, self.value))


@pytest.mark.parametrize("value", [0.0, math.inf])
def test_a_kernel_of_nothing_or_of_infinity_is_an_error_that_helps(value):
    with pytest.raises(ValueError, match=r"no prior precision makes sense"):
        ELLA(made(mlp), eigenfunctions=Nothing(value), **QUIET).fit(LOADER)


def test_last_layers_that_do_not_fit_are_refused_at_once():
    model = nn.Sequential(nn.Linear(4, 3000), nn.ReLU(), nn.Linear(3000, CLASSES))
    with pytest.raises(ValueError, match=r"k = c·\(d \+ 1\) = 9,003 .*`memory_budget`"):
        ELLA(model, eigenfunctions=LastLayer(), **QUIET).fit(LOADER)


def test_trained_digits_stay_calibrated_and_epistemic(tmp_path):
    """On held-out digits ECE is not above the model's, and its uncertainty of weights is alive."""
    pytest.importorskip("netcal")
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = (torch.tensor(part) for part in datasets.load_digits(return_X_y=True))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order].float() / 16, y[order]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
        train(model, x[:200], y[:200], steps=150, rate=1e-2)
    method = NeuralEF(rank=16, num_inputs=600, num_directions=64, teacher=Training(steps=300))
    ella = ELLA(model, eigenfunctions=method, **QUIET).fit(loader_of(x[:200], y[:200], 50))
    ella.calibrate(loader_of(x[200:500], y[200:500], 100))
    plain = MAP(model, **QUIET).fit(loader_of(x[:200], y[:200], 50))
    test_x, test_y = x[500:], y[500:]
    eces = [expected_calibration_error(m.predict_proba(test_x), test_y) for m in (ella, plain)]
    assert eces[0] <= eces[1]
    scores = ella.uncertainty(test_x)
    noise = ella.uncertainty(torch.rand(300, 64, generator=torch.Generator().manual_seed(1)))
    for name in ("mutual_information", "logit_variance"):
        assert getattr(scores, name).std() > 0
        assert getattr(noise, name).mean() > getattr(scores, name).mean()


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
