"""The search: against quadrature, on small validation sets, and what it leaves for scores."""

import math
from dataclasses import replace

import pytest
import torch
from cases import train
from sklearn.datasets import load_digits
from torch import nn

from ella import (
    ELLA,
    Categorical,
    Hyperparameters,
    LastLayer,
    LogitGaussian,
    MonteCarlo,
    Normal,
    Nystrom,
    Probit,
)
from ella.baselines import MAP, TemperatureScaling
from ella.calibrate import REACH, Search, compass, precision_grid
from ella.metrics import auroc, negative_log_likelihood

N, C, K = 40, 3, 4
QUIET = {"progress": False}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(probs, seed):
    """Labels with these probabilities; `torch.multinomial` differs from version to version."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(probs), 1, generator=generator, dtype=torch.float64)
    return (probs.double().cumsum(1) < uniform).sum(1).clamp_max(probs.shape[1] - 1)


class Prior:
    """κ/δ as it is: a posterior that no data have narrowed."""

    def __init__(self, n=N, sharpness=1.5, seed=0):
        self.mean = sharpness * normal(n, C, seed=seed)
        self.factor = normal(n, C, K, seed=seed + 1) / K**0.5
        # Labels of a noisier model: what calibration has to find.
        noise = torch.einsum("nck,nk->nc", self.factor, normal(n, K, seed=seed + 3))
        self.y = drawn(((self.mean + noise) / 1.2).softmax(-1), seed + 2)

    def gaussian_at(self, precision):
        return LogitGaussian(self.mean, self.factor / precision**0.5)

    def search(self, link=None, **options):
        return Search(self.gaussian_at, Categorical(), self.y, link or Probit(), **options)


def moments(logs, log_weights):
    weights = (log_weights - log_weights.logsumexp(0)).exp()
    return [(weights * log).sum().item() for log in logs], log_weights.logsumexp(0).item()


@pytest.mark.parametrize("n", [6, 40, 400])
def test_temperature_scaling_is_the_posterior_mean(n):
    """Of log τ, and its evidence, against quadrature over a fine grid."""
    prior = Prior(n)
    _, belief = prior.search().without_posterior(1.0)
    logs = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    spread = Categorical.spreads.scale
    density = torch.distributions.Normal(0.0, spread).log_prob(logs)
    nll = torch.stack(
        [nn.functional.cross_entropy(prior.mean / t.exp(), prior.y, reduction="sum") for t in logs]
    )
    (mean,), evidence = moments([logs], density - nll + math.log(6 / 6000))
    assert math.log(belief.mean.scale) == pytest.approx(mean, abs=0.01)
    assert belief.log_evidence == pytest.approx(evidence, abs=0.06)
    assert belief.mean.temperature == 0


@pytest.mark.parametrize("n", [6, 40, 400])
@pytest.mark.parametrize("moved", [1.0, 2.5])  # grids on which the best δ lies in between, too
def test_the_posterior_is_the_posterior_mean(n, moved):
    """Of (log δ, log T, log τ), against quadrature; T/δ, as here they act together."""
    prior = Prior(n)
    grid = [moved * precision for precision in precision_grid(1.0)]
    belief = prior.search().with_posterior(grid)
    spreads = Categorical.spreads
    logs, weights = [], []
    taus = torch.linspace(-1, 1, 81, dtype=torch.float64)
    temperatures = torch.linspace(-2.5, 2.5, 51, dtype=torch.float64)
    for precision in grid:
        gaussian = prior.gaussian_at(precision)
        for log_t in temperatures:
            variance = log_t.exp() * gaussian.variance()
            for log_tau in taus:
                scaled = prior.mean / log_tau.exp()
                f = scaled / (1 + math.pi / 8 * variance / log_tau.exp() ** 2).sqrt()
                nll = nn.functional.cross_entropy(f, prior.y, reduction="sum")
                log_d = math.log(precision) - 0.5 * math.log(grid[0] * grid[-1])
                logs.append((log_d, log_t.item(), log_tau.item()))
                squares = (
                    (log_d / spreads.precision) ** 2
                    + (log_t / spreads.temperature) ** 2
                    + (log_tau / spreads.scale) ** 2
                )
                weights.append(-nll.item() - squares.item() / 2)
    columns = torch.tensor(logs, dtype=torch.float64).T
    means, evidence = moments(columns, torch.tensor(weights, dtype=torch.float64))
    cell = math.log(grid[1] / grid[0]) * 0.1 * 0.025
    norm = (2 * math.pi) ** 1.5 * spreads.precision * spreads.temperature * spreads.scale
    found = belief.mean
    centre = 0.5 * math.log(grid[0] * grid[-1])
    assert math.log(found.scale) == pytest.approx(means[2], abs=0.01)
    ratio = math.log(found.temperature) - (math.log(found.precision) - centre)
    assert ratio == pytest.approx(means[1] - means[0], abs=0.12)
    assert belief.log_evidence == pytest.approx(evidence + math.log(cell / norm), abs=0.1)
    assert found.precision in grid


def test_large_validation_sets_find_the_best_point():
    prior = Prior(4000)
    search = prior.search(MonteCarlo(64))
    point = search.with_posterior(precision_grid(1.0)).mean
    # What 4,000 labels tell of a variance.
    assert point.temperature / point.precision == pytest.approx(1.0, rel=0.6)
    assert point.scale == pytest.approx(1.2, abs=0.12)
    others = [
        search._nll_at(point.precision)((math.log(point.temperature) + t, s))
        for t in (-0.5, 0, 0.5)
        for s in (math.log(point.scale) + d for d in (-0.1, 0, 0.1))
    ]
    assert point.nll <= min(others) + 1e-3


def test_compass_search_finds_the_least_of_a_bowl():
    def bowl(at):
        return (at[0] - 1.3) ** 2 + (at[0] + at[1]) ** 2

    found = compass(bowl, (0.0, 0.0), (0.0, 0.0))
    assert found == pytest.approx((1.3, -1.3), abs=0.1)
    far = compass(lambda at: -at[0], (0.0,), (0.0,))
    assert far == pytest.approx((REACH,))


def test_regression_finds_noise_and_variance():
    """Residuals whose variance is σ²(1 + T·S) with S known: 3,000 of them."""
    spread = normal(3000, 1, 2, seed=1).square()
    variance = 0.3 * (1 + 0.5 * spread.square().sum(-1))
    y = variance.sqrt() * normal(3000, 1, seed=2)
    mean = torch.zeros(3000, 1, dtype=torch.float64)

    def gaussian_at(precision):
        return LogitGaussian(mean, spread / precision**0.5)

    grid = precision_grid(spread.square().sum(-1).mean().item())
    tuning = Search(gaussian_at, Normal(), y, MonteCarlo(), initial_scale=1.0).run(grid)
    found = tuning.hyperparameters
    assert found.noise_variance == pytest.approx(0.3, rel=0.12)
    unit = found.prior_precision * found.noise_variance
    assert found.temperature / unit == pytest.approx(0.5, rel=0.3)


# Small validation sets


@pytest.fixture(scope="module")
def digits():
    """A net trained on 200 digits, as in the README; the rest is for validation and test."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x).float() / 16, torch.tensor(y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    train(model, x[:200], y[:200], steps=100, rate=1e-2)
    return model, [(x[:200], y[:200])], x[200:], y[200:]


