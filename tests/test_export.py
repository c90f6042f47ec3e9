"""One module that gives what the estimator gives: called, exported, compiled, as ONNX."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.export import Dim

from ella import ELLA, Distance, LastLayer, MonteCarlo, NeuralEF, NotFittedError, Probit, Training
from ella.export import PredictiveModule, cholesky

DRAWS = 48
QUIET = {"progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:calibrate")


class TokenClassifier(nn.Module):
    """Padded token ids to logits, with LayerNorm and attention written out."""

    def __init__(self, c):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(20, 12), nn.LayerNorm(12)
        self.query, self.key, self.value = (nn.Linear(12, 12) for _ in range(3))
        self.out, self.head = nn.LayerNorm(12), nn.Linear(12, c)

    def forward(self, input_ids, attention_mask):
        h = self.norm(self.embedding(input_ids))
        scores = self.query(h) @ self.key(h).mT / 12**0.5
        scores = scores.masked_fill(attention_mask.unsqueeze(1) == 0, -1e9)
        h = self.out(h + scores.softmax(-1) @ self.value(h))
        mask = attention_mask.unsqueeze(-1).to(h)
        return {"logits": self.head((h * mask).sum(1) / mask.sum(1))}


def perceptron(c):
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, c))


def convolutional(c):
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
        *(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, c)),
    )


def vectors(n, g):
    return torch.randn(n, 6, generator=g)


def images(n, g):
    return torch.randn(n, 3, 8, 8, generator=g)


def tokens(n, g):
    lengths = torch.randint(3, 9, (n, 1), generator=g)
    mask = (torch.arange(8) < lengths).long()
    ids = torch.randint(1, 20, (n, 8), generator=g) * mask
    return {"input_ids": ids, "attention_mask": mask}


KINDS = {
    "perceptron": (perceptron, vectors),
    "convolutional": (convolutional, images),
    "transformer": (TokenClassifier, tokens),
}


def inputs(kind, n, seed=0):
    return KINDS[kind][1](n, torch.Generator().manual_seed(seed))


def fitted(kind, c=5, residual="diag", distance=None, rank=6, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = KINDS[kind][0](c).eval()
    method = NeuralEF(
        rank, num_inputs=40, num_directions=24, width=16, teacher=Training(steps=30, batch_size=16)
    )
    ella = ELLA(
        model, eigenfunctions=method, residual=residual, distance=distance, **QUIET, **options
    )
    y = torch.randint(c, (40,), generator=torch.Generator().manual_seed(1))
    if options.get("likelihood") == "multilabel":
        y = torch.nn.functional.one_hot(y, c).float()
    ella.fit([(inputs(kind, 40), y)])
    ella.hyperparameters = replace(
        ella.hyperparameters, temperature=0.6, logit_temperature=1.3, distance_scale=0.0
    )
    if distance is not None:
        ella.hyperparameters = replace(ella.hyperparameters, distance_scale=0.2)
    return ella


def assert_same(found, ella, x, tolerance=1e-5):
    scores = ella.uncertainty(x, n_samples=DRAWS)
    for value, expected in zip(
        found,
        (ella.predict_proba(x, n_samples=DRAWS), scores.mutual_information, scores.logit_variance),
        strict=True,
    ):
        value = torch.as_tensor(value)
        assert value.shape == expected.shape
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [None, Distance()], ids=["plain", "distance"])
@pytest.mark.parametrize(
    ("c", "rank", "residual"),
    [(5, 6, "diag"), (5, 6, "factor"), (6, 6, "none"), (9, 6, "diag")],
)
def test_called_it_gives_the_same(kind, distance, c, rank, residual):
    ella = fitted(kind, c, residual, distance, rank)
    assert_same(ella.predictive_module(DRAWS)(inputs(kind, 30, 7)), ella, inputs(kind, 30, 7))


def test_labels_that_are_independent():
    ella = fitted("perceptron", likelihood="multilabel")
    x = inputs("perceptron", 30, 7)
    assert_same(ella.predictive_module(DRAWS)(x), ella, x)


@pytest.mark.parametrize("c", [5, 9])
def test_normalised_logits(c):
    """Below 16 outputs draws are by a Cholesky factor, of 9 and a rank of 6 in its dimensions."""
    ella = fitted("perceptron", c, "diag", Distance(), 6)
    numbers = {"norm_exponent": 0.5, "typical_norm": 2.0}
    ella.hyperparameters = replace(ella.hyperparameters, **numbers)
    x = inputs("perceptron", 30, 7)
    assert_same(ella.predictive_module(DRAWS)(x), ella, x)
    ella.hyperparameters = replace(ella.hyperparameters, temperature=0.0, distance_scale=0.0)
    assert_same(ella.predictive_module(DRAWS)(x), ella, x)


@pytest.mark.parametrize("distance_scale", [0.0, 0.3])
def test_without_a_posterior(distance_scale):
    """T = 0: probabilities are those of the mean, scores those of the best posterior."""
    ella = fitted("perceptron", distance=Distance())
    x = inputs("perceptron", 200, 3)
    ella.calibrate([(x, torch.arange(200) % 5)], n_samples=DRAWS)
    posterior = replace(ella.tuning.posterior, distance_scale=distance_scale)
    ella.tuning = replace(ella.tuning, posterior=posterior)
    ella.hyperparameters = replace(posterior, temperature=0.0, logit_temperature=1.7)
    assert_same(ella.predictive_module()(x), ella, x)


@pytest.mark.parametrize(
    ("c", "rank", "residual"), [(18, 20, "diag"), (18, 20, "factor"), (9, 6, "factor")]
)
def test_other_draws_agree_up_to_their_error(c, rank, residual):
    ella = fitted("perceptron", c, residual, Distance(), rank)
    x = inputs("perceptron", 30, 7)
    found = ella.predictive_module(20_000)(x)
    torch.testing.assert_close(
        found[0], ella.predict_proba(x, n_samples=20_000), rtol=0, atol=8e-3
    )


def dynamic(x):
    return {name: {0: Dim.DYNAMIC} for name in x} if isinstance(x, dict) else {0: Dim.DYNAMIC}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", [None, Distance()], ids=["plain", "distance"])
def test_exported_for_any_number_of_examples(kind, distance, tmp_path):
    ella = fitted(kind, distance=distance)
    x = inputs(kind, 4)
    exported = torch.export.export(
        ella.predictive_module(DRAWS), (x,), dynamic_shapes=(dynamic(x),), strict=False
    )
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    for n in (2, 33):
        for program in (exported, loaded):
            assert_same(program.module()(inputs(kind, n, 7)), ella, inputs(kind, n, 7))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_as_one_graph(kind):
    ella = fitted(kind, distance=Distance())
    compiled = torch.compile(ella.predictive_module(DRAWS), fullgraph=True)
    assert_same(compiled(inputs(kind, 9, 7)), ella, inputs(kind, 9, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_as_onnx(kind, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    ella = fitted(kind, distance=Distance())
    x = inputs(kind, 4)
    program = torch.onnx.export(
        ella.predictive_module(DRAWS),
        kwargs={"x": x},  # a dictionary that comes last would be taken for names
        dynamo=True,
        dynamic_shapes={"x": dynamic(x)},
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    x = inputs(kind, 1000, 7)
    named = x if isinstance(x, dict) else {"x": x}
    names = [each.name for each in session.get_inputs()]
    given = dict(zip(names, (t.numpy() for t in named.values()), strict=True))
    assert_same(session.run(None, given), ella, x, 1e-4)


def test_it_is_a_copy_and_touches_nothing():
    ella = fitted("convolutional", distance=Distance())
    x = inputs("convolutional", 5, 7)
    before = {name: t.clone() for name, t in ella.model.state_dict().items()}
    module = ella.predictive_module(DRAWS)
    twin = copy.deepcopy(module)
    expected = ella.predict_proba(x, n_samples=DRAWS)
    assert all(torch.equal(t, before[name]) for name, t in ella.model.state_dict().items())
    assert not any(m._forward_hooks for m in ella.model.modules())
    assert not any(p.requires_grad for p in module.parameters())
    with torch.no_grad():
        for parameter in ella.model.parameters():
            parameter.add_(1)
    torch.testing.assert_close(module(x)[0], expected)
    torch.testing.assert_close(twin(x)[0], expected)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    torch.testing.assert_close(twin(x)[0], expected)


def test_draws_are_those_that_were_tuned():
    ella = fitted("perceptron")
    ella.link = MonteCarlo(7, 3)
    x = inputs("perceptron", 6, 7)
    found = ella.predictive_module()(x)[0]
    torch.testing.assert_close(found, ella.predict_proba(x))


def test_what_cannot_be_exported():
    ella = fitted("perceptron")
    with pytest.raises(NotFittedError):
        ELLA(ella.model, **QUIET).predictive_module()
    ella.link = Probit()
    with pytest.raises(ValueError, match="averages of probabilities over draws"):
        ella.predictive_module()
    other = ELLA(ella.model, eigenfunctions=LastLayer(), **QUIET)
    other.fit([(inputs("perceptron", 40), torch.arange(40) % 5)])
    with pytest.raises(ValueError, match="needs an ELLA that was fitted with NeuralEF"):
        other.predictive_module()
    regression = ELLA(
        ella.model,
        likelihood="regression",
        eigenfunctions=ella.eigenfunctions,
        **QUIET,
    )
    regression.fit([(inputs("perceptron", 40), torch.randn(40, 5))])
    with pytest.raises(ValueError, match="averages of probabilities"):
        regression.predictive_module()


def test_cholesky_written_out():
    factor = torch.randn(7, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    matrix = factor @ factor.mT
    torch.testing.assert_close(cholesky(matrix), torch.linalg.cholesky(matrix))
    singular = factor[:, :, :2] @ factor[:, :, :2].mT
    found = cholesky(singular)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(cholesky(torch.zeros(2, 3, 3)), torch.zeros(2, 3, 3))


def test_it_returns_a_plain_tuple():
    """Files of exported programs hold no classes of ours."""
    found = fitted("perceptron").predictive_module(DRAWS)
    assert isinstance(found, PredictiveModule)
    assert type(found(inputs("perceptron", 3))) is tuple


class Windows(nn.Module):
    """Folds four windows of each example into the batch, and leaves out a branch at times."""

    def __init__(self):
        super().__init__()
        self.each, self.mix = nn.Linear(6, 10), nn.Linear(10, 9)
        self.branch, self.head = nn.Linear(9, 9), nn.Linear(9, 3)

    def forward(self, x):
        h = self.each(x.reshape(-1, 6)).relu()
        h = self.mix(h).relu().view(x.shape[0], 4, -1).mean(1)
        if self.training:
            h = self.branch(h)
        return self.head(h)


def test_parts_of_examples_in_the_batch():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Windows().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, 6, generator=generator)
    method = NeuralEF(6, num_inputs=40, num_directions=24, width=16, teacher=Training(steps=30))
    ella = ELLA(model, eigenfunctions=method, distance=Distance(), **QUIET)
    ella.fit([(x, torch.arange(40) % 3)])
    ella.hyperparameters = replace(ella.hyperparameters, distance_scale=0.2)
    assert_same(ella.predictive_module(DRAWS)(x[:7]), ella, x[:7])


def test_dense_outputs_are_refused():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)).eval()
    x = torch.randn(12, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    method = NeuralEF(3, num_inputs=40, num_directions=12, width=8, teacher=Training(steps=20))
    ella = ELLA(model, eigenfunctions=method, **QUIET).fit([(x, torch.randint(3, (12, 5, 5)))])
    with pytest.raises(ValueError, match=r"outputs \(n, c\); the model gives \(12, 3, 5, 5\)"):
        ella.predictive_module(DRAWS)(x)
