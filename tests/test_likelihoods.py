"""Likelihoods against derivatives and integrals of their own densities (float64)."""

import itertools
import math

import pytest
import torch
from own_likelihoods import Ordinal, Poisson
from torch import nn

from ella import Bernoulli, Categorical, LaplaceBridge, LogitGaussian, MonteCarlo, Normal, Probit
from ella.likelihoods import as_likelihood

N, C, K = 6, 3, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=1):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


CASES = {
    "categorical": (Categorical(), C, integers(C, N)),
    "weighted": (Categorical(class_weights=(1.0, 3.0, 0.5), ignore_index=-1), C, integers(C, N)),
    "bernoulli": (Bernoulli(), C, integers(2, N, C)),
    "binary": (Bernoulli(), 1, integers(2, N)),
    "normal": (Normal(), C, normal(N, C, seed=2)),
    "poisson": (Poisson(), C, integers(4, N, C)),
    "ordinal": (Ordinal(), 1, integers(4, N)),
}


@pytest.fixture(params=CASES)
def case(request):
    likelihood, c, y = CASES[request.param]
    return likelihood, normal(N, c, seed=3), likelihood.check(y, c)


def gaussian_of(outputs, scale=0.7, residual=False):
    n, c = outputs.shape
    extra = scale * normal(n, c, seed=5).square() if residual else None
    return LogitGaussian(outputs, scale * normal(n, c, K, seed=4), extra)


def test_curvature_is_the_second_derivative_of_the_density(case):
    likelihood, outputs, y = case
    phi = normal(N, outputs.shape[1], K, seed=6)
    rows = likelihood.whitened(outputs, phi)
    for i in range(N):
        if isinstance(likelihood, Ordinal):  # the expected one
            p = likelihood.response(outputs[i], -1)
            at = [torch.tensor([j]) for j in range(len(p))]
            hessian = sum(p[j] * negative_hessian(likelihood, outputs[i], at[j]) for j in range(4))
        else:
            hessian = negative_hessian(likelihood, outputs[i], y[i : i + 1])
        expected = phi[i].T @ hessian @ phi[i]
        torch.testing.assert_close(rows[i].T @ rows[i], expected, rtol=1e-9, atol=1e-12)


def negative_hessian(likelihood, f, y):
    return -torch.func.hessian(lambda f: likelihood.log_density(f.unsqueeze(0), y)[0])(f)


def test_densities_are_densities(case):
    """Discrete ones sum to 1 over all that can be observed; the normal is torch's."""
    likelihood, outputs, y = case
    if isinstance(likelihood, Normal):
        expected = torch.distributions.Normal(outputs, 1.0).log_prob(y).sum(-1)
        torch.testing.assert_close(likelihood.log_density(outputs, y), expected)
        return
    if isinstance(likelihood, Poisson):
        values = [torch.tensor([v]) for v in itertools.product(range(30), repeat=1)]
        f = outputs[:1, :1]
        total = sum(likelihood.log_density(f, v.double()).exp().item() for v in values)
        assert total == pytest.approx(1, abs=1e-9)
        return
    if isinstance(likelihood, Bernoulli):
        values = [torch.tensor([v]).double() for v in itertools.product((0, 1), repeat=y.shape[1])]
    else:
        width = likelihood.response(outputs[:1], -1).shape[1]
        values = [torch.tensor([v]) for v in range(width)]
    for f in outputs.split(1):
        total = sum(likelihood.log_density(f, v).exp().item() for v in values)
        assert total == pytest.approx(1, abs=1e-9)


def test_responses_are_the_same_along_any_axis(case):
    likelihood, outputs, _ = case
    draws = normal(5, *outputs.shape, seed=7)  # (s, n, c)
    expected = likelihood.response(draws, -1)
    torch.testing.assert_close(likelihood.response(draws.mT, 1).mT, expected)


