"""From a Gaussian over logits to probabilities: moments, links and scores against formulas."""

import math

import pytest
import torch

from ella.likelihoods import Categorical
from ella.links import LaplaceBridge, MonteCarlo, Probit, make_link
from ella.predictive import LogitGaussian
from ella.scores import entropy

N, C, K = 4, 3, 5
RESIDUALS = ("none", "diag", "exact")


def uncertainty(gaussian, num_samples):
    return Categorical().uncertainty(gaussian, gaussian, MonteCarlo(num_samples), 1.0)


def make_gaussian(residual="none", scale=1.0, seed=0, c=C, k=K):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mean, factor, root = normal(N, c), normal(N, c, k), normal(N, c, 2)
    outside = {"none": None, "diag": root.square().sum(-1), "exact": root @ root.mT}[residual]
    outside = None if outside is None else outside * scale**2
    return LogitGaussian(mean, factor * scale, outside)


def dense_covariance(gaussian):
    """One example at a time."""
    out = []
    for i in range(len(gaussian.mean)):
        s = gaussian.factor[i] @ gaussian.factor[i].T
        if gaussian.residual is not None:
            r = gaussian.residual[i]
            s = s + (torch.diag(r) if r.ndim == 1 else r)
        out.append(s)
    return torch.stack(out)


@pytest.fixture(params=RESIDUALS)
def gaussian(request):
    return make_gaussian(request.param)


# Moments


def test_covariance_and_variance_agree_with_the_dense_sum(gaussian):
    dense = dense_covariance(gaussian)
    torch.testing.assert_close(gaussian.covariance(), dense, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        gaussian.variance(), dense.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-12
    )


def test_tempering_scales_mean_and_covariance(gaussian):
    warm = gaussian.tempered(2.5, 0.8)
    torch.testing.assert_close(warm.mean, gaussian.mean / 0.8)
    torch.testing.assert_close(warm.covariance(), gaussian.covariance() * 2.5 / 0.64)
    torch.testing.assert_close(warm.variance(), gaussian.variance() * 2.5 / 0.64)


def test_samples_have_the_mean_and_covariance_of_the_gaussian(gaussian):
    draws = gaussian.sample(200_000)
    assert draws.shape == (200_000, N, C)
    torch.testing.assert_close(draws.mean(0), gaussian.mean, rtol=0, atol=1e-12)  # antithetic
    centred = draws - gaussian.mean
    covariance = torch.einsum("snc,snd->ncd", centred, centred) / len(draws)
    scale = gaussian.variance().max().item()
    torch.testing.assert_close(covariance, gaussian.covariance(), rtol=0, atol=0.03 * scale)
    # The third moment is exactly zero too; the fourth is a Gaussian's.
    kurtosis = centred.pow(4).mean(0) / gaussian.variance().square()
    torch.testing.assert_close(kurtosis, torch.full_like(kurtosis, 3), rtol=0, atol=0.1)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 8])
def test_draws_come_in_antithetic_pairs(gaussian, num_samples):
    noise = gaussian.sample(num_samples) - gaussian.mean
    assert len(noise) == num_samples
    half = (num_samples + 1) // 2
    torch.testing.assert_close(noise[half:], -noise[: num_samples - half])


