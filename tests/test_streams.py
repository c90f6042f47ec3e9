"""Data that come in, count less, and are taken out again: G is the sum that it should be."""

import pytest
import torch
from torch import nn

from ella import ELLA, Categorical, LastLayer, NeuralEF, NotFittedError, Nystrom, Training

CLASSES = 3
NEURAL = NeuralEF(rank=3, num_inputs=16, num_directions=8, width=8, teacher=Training(steps=20))
METHODS = {"neural": NEURAL, "nystrom": Nystrom(3, 12), "last layer": LastLayer()}
QUIET = {"progress": False}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(60) % CLASSES


@pytest.fixture(params=METHODS.values(), ids=METHODS)
def ella(request, data):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    x, y = data
    return ELLA(model, eigenfunctions=request.param, **QUIET).fit(batches(x[:40], y[:40]))


def batches(x, y, size=7):
    return list(zip(x.split(size), y.split(size), strict=True))


def reference(ella, x, weights):
    """Σ wᵢ φᵀΛφ, example by example."""
    prior = ella.features(x)
    total = torch.zeros(ella.curvature.shape, dtype=torch.float64)
    for phi, f, weight in zip(prior.factor, prior.mean, weights, strict=True):
        p = f.softmax(0)
        total += weight * phi.T @ (torch.diag(p) - torch.outer(p, p)) @ phi
    return total


def test_what_is_forgotten_counts_no_more(ella, data):
    x, y = data
    ella.partial_fit(batches(x[40:], y[40:]))
    ella.forget(batches(x[10:25], y[10:25], 4))  # other batches than those it came in
    weights = torch.ones(60)
    weights[10:25] = 0
    torch.testing.assert_close(ella.curvature, reference(ella, x, weights))
    assert ella._fit.sums.num_examples == 45
    expected = ella.log_marginal_likelihood()
    ella.partial_fit(batches(x[10:25], y[10:25])).forget(batches(x[10:25], y[10:25]))
    assert ella.log_marginal_likelihood() == pytest.approx(expected)


@pytest.mark.parametrize("rows", [slice(40, 44), slice(38, 42), [3, 3], [3, 5, 3]])
def test_what_never_came_in_cannot_be_forgotten(ella, data, rows):
    x, y = data
    before = ella.curvature.clone()
    with pytest.raises(ValueError, match=r"[1-4] of the examples to forget never came in"):
        ella.forget([(x[rows], y[rows])])
    assert torch.equal(ella.curvature, before)
    ella.forget([(x[3:4], y[3:4])])
    with pytest.raises(ValueError, match="1 of the examples to forget never came in"):
        ella.forget([(x[3:4], y[3:4])])


def test_without_memory_the_curvature_tells(ella, data, tmp_path):
    """A file does not know which examples came in."""
    x, y = data
    ella.save(tmp_path / "ella")
    again = ELLA.load(tmp_path / "ella", ella.model, progress=False)
    again.forget(batches(x[:5], y[:5]))
    weights = torch.ones(40)
    weights[:5] = 0
    torch.testing.assert_close(again.curvature, reference(ella, x[:40], weights))
    far = 30 * x[40:45]
    far[:, 1:] = 0
    outside = ella.features(far).factor.square().sum()
    assert outside > 0
    with pytest.raises(ValueError, match=r"never all in: without 40 of 35 examples"):
        again.forget(batches(x[:40], y[:40]))


def test_forgetting_everything_is_an_error(ella, data):
    x, y = data
    with pytest.raises(ValueError, match=r"At least one example has to stay"):
        ella.forget(batches(x[:40], y[:40]))
    assert ella._fit.sums.num_examples == 40
    ella.forget(batches(x[1:40], y[1:40]))
    torch.testing.assert_close(ella.curvature, reference(ella, x[:1], [1]), atol=1e-7, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:calibrate")
def test_old_data_count_less(ella, data):
    x, y = data
    for start in (40, 50):
        ella.decay(0.5).partial_fit(batches(x[start : start + 10], y[start : start + 10]))
    weights = torch.tensor([0.25] * 40 + [0.5] * 10 + [1] * 10)
    torch.testing.assert_close(ella.curvature, reference(ella, x, weights))
    assert ella._fit.sums.num_examples == 25
    ella.calibrate(batches(x[40:], y[40:]))
    assert ella.predict_proba(x).shape == (60, CLASSES)


def test_a_prior_decays_with_its_data(ella, data):
    """φ(γG + γδ)⁻¹φᵀ = φ(G + δ)⁻¹φᵀ/γ: less data, and as much less prior, is more variance."""
    x, _ = data
    before = ella.features(x[:5]), ella._fit.posterior
    ella.decay(0.25)
    wide = ella._fit.posterior.condition(before[0], 0.25 * 2.0).variance()
    torch.testing.assert_close(wide, 4 * before[1].condition(before[0], 2.0).variance())


@pytest.mark.parametrize("factor", [0, -1, 1.5, float("nan"), "half"])
def test_bad_factors(ella, factor):
    with pytest.raises((ValueError, TypeError), match="`factor`"):
        ella.decay(factor)


def test_before_fit(ella, data):
    fresh = ELLA(ella.model, **QUIET)
    for call in (lambda: fresh.decay(0.5), lambda: fresh.forget(batches(*data))):
        with pytest.raises(NotFittedError):
            call()


def test_weighted_and_ignored_examples(data):
    x, y = data
    y = y.clone()
    y[::4] = -100
    weights = torch.tensor([1.0, 2.0, 0.5])
    likelihood = Categorical(class_weights=weights, ignore_index=-100)
    model = nn.Sequential(nn.Linear(4, CLASSES)).double()
    ella = ELLA(model, likelihood=likelihood, eigenfunctions=LastLayer(), **QUIET)
    ella.fit(batches(x[:40], y[:40])).forget(batches(x[:20], y[:20]))
    each = torch.where(y == -100, 0, weights[y.clamp_min(0)].double())
    torch.testing.assert_close(ella.curvature, reference(ella, x[20:40], each[20:40]))