@pytest.mark.parametrize("residual", [False, True])
def test_losses_average_densities_over_the_gaussian(case, residual):
    """Against many independent draws; at T = 0 the density itself."""
    likelihood, outputs, y = case
    gaussian = gaussian_of(outputs, residual=residual)
    losses = likelihood.losses(gaussian, y, MonteCarlo(20_000))
    draws = gaussian.tempered(0.5, 1.3).sample(100_000, seed=9)
    if isinstance(likelihood, Normal):
        variance = 1.3 * (1 + 0.5 * gaussian.variance())
        density = torch.distributions.Normal(outputs, variance.sqrt()).log_prob(y).sum(-1)
    elif isinstance(likelihood, Bernoulli):  # of each label on its own, as `predict_proba` says
        ones = draws.sigmoid().mean(0)
        density = torch.where(y > 0.5, ones, 1 - ones).log().sum(-1)
    else:
        density = likelihood.log_density(draws, y).logsumexp(0) - math.log(len(draws))
    weights = likelihood.weights(y)
    weights = torch.ones(N) if weights is None else weights / weights.mean()
    exact = isinstance(likelihood, Normal)
    near = {"rtol": 1e-9, "atol": 1e-9} if exact else {"rtol": 0.03, "atol": 0.02}
    torch.testing.assert_close(losses(0.5, 1.3), -density * weights, **near)
    at_zero = -likelihood.log_density(outputs / 1.3, y)
    if isinstance(likelihood, Normal):
        at_zero = -torch.distributions.Normal(outputs, 1.3**0.5).log_prob(y).sum(-1)
    torch.testing.assert_close(losses(0.0, 1.3), at_zero * weights)


def test_sums_give_the_density_at_any_scale(case):
    likelihood, outputs, y = case
    parts = [likelihood.statistics(outputs[i], y[i]) for i in (slice(2), slice(2, N))]
    for scale in (0.3, 1.0, 4.0):
        found = likelihood.log_likelihood(sum(parts), scale)
        density = likelihood.log_density(outputs, y)
        if isinstance(likelihood, Normal):
            density = torch.distributions.Normal(outputs, scale**0.5).log_prob(y).sum(-1)
        weights = likelihood.weights(y)
        expected = (density if weights is None else density * weights).sum().item()
        assert found == pytest.approx(expected)


def test_weights_are_torchs():
    outputs, y = normal(N, C), integers(C, N)
    y[0] = -100
    weights = torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    likelihood = Categorical(class_weights=weights, ignore_index=-100)
    y = likelihood.check(y, C)
    losses = likelihood.losses(LogitGaussian(outputs, outputs.unsqueeze(-1)), y, MonteCarlo(8))
    expected = nn.functional.cross_entropy(outputs, y, weights, ignore_index=-100)
    assert losses(0.0, 1.0).mean().item() == pytest.approx(expected.item())
    assert likelihood.num_counted(y) == N - 1
    assert losses(1.0, 1.0)[0] == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_label_smoothing_is_torchs(smoothing):
    outputs, y = normal(N, C), integers(C, N)
    found = Categorical(label_smoothing=smoothing).statistics(outputs, y).item()
    expected = nn.functional.cross_entropy(
        outputs, y, label_smoothing=smoothing, reduction="sum"
    ).item()
    assert found == pytest.approx(-expected)


def test_decisions():
    probs = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    assert Categorical().decide(probs).tolist() == [1, 0]
    assert Bernoulli().decide(probs).tolist() == [[0, 0, 0], [1, 0, 0]]
    assert torch.equal(Normal().decide(probs), probs)