MAKERS = {
    "temperature scaling": lambda m: TemperatureScaling(m, **QUIET),
    "nystrom": lambda m: ELLA(m, eigenfunctions=Nystrom(20, 200), **QUIET),
    "last layer": lambda m: ELLA(m, eigenfunctions=LastLayer(), residual="none", **QUIET),
}


@pytest.mark.filterwarnings("ignore:calibrate. ")
@pytest.mark.parametrize("kind", MAKERS)
def test_a_few_validation_examples_never_ruin_a_model(digits, kind):
    """20 draws each of 5, 10, 20 and 50: test NLL at most 1.1 times the model's own."""
    model, train, x, y = digits
    known = MAKERS[kind](model).fit(train).evaluated([(x, y)])
    test = torch.arange(800, len(y))
    plain = negative_log_likelihood(model(x[test]).softmax(-1).detach(), y[test])
    for n in (5, 10, 20, 50):
        for seed in range(20):
            rows = torch.randperm(800, generator=torch.Generator().manual_seed(seed))[:n]
            tuned = known.copied().calibrate([(rows, y[rows])])
            nll = negative_log_likelihood(tuned.predict_proba(test), y[test])
            assert nll <= 1.1 * plain, (n, seed)


@pytest.mark.parametrize("kind", MAKERS)
def test_labels_that_say_nothing_of_the_temperature_are_reported(digits, kind):
    """27 examples, all classified right: alone they would sharpen without end."""
    model, train, x, y = digits
    right = (model(x).argmax(1) == y).nonzero().squeeze(1)[:27]
    method = MAKERS[kind](model).fit(train)
    with pytest.warns(UserWarning, match=r"27 validation examples alone would put .*logit temp"):
        method.calibrate([(x[right], y[right])])
    assert 0.5 < method.hyperparameters.logit_temperature < 1.5
    assert "logit_temperature" in method.tuning.edges


def test_the_other_end_is_reported_too(digits):
    """All classified wrong: no temperature is high enough."""
    model, train, x, _ = digits
    method = TemperatureScaling(model, **QUIET).fit(train)
    wrong = (model(x[:27]).argmax(1) + 1) % 10
    with pytest.warns(UserWarning, match=r"alone would put the logit temperature"):
        method.calibrate([(x[:27], wrong)])


@pytest.mark.parametrize(("sharpness", "certain"), [(8, True), (0.3, False)])
def test_a_variance_at_either_end_is_reported(sharpness, certain):
    """Labels for which any variance hurts, or for which none is enough: δ and T alike."""
    prior = Prior(60, sharpness=sharpness)
    prior.mean = sharpness * prior.mean
    prior.y = prior.mean.argmax(1) if certain else prior.mean.argmin(1)
    search = prior.search()
    grid = precision_grid(1.0)
    found = search._edges(search.with_posterior(grid).mean, grid)
    assert {"prior_precision", "temperature"} <= set(found)


