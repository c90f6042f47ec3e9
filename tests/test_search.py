"""What is searched, where a search starts, and what follows from what it found."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases import loader_of, make_inputs, make_labels, make_model

from ella import (
    ELLA,
    Bernoulli,
    Categorical,
    Hyperparameters,
    LastLayer,
    LogitGaussian,
    ModelChangedError,
    MonteCarlo,
    NeuralEF,
    Normal,
    Nystrom,
    Probit,
    Training,
)
from ella.calibrate import LOG_ODDS, NEGLIGIBLE, SHIFTED_WEIGHT, Point, Search, precision_grid
from ella.hyperprior import REACH, Hyperprior, compass, log_sum, means
from ella.likelihoods import Spreads
from ella.posterior import GaussianPosterior, LaplaceEvaluation, TrainingSums

pytestmark = pytest.mark.filterwarnings("ignore:calibrate:")

X, Y, TEST = make_inputs("mlp", 24), make_labels(24), make_inputs("mlp", 6, 9)
VAL = loader_of(make_inputs("mlp", 15, 5), make_labels(15, 6))
TARGETS = torch.randn(24, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
SHORT = Training(steps=8, batch_size=16)
NEURAL = NeuralEF(3, num_inputs=48, width=8, num_directions=12, teacher=SHORT)


def make(**options):
    options = {"eigenfunctions": Nystrom(4, 20), "progress": False, **options}
    return ELLA(make_model("mlp"), **options)


def fitted(**options):
    return make(**options).fit(loader_of(X, Y))


def regression(**options):
    return make(likelihood="regression", **options).fit(loader_of(X, TARGETS))


# Constants, as they are documented and were measured


def test_the_grid_runs_from_a_deviation_of_30_to_one_of_003():
    grid = precision_grid(7.0)
    assert len(grid) == 15
    assert math.sqrt(7.0 / grid[0]) == pytest.approx(30)
    assert math.sqrt(7.0 / grid[-1]) == pytest.approx(0.03)
    ratios = [b / a for a, b in itertools.pairwise(grid)]
    assert ratios == pytest.approx([ratios[0]] * 14)


def test_hyperpriors_are_those_that_were_measured():
    assert Spreads() == Spreads(0.5, 0.25, 0.15)
    assert Normal().spreads == Spreads(math.inf, 2.0, 3.0)
    assert pytest.approx(30) == math.exp(REACH)
    assert (LOG_ODDS, NEGLIGIBLE, SHIFTED_WEIGHT) == (1.0, 12.0, 0.03)


# The hyperprior


def test_the_hyperprior_is_a_normal_and_its_lattice_integrates():
    """Of a quadratic loss the posterior is normal, and all is known."""
    prior = Hyperprior((0.3, -0.2), (0.5, 0.8), 10)
    density = torch.distributions.Normal(torch.tensor(prior.origin), torch.tensor(prior.spreads))
    logs = (0.7, 0.4)
    expected = -density.log_prob(torch.tensor(logs)).sum().item() - prior.log_normaliser
    assert 10 * prior.penalty(logs) == pytest.approx(expected, abs=1e-5)
    assert prior.penalty(prior.origin) == 0

    def nll(logs):
        return 0.5 * (logs[0] - 1.0) ** 2 + 0.1 * (logs[1] + 1.0) ** 2

    precisions = (10 * 1.0 + 0.5**-2, 10 * 0.2 + 0.8**-2)
    mean = (
        (10 * 1.0 + 0.3 * 0.5**-2) / precisions[0],
        (-10 * 0.2 - 0.2 * 0.8**-2) / precisions[1],
    )
    mode = compass(lambda logs: nll(logs) + prior.penalty(logs), prior.origin, prior.origin)
    assert mode == pytest.approx(mean, abs=0.06)
    widths = prior.widths(nll, mean)
    assert widths == pytest.approx([p**-0.5 for p in precisions], rel=1e-6)
    lattice = prior.lattice(nll, mean, widths)
    assert len(lattice) == 25
    assert max(abs(a - m) for (a, _), _ in lattice for m in mean[:1]) == pytest.approx(
        2 * widths[0]
    )
    assert means(lattice) == pytest.approx(mean, abs=1e-9)
    least = 10 * (nll(mean) + prior.penalty(mean))
    integral = math.log(2 * math.pi) + sum(map(math.log, widths)) - least
    assert log_sum(lattice) == pytest.approx(integral, abs=0.12)  # of two deviations each side


def test_a_search_starts_at_a_temperature_of_one_and_the_initial_scale():
    logits, y = data()
    expected = Hyperprior((0.0, 0.0), (0.25, 0.15), 40)
    assert search(Categorical(), y, logits)._hyperprior == expected
    other = search(Normal(), logits, logits, initial_scale=0.2)._hyperprior
    assert other == Hyperprior((0.0, math.log(0.2)), (2.0, 3.0), 40)


# Edges


def search(likelihood, y, mean, variance=1.0, **options):
    n, c = mean.shape

    def gaussian_at(precision):
        factor = torch.diag_embed(torch.full((n, c), variance / precision).double().sqrt())
        return LogitGaussian(mean, factor)

    return Search(gaussian_at, likelihood, y, MonteCarlo(32), **options)


def data(n=40, scale=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(n, 3, generator=g, dtype=torch.float64)
    return logits, torch.distributions.Categorical(logits=logits / scale).sample()


def asked(found, precisions, chosen):
    return found._edges(chosen, precisions)


@pytest.mark.parametrize("end", ["low", "high"])
def test_edges_are_where_the_likelihood_is_no_worse(end):
    """Each name by itself: the other hyperparameters are as chosen."""
    logits, y = data()
    found, grid = search(Categorical(), y, logits), precision_grid(1.0)
    middle = Point(1.0, 1.0, 1.0, 0.0)  # so low a loss that no end reaches it
    assert asked(found, grid, middle) == ()
    everything = replace(middle, nll=1e9)
    assert asked(found, grid, everything) == (
        "prior_precision",
        "temperature",
        "logit_temperature",
    )
    assert asked(found, grid, replace(everything, temperature=0.0)) == ("logit_temperature",)
    # Between the losses at the two ends of one of them: only the better end can name it.
    at = 0 if end == "low" else -1
    losses = [found._nll_at(grid[i])((0.0, 0.0)) for i in (0, -1)]
    level = losses[at] * (1 + 1e-9)
    names = asked(found, grid, replace(middle, nll=level))
    assert ("prior_precision" in names) == (min(losses) <= level)


def test_every_end_is_asked():
    """What fits one class for sure asks for no temperature, noise for all of it."""
    logits, _ = data(scale=3.0)
    grid = precision_grid(1.0)
    right, wrong = logits.argmax(1), logits.argmin(1)
    for y, name in ((right, "logit_temperature"), (wrong, "logit_temperature")):
        found = search(Categorical(), y, logits)
        ends = [found._objective(1.0)(0.0, math.exp(s * REACH)) for s in (-1, 1)]
        chosen = Point(1.0, 0.0, 1.0, found._objective(1.0)(0.0, 1.0))
        assert (min(ends) <= chosen.nll) == (name in asked(found, grid, chosen))
        assert name in asked(found, grid, chosen)
    for y in (right, wrong):
        found = search(Categorical(), y, logits)
        nll = found._nll_at(1.0)
        chosen = Point(1.0, 1.0, 1.0, nll((0.0, 0.0)))
        ends = [nll((end, 0.0)) for end in (-REACH, REACH)]
        assert ("temperature" in asked(found, grid, chosen)) == (min(ends) <= chosen.nll)
        losses = [found._nll_at(p)((0.0, 0.0)) for p in (grid[0], grid[-1])]
        expected = min(losses) <= chosen.nll
        assert ("prior_precision" in asked(found, grid, chosen)) == expected


# Points, in the user's terms


def test_points_become_hyperparameters():
    point = Point(6.0, 0.5, 2.0, 1.0)
    assert point.hyperparameters(Categorical()) == Hyperparameters(6.0, 0.5, 2.0)
    expected = Hyperparameters(3.0, 0.5, noise_variance=2.0)
    assert point.hyperparameters(Normal()) == expected
    assert expected.unit_precision(Normal()) == 6.0


def test_precision_beside_the_grid_moves_into_the_temperature():
    logits, y = data()
    found, grid = search(Categorical(), y, logits), [1.0, 10.0, 100.0]
    point = found._point((0.8, 0.1, 0.2), grid, math.log(10))
    assert point.precision == 10.0
    assert math.log(point.temperature) == pytest.approx(0.1 + 0.2 * math.log(10))
    assert math.log(point.scale) == pytest.approx(0.2)
    # T/δ, which is what the variance follows, is that of the means.
    ratio = 0.1 - 0.8 * math.log(10)
    assert math.log(point.temperature / point.precision) == pytest.approx(ratio)


def test_penalties_of_the_precision():
    logits, y = data(40)
    found, grid = search(Categorical(), y, logits), [1.0, 10.0, 100.0]
    assert found._penalty(1, grid) == 0
    assert found._penalty(0, grid) == pytest.approx(found._penalty(2, grid))
    assert found._penalty(2, grid) == pytest.approx((math.log(10) / 0.5) ** 2 / 80)
    integral = 0.5 * math.sqrt(2 * math.pi)
    assert found._log_normaliser(grid) == pytest.approx(math.log(integral))
    other = search(Normal(), torch.zeros(40, 3).double(), logits)
    assert other._log_normaliser(grid) == pytest.approx(math.log(math.log(100)))


# Regression: where it starts, and what the noise variance does


def test_regression_starts_at_the_residuals_and_a_temperature_of_one():
    ella = regression()
    residuals = TARGETS - ella.logits(X)[0]
    expected = residuals.square().mean().item()
    assert ella.hyperparameters.noise_variance == pytest.approx(expected)
    assert ella.hyperparameters.temperature == 1.0
    assert ella.hyperparameters.logit_temperature == 1.0
    given = regression(noise_variance=0.7, temperature=2.0)
    assert given.hyperparameters.noise_variance == 0.7
    assert given.hyperparameters.temperature == 2.0


def test_added_data_weigh_as_those_before_whatever_the_noise_variance():
    """After `calibrate` all are weighed by the calibrated noise variance, old ones as new ones."""
    ella = regression()
    fitted_noise = ella.hyperparameters.noise_variance
    once = ella.curvature * fitted_noise
    ella.hyperparameters = replace(ella.hyperparameters, noise_variance=10 * fitted_noise)
    torch.testing.assert_close(ella.curvature, once / (10 * fitted_noise))
    ella.partial_fit(loader_of(X, TARGETS))
    torch.testing.assert_close(ella.curvature, 2 * once / (10 * fitted_noise))
    assert ella.hyperparameters.noise_variance == 10 * fitted_noise
    _, covariance = ella.logits(TEST)
    prior = ella.features(TEST)
    precision = ella.hyperparameters.prior_precision
    inner = torch.linalg.inv(ella.curvature + precision * torch.eye(4, dtype=torch.float64))
    residual = torch.diag_embed(prior.residual) / precision
    expected = prior.factor @ inner @ prior.factor.mT + residual
    torch.testing.assert_close(covariance, expected)


def test_losses_of_regression_are_normal_densities():
    g = torch.Generator().manual_seed(0)
    mean, y = (torch.randn(5, 2, generator=g, dtype=torch.float64) for _ in range(2))
    gaussian = LogitGaussian(mean, torch.randn(5, 2, 3, generator=g, dtype=torch.float64))
    variance = 0.3 * (1 + 0.5 * gaussian.variance())
    expected = -torch.distributions.Normal(mean, variance.sqrt()).log_prob(y).sum(-1)
    torch.testing.assert_close(Normal().losses(gaussian, y, Probit())(0.5, 0.3), expected)


# No posterior, and closed-form links


@pytest.mark.parametrize("link", ["mc", "probit", "bridge"])
def test_without_a_posterior_links_have_nothing_to_approximate(link):
    ella = fitted()
    ella.hyperparameters = Hyperparameters(1.0, 0.0, 2.0)
    expected = (ella.network(TEST) / 2).softmax(-1)
    torch.testing.assert_close(ella.predict_proba(TEST, link=link), expected)
    assert torch.equal(ella.predict(TEST), expected.argmax(-1))


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_losses_without_a_posterior_are_those_of_the_mean(likelihood):
    logits, y = data()
    y = y if isinstance(likelihood, Categorical) else torch.nn.functional.one_hot(y, 3).double()
    gaussian = LogitGaussian(logits, torch.ones(40, 3, 2).double())
    expected = -likelihood.log_density(logits / 2.0, y)
    for link in (MonteCarlo(8), Probit()):
        torch.testing.assert_close(likelihood.losses(gaussian, y, link)(0.0, 2.0), expected)


# What a file must restore


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical((1.0, 2.0, 3.0), 7, 0.1)])
def test_likelihoods_come_back(likelihood, tmp_path):
    y = torch.nn.functional.one_hot(Y).double() if likelihood == Bernoulli() else Y
    ella = make(likelihood=likelihood).fit(loader_of(X, y))
    ella.save(tmp_path / "file")
    again = ELLA.load(tmp_path / "file", ella.model, progress=False)
    assert again.likelihood == likelihood
    assert torch.equal(again.predict_proba(TEST), ella.predict_proba(TEST))


def test_a_buffer_that_changed_refuses_the_file(tmp_path):
    model = make_model("conv")
    x = make_inputs("conv", 24)
    ella = ELLA(model, eigenfunctions=LastLayer(), progress=False).fit(loader_of(x, Y))
    ella.save(tmp_path / "file")
    model[1].running_mean += 0.1
    with pytest.raises(ValueError, match="was saved for another model"):
        ELLA.load(tmp_path / "file", model)


# Sums


@pytest.mark.parametrize(
    ("name", "lowest"),
    [
        *((name, 1e-300) for name in ("prior_precision", "logit_temperature")),
        *((name, 1e-300) for name in ("noise_variance", "typical_norm")),
        *((name, 0.0) for name in ("temperature", "distance_scale", "norm_exponent")),
    ],
)
def test_hyperparameters_out_of_their_range_are_refused(name, lowest):
    plain = {"prior_precision": 1.0}
    assert getattr(Hyperparameters(**{**plain, name: lowest}), name) == lowest
    bad = [-1.0, math.nan, math.inf, "1", *([0.0] if lowest else [])]
    for value in bad:
        with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
            Hyperparameters(**{**plain, name: value})


def test_the_distance_term_is_the_fourth_power_beside_the_posterior():
    """N(f, φ(G + δI)⁻¹φᵀ + R/δ + s·D⁴), s untouched by T and δ."""
    g = torch.Generator().manual_seed(0)
    mean, phi = (torch.randn(3, 2, *s, generator=g).double() for s in ((), (4,)))
    posterior = GaussianPosterior.from_curvature(torch.eye(4, dtype=torch.float64))
    distance = torch.tensor([0.5, 1.0, 2.0]).double()
    evaluation = LaplaceEvaluation(LogitGaussian(mean, phi, mean.square()), posterior, distance)
    chosen = Hyperparameters(3.0, 0.5, distance_scale=0.1)
    found = chosen.gaussian(evaluation.gaussian, Categorical()).variance()
    expected = 0.5 * (phi.square().sum(-1) / 4 + mean.square() / 3)
    torch.testing.assert_close(found, expected + 0.1 * distance.unsqueeze(1) ** 4)


def test_sums_of_data_add_up_and_come_out_again():
    g = torch.Generator().manual_seed(0)
    prior = LogitGaussian(*(torch.randn(9, 3, *s, generator=g).double() for s in ((), (4,))))
    likelihood = Categorical((1.0, 2.0, 3.0))
    y = torch.arange(9) % 3
    whole = TrainingSums.of(prior, y, likelihood)
    parts = [TrainingSums.of(prior.rows(s), y[s], likelihood) for s in (slice(4), slice(4, 9))]
    total = parts[0] + parts[1]
    torch.testing.assert_close(total.curvature, whole.curvature)
    torch.testing.assert_close(total.statistics, whole.statistics)
    assert total.prior_variance == pytest.approx(whole.prior_variance)
    assert (total.num_examples, whole.scaled(2.0).num_examples) == (9, 18)
    left = whole - parts[1]
    torch.testing.assert_close(left.curvature, parts[0].curvature)
    p = prior.mean.softmax(-1)
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    weights = torch.tensor(likelihood.class_weights).double()[y]
    expected = torch.einsum("nck,n,ncd,ndl->kl", prior.factor, weights, hessian, prior.factor)
    torch.testing.assert_close(whole.curvature, expected)
    mean = prior.factor.square().sum(-1).mean(1).sum().item()
    assert whole.prior_variance == pytest.approx(mean)
    assert whole.unit_precision() == pytest.approx(mean / 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda g: g.triu(), "symmetric"), (lambda g: -g, "no eigenvalue below 0")],
)
def test_a_curvature_that_is_none_is_refused(change, message):
    sums = fitted().partial_fit(loader_of(X, Y))._fitted().sums
    state = replace(sums, curvature=change(sums.curvature)).state()
    with pytest.raises(ValueError, match=message):
        TrainingSums.restore(state)
    assert TrainingSums.restore(sums.state()).num_examples == 48


def test_data_come_in_fade_and_leave():
    ella = fitted(prior_precision=2.0, temperature=3.0, logit_temperature=1.5)
    assert ella.hyperparameters == Hyperparameters(2.0, 3.0, 1.5)
    once, count = ella.curvature, ella._fitted().sums.num_examples
    ella.partial_fit(loader_of(X, Y))
    torch.testing.assert_close(ella.curvature, 2 * once)
    ella.forget(loader_of(X, Y))
    torch.testing.assert_close(ella.curvature, once)
    assert ella._fitted().sums.num_examples == count
    torch.testing.assert_close(ella.decay(0.25).curvature, once / 4)
    free = fitted()
    prior = free.features(X).variance().mean().item()
    assert free.hyperparameters.prior_precision == pytest.approx(prior)


def test_evidence_is_laplaces_formula():
    """log p(D | θ) − ½(δ‖θ‖² + log det(G/sδ + I)), for classes and for numbers."""
    for ella, y in ((fitted(), Y), (regression(noise_variance=0.5), TARGETS)):
        outputs, scale = ella.network(X), ella.hyperparameters.scale(ella.likelihood)
        own = ella.likelihood.statistics(outputs, y)
        g, eye = ella._fitted().sums.curvature, torch.eye(4, dtype=torch.float64)
        dispersion = ella.likelihood.dispersion(scale)
        norm = sum(p.square().sum().item() for p in ella.model.parameters())
        occam = torch.logdet(g / (dispersion * 2.0) + eye).item()
        density = ella.likelihood.log_likelihood(own, scale)
        expected = density - 0.5 * (2.0 * norm + occam)
        assert ella.log_marginal_likelihood(2.0) == pytest.approx(expected)


def test_what_no_longer_fits_is_said():
    ella = fitted().calibrate(VAL)
    with torch.no_grad():
        ella.model[0].weight[0, 0] += 1e-3
    with pytest.raises(ModelChangedError):
        ella.predict_proba(TEST)
    ella.fit(loader_of(X, Y))
    assert (ella.tuning, ella.link) == (None, None)
    with pytest.warns(UserWarning, match="calibrate was given training data"):
        ella.calibrate(loader_of(X, Y))


# Seeds


def test_the_seed_reaches_all_that_is_random():
    """Not the draws of a prediction alone: rows, networks, samples, scores, files."""
    for method in (Nystrom(4, 20), NEURAL):
        one, same, other = (fitted(eigenfunctions=method, seed=s) for s in (1, 1, 2))
        assert torch.equal(one.features(TEST).factor, same.features(TEST).factor)
        assert torch.equal(one.curvature, same.curvature)
        assert not torch.allclose(one.features(TEST).factor, other.features(TEST).factor)
        assert not torch.allclose(one.curvature, other.curvature)
    first = fitted(eigenfunctions=LastLayer(), seed=1)  # nothing random is learned
    second = fitted(eigenfunctions=LastLayer(), seed=2)
    assert torch.equal(first.curvature, second.curvature)
    draws = [ella.sample_logits(TEST, 4) for ella in (first, second)]
    scores = [ella.uncertainty(TEST).mutual_information for ella in (first, second)]
    rows = torch.arange(6)
    seen = [ella.evaluated([TEST]).predict_proba(rows) for ella in (first, second)]
    for one, other in (draws, scores, seen):
        assert not torch.allclose(one, other)
    assert torch.equal(seen[0], first.predict_proba(TEST))
    assert torch.equal(first.sample_logits(TEST, 4), draws[0])


def test_calibrate_keeps_its_seed_and_so_do_files(tmp_path):
    ella = fitted(seed=5).calibrate(VAL, n_samples=16)
    assert ella.link == MonteCarlo(16, 5)
    ella.save(tmp_path / "file")
    again = ELLA.load(tmp_path / "file", ella.model, progress=False)
    assert again.seed == 5
    assert again.link == ella.link
    assert torch.equal(again.sample_logits(TEST, 3), ella.sample_logits(TEST, 3))


def test_edges_are_reported_and_warned_of():
    """Labels that follow from the logits: the sharper, the better."""
    logits, _ = data(60, 2.0)
    tuning = search(Categorical(), logits.argmax(1), logits).run(precision_grid(1.0))
    assert "logit_temperature" in tuning.edges
    assert "60 validation examples" in tuning.warning
    assert f"({tuning.hyperparameters.logit_temperature:.3g})" in tuning.warning
    ella = fitted()
    answer = [(TEST, ella.logits(TEST)[0].argmax(1))]
    with pytest.warns(UserWarning, match=r"calibrate: 6 validation examples"):
        ella.calibrate(answer)