@pytest.mark.parametrize("link", [MonteCarlo(64), Probit()], ids=["mc", "probit"])
def test_one_logit_is_two_classes(link):
    """sigmoid(f) is the softmax of (0, f), whatever the Gaussian."""
    one = gaussian_of(normal(N, 1))
    zeros = torch.zeros(N, 1, dtype=torch.float64)
    two = LogitGaussian(
        torch.cat([zeros, one.mean], 1),
        torch.cat([torch.zeros(N, 1, K, dtype=torch.float64), one.factor], 1),
    )
    if isinstance(link, MonteCarlo):
        draws = two.sample(200_000, seed=1).softmax(-1).mean(0)[:, 1:]
        torch.testing.assert_close(
            Bernoulli().predictive(one, MonteCarlo(200_000)), draws, rtol=0, atol=5e-3
        )
    else:
        variance = one.variance()
        expected = (one.mean / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
        torch.testing.assert_close(Bernoulli().predictive(one, link), expected)


# Scores


def test_scores_of_normals_are_entropies():
    outputs = normal(N, C)
    gaussian = gaussian_of(outputs)
    scores = Normal().uncertainty(gaussian, gaussian, MonteCarlo(), 0.5)
    total = torch.distributions.Normal(outputs, (gaussian.variance() + 0.5).sqrt()).entropy()
    noise = torch.distributions.Normal(outputs, 0.5**0.5).entropy()
    torch.testing.assert_close(scores.entropy, total.sum(-1))
    torch.testing.assert_close(scores.mutual_information, (total - noise).sum(-1))
    assert scores.energy is None
    assert scores.confidence_deficit is None


def test_scores_of_independent_labels_add_up():
    outputs = normal(N, C)
    whole = Bernoulli().uncertainty(*[gaussian_of(outputs)] * 2, Probit(), 1.0)
    factor = gaussian_of(outputs).factor
    parts = [LogitGaussian(outputs[:, [j]], factor[:, [j]]) for j in range(C)]
    each = [Bernoulli().uncertainty(part, part, Probit(), 1.0) for part in parts]
    torch.testing.assert_close(whole.entropy, sum(s.entropy for s in each))
    torch.testing.assert_close(whole.energy, sum(s.energy for s in each))
    deficits = torch.stack([s.confidence_deficit for s in each])
    torch.testing.assert_close(whole.confidence_deficit, deficits.mean(0))
    torch.testing.assert_close(whole.energy, -outputs.exp().log1p().sum(-1))


def test_information_is_what_the_draws_disagree_on(case):
    likelihood, outputs, _ = case
    if not hasattr(likelihood, "entropy"):
        return
    gaussian, link = gaussian_of(outputs), MonteCarlo(64, seed=2)
    draws = gaussian.compressed().sample(64, seed=2)
    each = likelihood.entropy(likelihood.response(draws, -1))
    total = likelihood.entropy(likelihood.response(draws, -1).mean(0))
    scores = likelihood.uncertainty(gaussian, gaussian, link, 1.0)
    torch.testing.assert_close(scores.mutual_information, total - each.mean(0))
    assert (scores.mutual_information > 0).all()


# Bad input


@pytest.mark.parametrize(
    ("likelihood", "y", "error", "message"),
    [
        (Categorical(), torch.tensor([0, 3]), ValueError, r"must lie in 0..2"),
        (Categorical(), torch.tensor([0.0, 1]), TypeError, "must be integers"),
        (Categorical(), torch.tensor([True, False]), TypeError, "must be integers"),
        (Categorical(ignore_index=-1), torch.tensor([-1, -2]), ValueError, r"must lie in 0..2"),
        (
            Categorical((1.0, 2.0)),
            torch.tensor([0, 1]),
            ValueError,
            "one number for each",
        ),
        (Bernoulli(), torch.tensor([0, 1]), ValueError, r"must have shape \(n, 3\)"),
        (Bernoulli(), torch.full((2, 3), 0.5), ValueError, "must be 0 or 1"),
        (Bernoulli(), torch.full((2, 3), math.nan), ValueError, "must be 0 or 1"),
        (Normal(), torch.zeros(2, 2), ValueError, r"must have shape \(n, 3\)"),
        (Normal(), torch.zeros(2, 3).long(), TypeError, "must be floating point"),
        (Normal(), torch.full((2, 3), math.inf), ValueError, "NaN or infinite"),
    ],
)
def test_bad_targets(likelihood, y, error, message):
    with pytest.raises(error, match=message):
        likelihood.check(y, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Categorical(class_weights=(1.0, 0.0)), "`class_weights` must be finite numbers"),
        (lambda: Categorical(class_weights=()), "`class_weights` must be finite numbers"),
        (lambda: Categorical(label_smoothing=1.0), r"`label_smoothing` must lie in \[0, 1\)"),
        (lambda: Normal(noise_variance=-1.0), "`noise_variance` must be a finite number above 0"),
        (lambda: as_likelihood("poisson"), "`likelihood` must be one of .*got 'poisson'"),
        (lambda: as_likelihood("classification", 0.5), '`noise_variance` is for likelihood="reg'),
        (
            lambda: Bernoulli().check_link(LaplaceBridge()),
            "LaplaceBridge is no link for",
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_shorthand():
    assert as_likelihood("classification") == Categorical()
    assert as_likelihood("binary") == as_likelihood("multilabel") == Bernoulli()
    assert as_likelihood("regression", 0.5) == Normal(0.5)
    own = Poisson()
    assert as_likelihood(own) is own