def test_nothing_is_reported_where_the_data_settle_it():
    prior = Prior(4000)
    tuning = prior.search(MonteCarlo(64)).run(precision_grid(1.0))
    assert tuning.hyperparameters.temperature > 0
    assert tuning.edges == ()


def test_one_misclassified_example_in_ten_moves_the_variance_little():
    """A hyperprior twice as wide lets it multiply the variance by 5."""
    mean = 10 * nn.functional.one_hot(torch.arange(10) % C, C).double()
    y = torch.arange(10) % C
    y[0] = 1
    factor = normal(10, C, K) / K**0.5

    def gaussian_at(precision):
        return LogitGaussian(mean, factor / precision**0.5)

    grid = precision_grid(1.0)
    point = Search(gaussian_at, Categorical(), y, MonteCarlo(64)).with_posterior(grid).mean
    assert 1 < point.temperature / point.precision < 2
    assert 1 < point.scale < 1.3


# What predicts is what was tuned


def model_and_data(n=400):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, C)).double()
    with torch.no_grad():
        model[2].weight.mul_(4)
    x = normal(n, 4, seed=3)
    return model, x, drawn(model(x).softmax(-1).detach(), seed=4)


@pytest.mark.filterwarnings("ignore:calibrate was given training data")
@pytest.mark.parametrize(
    ("link", "n_samples"),
    [("mc", 16), ("probit", 64), ("bridge", 64), (Probit(), 64), (MonteCarlo(8, seed=5), 64)],
)
def test_link_and_draws_of_calibrate_predict(link, n_samples):
    model, x, y = model_and_data()
    ella = ELLA(model, eigenfunctions=Nystrom(8, 100), **QUIET).fit([(x, y)])
    before = ella.predict_proba(x)
    torch.testing.assert_close(before, ella.predict_proba(x, link="mc", n_samples=128))
    ella.calibrate([(x, (y + (x[:, 0] > 1)) % C)], link=link, n_samples=n_samples)
    ella.hyperparameters = ella.tuning.posterior  # without a posterior all links are the same
    expected = ella.predict_proba(x, link=link, n_samples=n_samples)
    assert torch.equal(ella.predict_proba(x), expected)
    assert torch.equal(ella.predict(x), expected.argmax(-1))
    entropy = -torch.xlogy(expected, expected).sum(-1)
    torch.testing.assert_close(ella.uncertainty(x).entropy, entropy)
    other = "probit" if link == "mc" else "mc"
    assert not torch.equal(ella.predict_proba(x, link=other), expected)
    if isinstance(link, MonteCarlo):
        more = ella.predict_proba(x, n_samples=99)
        assert torch.equal(more, ella.predict_proba(x, link=MonteCarlo(99, seed=5)))
    if link == "mc":
        more = ella.predict_proba(x, n_samples=99)
        assert torch.equal(more, ella.predict_proba(x, link="mc", n_samples=99))
    ella.fit([(x, y)])
    torch.testing.assert_close(ella.predict_proba(x), before)


@pytest.mark.filterwarnings("ignore:calibrate. ")
def test_scores_of_the_weights_live_where_probabilities_need_none():
    """Always right, and more so away from the data: any variance is bad for the probabilities."""
    model, x, y = model_and_data()
    ella = ELLA(model, eigenfunctions=LastLayer(), **QUIET).fit([(x[:200], y[:200])])
    away = 3 * x
    ella.calibrate([(away, model(away).argmax(1))])
    chosen, best = ella.hyperparameters, ella.tuning.posterior
    assert chosen.temperature == 0
    assert best.temperature > 0
    probs = ella.predict_proba(x)
    torch.testing.assert_close(probs, (model(x) / chosen.logit_temperature).softmax(-1).detach())
    scores = ella.uncertainty(x)
    torch.testing.assert_close(scores.entropy, -torch.xlogy(probs, probs).sum(-1))
    torch.testing.assert_close(scores.confidence_deficit, 1 - probs.amax(-1))
    ella.hyperparameters = best
    wide = ella.uncertainty(x)
    assert torch.equal(scores.mutual_information, wide.mutual_information)
    assert torch.equal(scores.logit_variance, wide.logit_variance)
    far = 6 * normal(500, 4, seed=8)
    ella.hyperparameters = chosen
    assert auroc(scores.logit_variance, ella.uncertainty(far).logit_variance) > 0.8


def test_without_a_posterior_there_is_nothing_to_fall_back_on(digits):
    model, train, x, _ = digits
    scores = MAP(model, **QUIET).fit(train).uncertainty(x)
    assert torch.equal(scores.logit_variance, torch.zeros(len(x)))


def test_hyperparameters_are_checked():
    good = Hyperparameters(1.0)
    assert replace(good, temperature=0.0).temperature == 0
    for name in ("prior_precision", "logit_temperature", "noise_variance"):
        for value in (0.0, -1.0, math.nan, math.inf, "1", True):
            with pytest.raises(ValueError, match=f"`{name}` must be a finite number above 0"):
                replace(good, **{name: value})
