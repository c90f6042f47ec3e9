"""Laws that hold for any architecture, dtype, number of classes, split and subset of weights."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import dense_ggn, dense_jacobian, lla_covariance, softmax_hessian
from torch import nn

from ella import ELLA, LastLayer, LogitGaussian, NeuralEF, Nystrom, Training
from ella.links import make_link
from ella.posterior import GaussianPosterior

pytestmark = pytest.mark.filterwarnings("ignore:calibrate. ", "ignore:All labels")

few = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
many = settings(few, max_examples=60)

N, LENGTH, WIDTH, IDS = 10, 4, 3, 7


# Architectures


class Recurrent(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.rnn = nn.GRU(WIDTH, width, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0]


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, x):
        return x + self.attention(x, x, x, need_weights=False)[0]


class Convolving(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return self.conv(x.mT).mT


class Residual(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + torch.tanh(self.body(x))


class Twice(nn.Module):
    """Tied: one layer at two places."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1)


BLOCKS = {
    "linear": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "gelu": nn.GELU,
    "norm": lambda: nn.LayerNorm(WIDTH),
    "conv": Convolving,
    "attention": Attending,
    "recurrent": lambda: Recurrent(WIDTH),
    "residual": lambda: Residual(nn.Linear(WIDTH, WIDTH)),
    "tied": Twice,
    "dropout": lambda: nn.Dropout(0.5),
}


@st.composite
def problems(draw, dtypes=(torch.float64,)):
    """A random classifier of sequences, some of whose weights are frozen, and its data."""
    blocks = draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=3))
    classes = draw(st.integers(2, 5))
    embeds, dtype = draw(st.booleans()), draw(st.sampled_from(dtypes))
    seed = draw(st.integers(0, 2**20))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        first = nn.Embedding(IDS, WIDTH) if embeds else nn.Linear(2, WIDTH)
        layers = [first, *(BLOCKS[b]() for b in blocks), Pooled(), nn.Linear(WIDTH, classes)]
        model = nn.Sequential(*layers).to(dtype)
    for parameter in list(model.parameters())[:-2]:
        parameter.requires_grad_(draw(st.booleans()))
    g = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(N + 4, LENGTH, 2, generator=g, dtype=dtype)
    if embeds:
        x = torch.randint(IDS, (N + 4, LENGTH), generator=g)
    y = torch.randint(classes, (N,), generator=g)
    cuts = sorted(draw(st.sets(st.integers(1, N - 1), max_size=3)))
    return model, x[:N], y, x[N:], [0, *cuts, N]


def split(x, y, ends):
    return [(x[a:b], y[a:b]) for a, b in itertools.pairwise(ends)]


def fitted(model, loader, method, **options):
    return ELLA(model, eigenfunctions=method, progress=False, **options).fit(loader)


# Exactness


@few
@given(problems())
def test_the_last_layer_with_its_residual_adds_up_to_the_kernel(problem):
    """φφᵀ + R is κ(x, x), whatever is outside the last layer."""
    model, x, y, test, ends = problem
    ella = fitted(model, split(x, y, ends), LastLayer(residual="exact"))
    _, jacobian = dense_jacobian(model, test)
    kernel = jacobian @ jacobian.mT
    torch.testing.assert_close(ella.features(test).covariance(), kernel, rtol=1e-7, atol=1e-9)


@few
@given(problems(), st.sampled_from([1e-2, 1.0, 30.0]))
def test_full_rank_is_dense_laplace(problem, precision):
    model, x, y, test, ends = problem
    logits, jacobian = dense_jacobian(model, x)
    gram = jacobian.flatten(0, 1) @ jacobian.flatten(0, 1).T
    values = torch.linalg.eigvalsh(gram)
    rank = int((values > 1e-7 * values[-1]).sum())
    method = Nystrom(rank, N, outputs="all", residual="exact")
    ella = fitted(model, split(x, y, ends), method, prior_precision=precision)
    ggn = dense_ggn(jacobian, softmax_hessian(logits))
    mean, jacobian = dense_jacobian(model, test)
    expected = lla_covariance(jacobian, ggn, precision)
    found = ella.logits(test)
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-6 * expected.abs().max())


# Invariance


@few
@given(problems((torch.float64, torch.float32)), st.integers(1, 4))
def test_nothing_depends_on_batching_order_or_the_global_generator(problem, size):
    model, x, y, test, ends = problem
    ella = fitted(model, split(x, y, ends), LastLayer())
    probs = ella.predict_proba(test)
    assert ((probs >= 0) & (probs <= 1)).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(test), dtype=probs.dtype))
    state = torch.get_rng_state()
    order = torch.randperm(N)
    other = fitted(model, [(x[order], y[order])], LastLayer())
    tolerance = 1e-4 if probs.dtype == torch.float32 else 1e-8
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(other.predict_proba(test), probs, **close)
    parts = [test[i : i + size] for i in range(0, len(test), size)]
    torch.testing.assert_close(ella.predict_proba(parts), probs, **close)
    torch.testing.assert_close(ella.predict_proba(test.flip(0)).flip(0), probs, **close)
    torch.set_rng_state(state)


