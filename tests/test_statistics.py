"""Draws against closed forms, and intervals that cover as often as they say.

Seeds are fixed, so a test that passes passes always; chosen at random, each would fail a right
library with the probability `FALSE_ALARM`.
"""

import math

import pytest
import torch
from torch import nn

from ella import ELLA, Bernoulli, LastLayer, LogitGaussian, Normal

FALSE_ALARM = 1e-3
CHI_SQUARE_9 = 27.88
"""The 1 - FALSE_ALARM quantile of χ² with 9 degrees of freedom, of ten bins."""
Z = 3.29
"""The same of |N(0, 1)|."""
BINS = 10


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# Draws


@pytest.mark.parametrize("k", [2, 12], ids=["many outputs", "few outputs"])
@pytest.mark.parametrize("form", ["none", "diag", "blocks", "outside"])
def test_draws_have_the_closed_form_covariance(form, k, generator):
    """Averages over seeds of so few draws that their moments are not made exact."""
    c, seeds, draws = 4, 2000, 4
    factor, root = normal(1, c, k, generator=generator), normal(1, c, c, generator=generator)
    residual = {"diag": root[..., 0].square(), "blocks": root @ root.mT}.get(form)
    outside = torch.tensor([0.7], dtype=torch.float64) if form == "outside" else None
    gaussian = LogitGaussian(normal(1, c, generator=generator), factor, residual, outside)
    expected = factor[0] @ factor[0].T
    if residual is not None:
        expected = expected + (torch.diag(residual[0]) if form == "diag" else residual[0])
    if outside is not None:
        expected = expected + outside * torch.eye(c)
    apart = torch.stack([gaussian.sample(draws, s)[:, 0] - gaussian.mean for s in range(seeds)])
    products = torch.einsum("sdi,sdj->sij", apart, apart) / draws
    error = products.std(0) / math.sqrt(seeds)
    entries = c * (c + 1) // 2
    assert ((products.mean(0) - expected).abs() / error).max() < Z + math.log(entries) / Z
    assert apart.mean(1).abs().max() < 1e-12  # pairs that cancel


# Simulation-based calibration


def chi_square(ranks):
    """Of ranks in [0, 1) against a uniform distribution."""
    counts = torch.histc(ranks, BINS, 0, 1)
    expected = len(ranks) / BINS
    return ((counts - expected).square() / expected).sum().item()


def coverage_error(z, share):
    """By how many standard errors the central interval of a share covers too much or little."""
    half = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor((1 + share) / 2))
    covered = (z.abs() < half).double().mean().item()
    return abs(covered - share) / math.sqrt(share * (1 - share) / len(z))


def linear_model(weights):
    model = nn.Linear(len(weights), 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(weights)
    return model


def simulated(truth, map_estimate, likelihood, *, replicates, n, d, precision, **options):
    """True outputs at an input, standardised by the posterior, and their ranks among draws."""
    g = torch.Generator().manual_seed(1)
    scores, ranks = [], []
    for seed in range(replicates):
        x, w = normal(n, d, generator=g), normal(d, generator=g) / math.sqrt(precision)
        y, test = truth(x @ w, g), normal(1, d, generator=g)
        model = linear_model(map_estimate(x, y))
        ella = ELLA(
            model,
            likelihood=likelihood,
            eigenfunctions=LastLayer("none"),
            prior_precision=precision,
            progress=False,
            seed=seed,
            **options,
        ).fit([(x[: n // 2], y[: n // 2]), (x[n // 2 :], y[n // 2 :])])
        gaussian = ella.gaussian(test)
        output = test @ w
        scores.append(((output - gaussian.mean[0]) / gaussian.variance()[0].sqrt()).item())
        # Draws of one seed are not independent (pairs that cancel), so one draw of each seed.
        draws = torch.stack([gaussian.sample(1, 1000 * seed + s)[0, 0, 0] for s in range(19)])
        ranks.append(((draws < output).sum() + torch.rand(1, generator=g)).item() / 20)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(ranks, dtype=torch.float64)


def check_calibrated(scores, ranks):
    uniform = torch.distributions.Normal(0.0, 1.0).cdf(scores)
    assert chi_square(uniform) < CHI_SQUARE_9
    assert chi_square(ranks) < CHI_SQUARE_9
    for share in (0.5, 0.9):
        assert coverage_error(scores, share) < Z


def test_linear_regression_is_calibrated():
    """Where linearized Laplace is exact."""
    precision, noise = 2.0, 0.3

    def truth(f, g):
        return (f + math.sqrt(noise) * normal(len(f), generator=g)).unsqueeze(1)

    def ridge(x, y):
        matrix = x.T @ x / noise + precision * torch.eye(x.shape[1], dtype=torch.float64)
        return torch.linalg.solve(matrix, x.T @ y[:, 0] / noise)

    scores, ranks = simulated(
        truth, ridge, Normal(noise), replicates=300, n=8, d=4, precision=precision
    )
    check_calibrated(scores, ranks)
    # The test has power: a standard deviation off by two fifths is noticed, either way.
    assert coverage_error(scores / 1.4, 0.5) > Z
    assert coverage_error(scores * 1.4, 0.5) > Z


def test_logistic_regression_is_nearly_calibrated():
    """Where the posterior is nearly normal, as there are many examples."""
    precision = 1.0

    def truth(f, g):
        return (torch.rand(f.shape, generator=g, dtype=torch.float64) < f.sigmoid()).double()

    def newton(x, y):
        w = torch.zeros(x.shape[1], dtype=torch.float64)
        eye = precision * torch.eye(x.shape[1], dtype=torch.float64)
        for _ in range(20):
            p = (x @ w).sigmoid()
            hessian = (x.T * (p * (1 - p))) @ x + eye
            w = w - torch.linalg.solve(hessian, x.T @ (p - y) + precision * w)
        return w

    scores, ranks = simulated(
        truth, newton, Bernoulli(), replicates=300, n=120, d=3, precision=precision
    )
    check_calibrated(scores, ranks)
    assert coverage_error(scores / 1.4, 0.5) > Z
    assert coverage_error(scores * 1.4, 0.5) > Z
