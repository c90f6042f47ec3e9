"""Many classes as the most probable and groups of others, against all of them in float64."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ella import ELLA, LastLayer, NeuralEF
from ella.likelihoods import Categorical, categorical
from ella.links import MonteCarlo, Probit
from ella.lognormal import log_sum_moments
from ella.lumped import Lumped
from ella.posterior import GaussianPosterior, LaplaceEvaluation
from ella.predictive import LogitGaussian
from ella.spectral import Training

N, C, K = 6, 12, 4
LINK = MonteCarlo(4000)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def make_gaussian(*, noise=1.0, outside=False, n=N, c=C, scale=1.0):
    residual = noise * normal(n, c, seed=1).square() if noise else None
    v = 0.3 * normal(n, seed=2).square() if outside else None
    factor = scale * normal(n, c, K, seed=3)
    return LogitGaussian(2 * normal(n, c, seed=4), factor, residual, v)


def parts(gaussian):
    """All that it is, what follows from the rest included."""
    names = ("mean", "factor", "residual", "outside", "classes", "others", "logits", "noise")
    return {name: getattr(gaussian, name) for name in names}


def reference(gaussian, num_samples=200_000):
    """Averages of softmax over independent draws of all logits, one example at a time."""
    found = []
    for mean, covariance in zip(gaussian.mean, gaussian.covariance(), strict=True):
        root = torch.linalg.cholesky(covariance + 1e-12 * torch.eye(len(mean)))
        draws = mean + normal(num_samples, len(mean), seed=5) @ root.T
        found.append(draws.softmax(-1).mean(0))
    return torch.stack(found)


@pytest.fixture
def many(monkeypatch):
    """Few classes that count as many."""
    monkeypatch.setattr(categorical, "MANY_CLASSES", 8)
    monkeypatch.setattr(categorical, "KEPT_CLASSES", 5)
    monkeypatch.setattr(categorical, "GROUPS", 3)


# Laws


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("noise", [0.0, 1.0, 20.0])
@pytest.mark.parametrize(("count", "groups"), [(C - 1, 1), (7, C - 7), (7, 100)])
def test_with_a_class_a_group_nothing_is_approximate(count, groups, noise, outside):
    gaussian = make_gaussian(noise=noise, outside=outside)
    lumped = Lumped.of(gaussian, count, groups)
    order = torch.cat([lumped.classes, lumped.others], 1)
    for found, expected in (
        (lumped.settled().mean, gaussian.mean),
        (lumped.variance(), gaussian.variance()),
    ):
        torch.testing.assert_close(found, expected.gather(1, order), rtol=1e-4, atol=1e-4)
    covariance = torch.stack(
        [s[i][:, i] for s, i in zip(gaussian.covariance(), order, strict=True)]
    )
    torch.testing.assert_close(lumped.covariance(), covariance, rtol=1e-4, atol=1e-4)
    probs = LINK(gaussian)
    torch.testing.assert_close(lumped.spread(probs.gather(1, order)), probs)


def test_probabilities_are_near_those_of_all_logits_and_sum_to_one():
    gaussian = make_gaussian(noise=0.2, scale=0.2)
    lumped = Lumped.of(gaussian, 6)
    probs = lumped.spread(LINK(lumped))
    torch.testing.assert_close(probs.sum(1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(probs, reference(gaussian), rtol=0, atol=0.01)


def test_independent_noise_averages_out_over_many_others():
    n, c, r = 3, 2000, 1.5
    mean = torch.zeros(n, c, dtype=torch.float64)
    mean[:, 0] = math.log(c)
    noise = torch.full((n, c), r, dtype=torch.float64)
    noise[:, 0] = 0.0
    lumped = Lumped.of(LogitGaussian(mean, mean.new_zeros(n, c, 0), noise), 1)
    expected = mean.new_tensor([math.log(c), math.log(c - 1) + r / 2]).expand(n, 2)
    torch.testing.assert_close(lumped.mean, expected, rtol=0, atol=2e-3)
    assert (lumped.variance()[:, 1] < 0.01).all()
    draws = mean[0, 1:] + r**0.5 * normal(4000, c - 1)
    sums = draws.logsumexp(1)
    torch.testing.assert_close(lumped.mean[0, 1], sums.mean(), rtol=0, atol=5e-3)
    torch.testing.assert_close(lumped.variance()[0, 1], sums.var(), rtol=0.2, atol=0)


def test_the_factor_of_the_rest_is_the_gradient_of_their_log_sum():
    gaussian = make_gaussian(noise=0)
    lumped = Lumped.of(gaussian, 4, 3)  # of 3, 3 and 2
    for i in range(N):
        for j, others in enumerate(lumped.others[i].split(3)):
            f = gaussian.mean[i, others].clone().requires_grad_()
            f.logsumexp(0).backward()
            expected = f.grad @ gaussian.factor[i, others]
            torch.testing.assert_close(lumped.factor[i, 4 + j], expected)
            torch.testing.assert_close(lumped.mean[i, 4 + j], f.detach().logsumexp(0))


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (2.5, 0.7), (0.0, 1.3)])
def test_tempering_is_building_anew(outside, temperature, scale):
    gaussian = make_gaussian(outside=outside)
    found = Lumped.of(gaussian, 5, 3).tempered(temperature, scale)
    expected = Lumped.of(gaussian.tempered(temperature, scale), 5, 3, scale=scale)
    for one, other in zip(parts(found).values(), parts(expected).values(), strict=True):
        torch.testing.assert_close(one, other)
    draws = Lumped.of(gaussian, 5, 3).drawn(100, 0)(temperature, scale)
    torch.testing.assert_close(draws, expected.draws(100))


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_norms_are_those_of_all_logits(noise):
    """The last group of five others in threes has a place that is empty."""
    gaussian = make_gaussian(noise=noise, outside=True)
    full = gaussian.normalised(0.5, 2.0)
    for groups in (2, 100):
        lumped = Lumped.of(gaussian, 7, groups)
        torch.testing.assert_close(lumped.norm(), gaussian.norm())
        found, expected = parts(lumped.normalised(0.5, 2.0)), parts(Lumped.of(full, 7, groups))
        exact = found if groups == 100 else ("logits", "noise", "outside", "classes", "others")
        for name in exact:
            if expected[name] is not None:
                torch.testing.assert_close(found[name], expected[name])
        torch.testing.assert_close(found["factor"][:, :7], expected["factor"][:, :7])


def test_conditioning_and_widening_are_building_anew():
    gaussian, whitening = make_gaussian(outside=True), normal(K, K, seed=9)
    found = Lumped.of(gaussian, 5, 3).widened(0.4)
    expected = Lumped.of(gaussian.widened(0.4), 5, 3)
    torch.testing.assert_close(parts(found), parts(expected))
    assert Lumped.of(gaussian, 5, 3).widened(0.0).outside is None
    plain = replace(gaussian, outside=None)
    found = Lumped.of(plain, 5, 3).conditioned(whitening, 3.0)
    torch.testing.assert_close(
        parts(found), parts(Lumped.of(plain.conditioned(whitening, 3.0), 5, 3))
    )


def test_labels_are_always_among_the_classes():
    gaussian = make_gaussian()
    y = gaussian.mean.argmin(1)
    lumped = Lumped.of(gaussian, 3, y=y)
    assert (lumped.classes == y.unsqueeze(1)).sum(1).tolist() == [1] * N
    assert torch.equal(lumped.classes.gather(1, lumped.position_of(y)[:, None])[:, 0], y)
    assert torch.equal(lumped.classes[:, 1:], gaussian.mean.topk(2, 1).indices)
    with pytest.raises(ValueError, match="must be among"):
        Lumped.of(gaussian, 3).position_of(y)


def test_rows_and_parts_are_those_of_the_whole():
    lumped = Lumped.of(make_gaussian(outside=True), 5, 3)
    again = Lumped.joined([lumped.rows(slice(2)), lumped.rows(torch.tensor([2, 3, 4, 5]))])
    assert isinstance(lumped.rows(slice(2)), Lumped)
    assert lumped.mean is lumped.mean
    with pytest.raises(AttributeError):
        _ = lumped.other
    torch.testing.assert_close(parts(copy.deepcopy(lumped)), parts(lumped), rtol=0, atol=0)
    torch.testing.assert_close(parts(again), parts(lumped), rtol=0, atol=0)


def test_log_sums_of_log_normal_variables():
    for n, r in ((1, 4.0), (1, 400.0), (10, 4.0), (300, 0.5), (300, 9.0)):
        drawn = (r**0.5 * normal(20_000, n)).logsumexp(1)
        mean, variance = log_sum_moments(
            torch.zeros(1, n).double(), torch.full((1, n), r).double()
        )
        error = (drawn.var().item() / len(drawn)) ** 0.5
        assert mean.item() == pytest.approx(drawn.mean().item(), abs=4 * error + 5e-3)
        assert variance.item() == pytest.approx(drawn.var().item(), rel=0.1)
    f = normal(2, 5)
    mean, variance = log_sum_moments(f, torch.zeros_like(f))
    torch.testing.assert_close(mean, f.logsumexp(1))
    assert not variance.any()
    padded = torch.cat([f, torch.full((2, 3), -torch.inf)], 1)
    r = torch.tensor([0.5, 1.0, 1.5, 2.0, 2.5, 0.0, 0.0, 0.0]).double().expand(2, 8)
    found = log_sum_moments(padded, r)
    torch.testing.assert_close(found, log_sum_moments(f, r[:, :5]))
    drawn = (f[0] + r[0, :5].sqrt() * normal(20_000, 5)).logsumexp(1)
    assert found[0][0].item() == pytest.approx(drawn.mean().item(), abs=0.1)


# In the likelihood


@pytest.mark.parametrize("outside", [False, True])
def test_losses_are_logs_of_the_probabilities(many, outside):
    gaussian, likelihood = make_gaussian(outside=outside), Categorical()
    y = gaussian.mean.argmin(1)
    losses = likelihood.losses(gaussian, y, LINK)
    for temperature, scale in ((1.0, 1.0), (0.5, 1.4), (0.0, 2.0)):
        tempered = Lumped.of(gaussian, 5, 3, y=y).tempered(temperature, scale)
        probs = tempered.spread(LINK(tempered))
        expected = -probs.gather(1, y[:, None])[:, 0].log()
        torch.testing.assert_close(losses(temperature, scale), expected, rtol=1e-8, atol=1e-10)
    if not outside:
        expected = F.cross_entropy(gaussian.mean / 2, y, reduction="none")
        torch.testing.assert_close(losses(0.0, 2.0), expected)


def test_ignored_and_weighted_labels(many):
    gaussian = make_gaussian()
    y = torch.tensor([0, 11, -1, 3, 4, 5])
    likelihood = Categorical(class_weights=[1.0, *[2.0] * (C - 1)], ignore_index=-1)
    losses = likelihood.losses(gaussian, y, LINK)(1.0, 1.0)
    plain = Categorical().losses(gaussian, y.clamp(0), LINK)(1.0, 1.0)
    weights = torch.tensor([1.0, 2.0, 0.0, 2.0, 2.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(losses, plain * weights * N / weights.sum())


def test_scores_are_those_of_all_logits_where_they_can_be(many, monkeypatch):
    gaussian = make_gaussian(noise=0.2, scale=0.2).tempered(1.0, 0.8)
    found = Categorical().uncertainty(gaussian, gaussian, LINK, 0.8)
    monkeypatch.setattr(categorical, "MANY_CLASSES", C)
    full = Categorical().uncertainty(gaussian, gaussian, LINK, 0.8)
    for name in ("logit_variance", "energy", "corrected_energy", "max_logit_p_norm"):
        torch.testing.assert_close(getattr(found, name), getattr(full, name), rtol=0, atol=0)
    for name in ("entropy", "mutual_information", "confidence_deficit"):
        torch.testing.assert_close(getattr(found, name), getattr(full, name), rtol=0, atol=0.06)


def test_who_sees_all_logits(many):
    gaussian, likelihood = make_gaussian(), Categorical()
    blocks = replace(gaussian, residual=torch.diag_embed(gaussian.residual))
    few = make_gaussian(c=8)
    assert likelihood.condensed(gaussian, Probit()) is gaussian
    assert likelihood.condensed(blocks, LINK) is blocks
    assert likelihood.condensed(few, LINK) is few
    lumped = likelihood.condensed(gaussian, LINK)
    assert isinstance(lumped, Lumped)
    assert likelihood.condensed(lumped, LINK) is lumped
    nothing = Lumped.of(LogitGaussian(gaussian.mean, gaussian.mean.new_zeros(N, C, 0)), 5)
    torch.testing.assert_close(likelihood.predictive(nothing, LINK), gaussian.mean.softmax(-1))


def test_a_condensed_evaluation_gives_what_its_gaussian_condensed_gives(many):
    prior = make_gaussian()
    root = normal(K, K, seed=7)
    posterior = GaussianPosterior.from_curvature(root @ root.T)
    distance = normal(N, seed=8).abs()
    evaluation = LaplaceEvaluation(prior, posterior, distance)

    def how(gaussian):
        return Categorical().condensed(gaussian, LINK)

    condensed = evaluation.condensed(how)
    assert condensed.prior_variance() == pytest.approx(evaluation.prior_variance())
    assert condensed.prior.factor.shape == (N, 8, K)
    found, expected = condensed.gaussian(0.7), how(evaluation.gaussian(0.7))
    torch.testing.assert_close(parts(found.widened(0.5)), parts(expected.widened(0.5)))
    halves = [condensed.rows(slice(3)), condensed.rows(slice(3, None))]
    again = LaplaceEvaluation.joined(halves)
    torch.testing.assert_close(parts(again.gaussian(0.7)), parts(condensed.gaussian(0.7)))
    assert again.prior_variance() == pytest.approx(evaluation.prior_variance())


# In an estimator


SHORT = Training(steps=20, batch_size=32)
NEURAL = NeuralEF(rank=4, num_inputs=48, num_directions=16, width=8, teacher=SHORT)


@pytest.fixture(scope="module", params=["neural", "last layer"])
def fitted(request):
    method = {"neural": NEURAL, "last layer": LastLayer()}[request.param]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 140))
    x, y = torch.randn(64, 5), torch.randint(140, (64,))
    loader = [(x[:32], y[:32]), (x[32:], y[32:])]
    return ELLA(model, eigenfunctions=method, progress=False).fit(loader), x, y


def test_predictions_with_many_classes(fitted):
    ella, x, _ = fitted
    probs = ella.predict_proba(x, n_samples=2000)
    torch.testing.assert_close(probs.sum(1), torch.ones(64))
    assert torch.equal(ella.predict(x), ella.predict_proba(x).argmax(1))
    full = MonteCarlo(2000)(ella.gaussian(x))
    torch.testing.assert_close(probs, full, rtol=0, atol=0.02)
    assert ella.gaussian(x).mean.shape == (64, 140)
    single = torch.cat([ella.predict_proba(each) for each in x[:4].split(1)])
    torch.testing.assert_close(single, ella.predict_proba(x)[:4], rtol=1e-4, atol=1e-7)
    scores = ella.uncertainty(x)
    probs = ella.predict_proba(x).double()
    torch.testing.assert_close(
        scores.entropy.double(), -torch.xlogy(probs, probs).sum(1), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(scores.confidence_deficit, 1 - ella.predict_proba(x).amax(1))


@pytest.mark.filterwarnings("ignore:calibrate")
def test_calibration_keeps_few_rows_of_many(fitted, monkeypatch):
    ella, _, _ = fitted
    x, y = torch.randn(70, 5), torch.randint(140, (70,))
    kept = []
    whole = LaplaceEvaluation.joined.__func__

    def joined(cls, pieces):
        kept.append([piece.prior for piece in pieces])
        return whole(cls, pieces)

    monkeypatch.setattr(LaplaceEvaluation, "joined", classmethod(joined))
    before = ella.hyperparameters
    ella.calibrate([(x[:40], y[:40]), (x[40:], y[40:])], n_samples=16)
    assert all(prior.factor.shape[1] == 64 + 8 for prior in kept[0])
    assert ella.tuning.map_nll == pytest.approx(F.cross_entropy(ella.model(x), y).item(), rel=1e-5)
    ella.hyperparameters = before


def test_a_wide_network_has_a_bottleneck_and_comes_back(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 300))
    x = torch.randn(48, 5)
    short = Training(steps=10, batch_size=16)
    method = NeuralEF(rank=60, num_inputs=48, num_directions=80, width=16, teacher=short)
    ella = ELLA(model, eigenfunctions=method, progress=False).fit([(x, torch.arange(48))])
    assert ella._fit.eigenfunctions.basis.network.bottleneck == 128
    path = tmp_path / "ella.safetensors"
    ella.save(path)
    again = ELLA.load(path, model, progress=False)
    assert torch.equal(again.predict_proba(x), ella.predict_proba(x))
    found = ella.predictive_module(2000)(x)[0]  # draws of all logits
    torch.testing.assert_close(found, ella.predict_proba(x, n_samples=2000), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("shape", "given", "expected"),
    [((300, 60), 128, 128), ((300, 60), None, None), ((250, 64), 128, None), ((10, 64), 9, None)],
)
def test_only_wide_networks_have_a_bottleneck(shape, given, expected):
    made = NeuralEF(bottleneck=given)._built_in(5, shape, torch.Generator())
    assert made.bottleneck == expected
    with pytest.raises(ValueError, match="`bottleneck` must be a whole number"):
        NeuralEF(bottleneck=0)