@few
@given(problems())
def test_more_data_never_raise_the_variance_and_a_higher_precision_lowers_it(problem):
    model, x, y, test, _ends = problem
    ella = fitted(model, [(x[:4], y[:4])], LastLayer("none"), prior_precision=1.0)
    before = ella.gaussian(test).variance()
    ella.partial_fit([(x[4:], y[4:])])
    after = ella.gaussian(test).variance()
    assert (after <= before * (1 + 1e-9)).all()
    ella.hyperparameters = replace(ella.hyperparameters, prior_precision=2.0)
    assert (ella.gaussian(test).variance() <= after * (1 + 1e-9)).all()


# Gaussians at any scale


@st.composite
def gaussians(draw, low=-20.0, high=20.0):
    """Logits and standard deviations from 1e-20 to 1e20."""
    n, c, k = 3, draw(st.integers(2, 5)), draw(st.integers(0, 6))
    seed, form = draw(st.integers(0, 2**20)), draw(st.sampled_from(["none", "diag", "blocks"]))
    logs = [draw(st.floats(low, high)) for _ in range(3)]
    g = torch.Generator().manual_seed(seed)
    mean, factor = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, c), (n, c, k)))
    root = torch.randn(n, c, c, generator=g, dtype=torch.float64) * 10 ** logs[2]
    blocks = root @ root.mT
    residual = {"none": None, "diag": blocks.diagonal(dim1=1, dim2=2), "blocks": blocks}[form]
    return LogitGaussian(mean * 10 ** logs[0], factor * 10 ** logs[1], residual)


@many
@given(gaussians(), st.sampled_from(["mc", "probit"]))
def test_probabilities_are_finite_at_any_scale(gaussian, link):
    probs = make_link(link, 16)(gaussian)
    assert torch.isfinite(probs).all()
    assert ((probs >= 0) & (probs <= 1)).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, dtype=torch.float64))


@many
@given(gaussians(-2, 2), st.floats(0.1, 10), st.floats(0.1, 10))
def test_scale_laws(gaussian, temperature, scale):
    """N(m, S) at T and τ is N(m/τ, T·S/τ²), for moments and for draws of one seed."""
    found = gaussian.tempered(temperature, scale)
    torch.testing.assert_close(found.mean, gaussian.mean / scale)
    torch.testing.assert_close(
        found.covariance(), gaussian.covariance() * temperature / scale**2, rtol=1e-9, atol=1e-12
    )
    draws = gaussian.sample(6, 1) - gaussian.mean
    expected = gaussian.mean / scale + draws * temperature**0.5 / scale
    torch.testing.assert_close(found.sample(6, 1), expected, rtol=1e-6, atol=1e-6)


@many
@given(st.integers(1, 6), st.integers(0, 2**20), st.floats(-6, 6))
def test_conditioning_is_the_matrix_formula(k, seed, log_precision):
    """φ(G + δI)⁻¹φᵀ + R/δ, and log det(G/δ + I)."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(k, k, generator=g, dtype=torch.float64)
    phi = torch.randn(4, 3, k, generator=g, dtype=torch.float64)
    residual = torch.rand(4, 3, generator=g, dtype=torch.float64)
    curvature, precision = root @ root.T, 10**log_precision
    posterior = GaussianPosterior.from_curvature(curvature)
    prior = LogitGaussian(phi[..., 0], phi, residual)
    eye = torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.inv(curvature + precision * eye)
    expected = phi @ inverse @ phi.mT + torch.diag_embed(residual) / precision
    found = posterior.condition(prior, precision).covariance()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8 * expected.abs().max())
    ratio = torch.logdet(curvature / precision + eye).item()
    assert posterior.log_determinant_ratio(precision) == pytest.approx(ratio, rel=1e-8, abs=1e-8)


@many
@given(gaussians(-1, 1), st.integers(0, 2**20))
def test_draws_have_the_covariance_whatever_the_form(gaussian, seed):
    """Exactly, where there are more pairs of draws than dimensions."""
    draws = gaussian.settled().sample(64, seed)
    apart = draws - gaussian.mean
    found = torch.einsum("snc,snd->ncd", apart, apart) / len(apart)
    expected = gaussian.covariance()
    torch.testing.assert_close(
        found, expected, rtol=1e-6, atol=1e-8 * expected.abs().max() + 1e-12
    )


def test_learned_features_obey_the_same_laws():
    """Once, as networks have to be trained."""
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=g, dtype=torch.float64)
    y = torch.randint(3, (20,), generator=g)
    short = Training(steps=20, batch_size=16)
    method = NeuralEF(3, num_inputs=48, width=8, num_directions=12, teacher=short)
    ella = fitted(model, split(x, y, [0, 7, 20]), method)
    once, whole = ella.curvature, ella.predict_proba(x)
    torch.testing.assert_close(ella.predict_proba([x[:3], x[3:]]), whole)
    torch.testing.assert_close(ella.partial_fit([(x, y)]).curvature, 2 * once)
    torch.testing.assert_close(ella.forget([(x, y)]).predict_proba(x), whole)