def test_draws_depend_on_the_seed_and_on_nothing_else(gaussian):
    before = torch.get_rng_state()
    draws = gaussian.sample(16, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(gaussian.sample(16, seed=3), draws)
    assert not torch.equal(gaussian.sample(16, seed=4), draws)
    alone = LogitGaussian(
        gaussian.mean[2:3],
        gaussian.factor[2:3],
        None if gaussian.residual is None else gaussian.residual[2:3],
    )
    torch.testing.assert_close(alone.sample(16, seed=3), draws[:, 2:3], rtol=1e-12, atol=1e-12)


def test_one_draw_is_one_function():
    """Two inputs with the same features get the same noise."""
    gaussian = make_gaussian("diag")
    gaussian.factor[1], gaussian.residual[1] = gaussian.factor[0], gaussian.residual[0]
    noise = gaussian.sample(10) - gaussian.mean
    torch.testing.assert_close(noise[:, 0], noise[:, 1], rtol=0, atol=1e-12)


def test_a_rank_of_zero_is_the_mean():
    gaussian = make_gaussian(k=0)
    assert torch.equal(gaussian.covariance(), torch.zeros(N, C, C, dtype=torch.float64))
    assert torch.equal(gaussian.sample(3), gaussian.mean.expand(3, N, C))


def test_a_residual_just_below_zero_is_rounding():
    gaussian = make_gaussian("exact")
    flat = LogitGaussian(gaussian.mean, gaussian.factor, gaussian.residual * 0 - 1e-18)
    assert torch.isfinite(flat.sample(4)).all()
    diagonal = LogitGaussian(gaussian.mean, gaussian.factor, torch.full((N, C), -1e-18).double())
    assert torch.isfinite(diagonal.sample(4)).all()


# Links


@pytest.mark.parametrize("name", ["mc", "probit", "bridge"])
def test_rows_sum_to_one(gaussian, name):
    probs = make_link(name, 64, 0)(gaussian)
    assert probs.shape == (N, C)
    assert (probs >= 0).all()
    torch.testing.assert_close(probs.sum(-1), torch.ones(N, dtype=torch.float64))


@pytest.mark.parametrize("name", ["mc", "probit", "bridge"])
def test_many_temperatures_of_one_gaussian_are_its_tempered_copies(gaussian, name):
    link = make_link(name, 16, seed=3)
    prepared = link.tempered(gaussian)
    for temperature, scale in ((1.0, 1.0), (0.2, 3.0), (7.0, 0.4)):
        expected = link(gaussian.tempered(temperature, scale))
        torch.testing.assert_close(prepared(temperature, scale), expected)


@pytest.mark.parametrize("link", [MonteCarlo(16), Probit()], ids=["mc", "probit"])
def test_no_variance_is_softmax(gaussian, link):
    cold = gaussian.tempered(0.0, 1.7)
    torch.testing.assert_close(link(cold), (gaussian.mean / 1.7).softmax(-1))


def test_monte_carlo_converges_to_the_integral():
    """Against a grid over the one direction in which the logits vary."""
    gaussian = make_gaussian(k=1)
    nodes = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    weights = torch.exp(-nodes.square() / 2) / math.sqrt(2 * math.pi) * (nodes[1] - nodes[0])
    logits = gaussian.mean + nodes[:, None, None] * gaussian.factor[..., 0]
    expected = torch.einsum("s,snc->nc", weights, logits.softmax(-1))
    torch.testing.assert_close(MonteCarlo(100_000)(gaussian), expected, rtol=0, atol=3e-3)


def test_probit_formula(gaussian):
    variance = dense_covariance(gaussian).diagonal(dim1=1, dim2=2)
    expected = torch.stack(
        [(m / torch.sqrt(1 + math.pi * v / 8)).softmax(0)
         for m, v in zip(gaussian.mean, variance, strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(Probit()(gaussian), expected)


def test_bridge_formula(gaussian):
    """The Dirichlet of the Gaussian conditioned on logits that sum to zero, entry by entry."""
    expected = []
    for m, s in zip(gaussian.mean, dense_covariance(gaussian), strict=True):
        one = torch.ones(C, dtype=torch.float64)
        gain = s @ one / (one @ s @ one)
        m, s = m - gain * m.sum(), s - torch.outer(gain, one @ s)
        assert abs(m.sum()) < 1e-12
        spread = torch.exp(m) * torch.exp(-m).sum() / C**2
        alpha = (1 - 2 / C + spread) / s.diagonal()
        expected.append(alpha / alpha.sum())
    torch.testing.assert_close(LaplaceBridge()(gaussian), torch.stack(expected))


@pytest.mark.parametrize("name", ["mc", "probit", "bridge"])
def test_a_symmetric_gaussian_is_undecided(name):
    """Equal means and exchangeable covariance: uniform (for draws, within their error)."""
    eye = torch.eye(C, dtype=torch.float64).expand(N, C, C)
    gaussian = LogitGaussian(torch.full((N, C), 0.7, dtype=torch.float64), 1.3 * eye)
    probs = make_link(name, 50_000, 0)(gaussian)
    tolerance = 5e-3 if name == "mc" else 1e-12
    torch.testing.assert_close(probs, torch.full_like(probs, 1 / C), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["mc", "probit"])
def test_variance_makes_predictions_less_sure(name):
    mean = torch.tensor([[3.0, 0, 0]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64).unsqueeze(0)
    link = make_link(name, 4000, 0)
    tops = [link(LogitGaussian(mean, scale * eye))[0, 0].item() for scale in (0.1, 1, 3, 10)]
    assert tops == sorted(tops, reverse=True)


def test_bad_links():
    with pytest.raises(ValueError, match=r"`link` must be one of .*got 'logit'"):
        make_link("logit", 8, 0)
    with pytest.raises(ValueError, match="`num_samples` must be a whole number of at least 1"):
        make_link("mc", 0, 0)


# Scores


def test_entropy_counts_zero_times_log_zero_as_zero():
    probs = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    expected = torch.tensor([0, math.log(2), math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(entropy(probs), expected)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("residual", RESIDUALS)
def test_scores_keep_their_bounds(residual, scale):
    gaussian = make_gaussian(residual, scale)
    scores = uncertainty(gaussian, 64)
    probs = MonteCarlo(64)(gaussian)
    torch.testing.assert_close(scores.entropy, entropy(probs))
    torch.testing.assert_close(scores.confidence_deficit, 1 - probs.max(-1).values)
    torch.testing.assert_close(scores.logit_variance, gaussian.variance().mean(-1))
    torch.testing.assert_close(scores.energy, -gaussian.mean.exp().sum(-1).log())
    assert (scores.mutual_information >= 0).all()
    assert (scores.mutual_information <= scores.entropy).all()
    assert (scores.entropy <= math.log(C) + 1e-12).all()
    assert ((scores.confidence_deficit >= 0) & (scores.confidence_deficit <= 1 - 1 / C)).all()


def test_mutual_information_is_what_the_weights_add():
    gaussian = make_gaussian("diag")
    draws = gaussian.compressed().sample(32).softmax(-1)
    each = torch.stack([torch.stack([-(p * p.log()).sum() for p in draw]) for draw in draws])
    mean = draws.mean(0)
    expected = -(mean * mean.log()).sum(-1) - each.mean(0)
    torch.testing.assert_close(uncertainty(gaussian, 32).mutual_information, expected)
    none = uncertainty(gaussian.tempered(0.0, 1.0), 32).mutual_information
    torch.testing.assert_close(none, torch.zeros_like(none), rtol=0, atol=1e-12)


def test_scores_survive_logits_that_saturate():
    gaussian = LogitGaussian(torch.tensor([[500.0, 0, 0]]), torch.zeros(1, 3, 1))
    scores = uncertainty(gaussian, 8)
    assert all(torch.isfinite(v).all() for v in vars(scores).values() if v is not None)
    assert scores.entropy == 0


@pytest.mark.parametrize("residual", RESIDUALS)
def test_compression_keeps_the_covariance_and_its_draws_have_it(residual):
    gaussian = make_gaussian(residual)
    small = gaussian.compressed()
    assert small.factor.shape[-1] <= max(gaussian.factor.shape[-1], C)
    torch.testing.assert_close(small.covariance(), gaussian.covariance(), rtol=1e-5, atol=1e-5)
    if small.residual is None and small.factor.shape[-1] == C:
        noise = small.sample(64) - small.mean  # more pairs than dimensions: exact moments
        second = torch.einsum("snc,snd->ncd", noise, noise) / 64
        torch.testing.assert_close(second, small.covariance(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", [None, "diagonal", "blocks"])
def test_probabilities_are_the_softmax_of_the_draws(residual):
    generator = torch.Generator().manual_seed(0)
    n, c, k = 6, 3, 4
    root = torch.randn(n, c, c, generator=generator)
    extra = {None: None, "diagonal": root.square().sum(-1), "blocks": root @ root.mT}[residual]
    mean, factor = (torch.randn(n, c, *s, generator=generator) for s in ((), (k,)))
    gaussian = LogitGaussian(mean, factor, extra)
    draws = gaussian.sample(32, seed=1)
    assert draws.shape == (32, n, c)
    torch.testing.assert_close(gaussian.draws(32, seed=1).softmax(1).mT, draws.softmax(-1))


def test_only_what_is_wider_than_the_outputs_is_compressed():
    """A (c, c) factor where k is above c; c = 1000 never needs one."""
    g = torch.Generator().manual_seed(0)
    mean, wide, narrow = (torch.randn(3, 5, *s, generator=g) for s in ((), (9,), (2,)))
    found = LogitGaussian(mean, wide, mean.square()).compressed()
    assert found.factor.shape == (3, 5, 5)
    assert found.residual is None
    gaussian = LogitGaussian(mean, narrow, mean.square())
    assert gaussian.compressed() is gaussian
