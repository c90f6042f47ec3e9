"""The distance term against its formula, and what it must do to predictions."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from ella import ELLA, Distance, LastLayer, LogitGaussian, NeuralEF, Nystrom, Probit, Training
from ella.calibrate import Search
from ella.distance import HIGHEST, ActivationDistance, ActivationSums
from ella.likelihoods import Categorical
from ella.links import MonteCarlo
from ella.scores import max_logit_p_norm

CLASSES = 3
NEURAL = NeuralEF(rank=3, num_inputs=40, num_directions=12, width=8, teacher=Training(steps=30))
METHODS = {"neural": NEURAL, "nystrom": Nystrom(3, 12), "last layer": LastLayer()}
QUIET = {"progress": False}
pytestmark = pytest.mark.filterwarnings("ignore:calibrate")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(x):
    return (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()


def batches(x, y=None, size=16):
    y = labels(x) if y is None else y
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            *(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU()), nn.Linear(10, CLASSES)
        ).double()
        optimizer = torch.optim.Adam(net.parameters(), 0.03)
        x = normal(80, 4)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), labels(x)).backward()
            optimizer.step()
    return net.eval()


def fitted(model, method=NEURAL, distance=Distance(), **options):  # noqa: B008 - frozen
    ella = ELLA(model, eigenfunctions=method, distance=distance, **QUIET, **options)
    x = normal(80, 4)
    y = x[:, :CLASSES] if options.get("likelihood") == "regression" else None
    return ella.fit(batches(x, y))


def test_distance_by_the_formula():
    """Mean over stages of (z − μ)ᵀ(C + ε)⁻¹(z − μ)/dim, in units of standard deviations."""
    stages = [normal(50, 5) @ normal(5, 5, seed=1), 3 + normal(50, 7, seed=2) * torch.arange(1, 8)]
    new = [normal(6, 5, seed=3), normal(6, 7, seed=4)]
    found = ActivationDistance(ActivationSums.of(stages), 0.01)(new)
    expected = torch.zeros(6, dtype=torch.float64)
    for z, at in zip(stages, new, strict=True):
        units, mean = z.std(0, correction=0), z.mean(0)
        scaled = (z - mean) / units
        matrix = scaled.T @ scaled / 50 + 0.01 * torch.eye(z.shape[1])
        for i, row in enumerate((at - mean) / units):
            expected[i] += row @ torch.linalg.solve(matrix, row) / z.shape[1] / 2
    torch.testing.assert_close(found, expected)


def test_merged_sums_give_the_same():
    z = [normal(50, 5), normal(50, 3, seed=1)]
    whole = ActivationSums.of(z)
    parts = ActivationSums.of([s[:20] for s in z]) + ActivationSums.of([s[20:] for s in z])
    new = [normal(4, 5, seed=2), normal(4, 3, seed=3)]
    expected = ActivationDistance(whole, 0.01)(new)
    torch.testing.assert_close(ActivationDistance(parts, 0.01)(new), expected)
    torch.testing.assert_close(ActivationDistance(parts.scaled(0.3), 0.01)(new), expected)
    back = whole + ActivationSums.of(new) + ActivationSums.of(new).scaled(-1)
    torch.testing.assert_close(ActivationDistance(back, 0.01)(new), expected)
    restored = ActivationSums.restore(whole.state())
    assert torch.equal(ActivationDistance(restored, 0.01)(new), expected)


def test_units_and_origins_do_not_matter():
    z, new = [normal(60, 4)], [normal(5, 4, seed=1)]
    expected = ActivationDistance(ActivationSums.of(z), 0.01)(new)
    scale, shift = torch.tensor([1e-3, 5.0, -2.0, 1e3]), torch.tensor([7.0, -1.0, 0.0, 10.0])
    moved, other = ([s * scale + shift for s in stages] for stages in (z, new))
    found = ActivationDistance(ActivationSums.of(moved), 0.01)(other)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_without_a_ridge_no_affine_map_matters():
    z, new, a = [normal(60, 4)], [normal(5, 4, seed=1)], normal(4, 4, seed=2)
    expected = ActivationDistance(ActivationSums.of(z), 1e-12)(new)
    found = ActivationDistance(ActivationSums.of([z[0] @ a]), 1e-12)([new[0] @ a])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_what_never_moved_counts_in_the_units_of_the_others():
    z = torch.cat([2 * normal(60, 3), torch.full((60, 1), 5.0, dtype=torch.float64)], dim=1)
    distance = ActivationDistance(ActivationSums.of([z]), 0.01)
    inside, outside = z[:1].clone(), z[:1].clone()
    outside[:, 3] += 2 * 6
    moved = distance([outside]) - distance([inside])
    assert 0.5 * 36 / 4 < moved < 2 * 36 / 4
    assert torch.isfinite(distance([z])).all()


def test_over_the_training_data_it_is_one_less_what_activations_do_not_span(model):
    ella = fitted(model)
    stages = ella._fit.features.stages(normal(80, 4))
    spanned = [torch.linalg.matrix_rank(z - z.mean(0)).item() / z.shape[1] for z in stages]
    expected = sum(spanned) / len(spanned)
    assert 0.6 * expected < ella._fit.distance(stages).mean().item() < expected


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_features_are_read_in_one_pass_or_in_two(model, method):
    ella = fitted(model, method)
    x = normal(7, 4, seed=5)
    prior, stages = ella._fit.features(x)
    for found, expected in zip(stages, ella._fit.features.stages(x), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(prior.factor, ella.features(x).factor)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_variance_beside_that_of_the_weights(model, method):
    ella = fitted(model, method)
    x = normal(9, 4, seed=5)
    without = ella.gaussian(x)
    assert without.outside is None  # until `calibrate` has set a scale
    ella.hyperparameters = replace(
        ella.hyperparameters, distance_scale=0.3, temperature=2.0, logit_temperature=1.5
    )
    d = ella._fit.distance(ella._fit.features.stages(x))
    expected = without.tempered(2.0, 1.5).covariance()
    expected = expected + (0.3 * d**4)[:, None, None] * torch.eye(CLASSES)
    torch.testing.assert_close(ella.logits(x)[1], expected)
    torch.testing.assert_close(ella.gaussian(x).variance(), expected.diagonal(dim1=1, dim2=2))


def test_without_the_term_everything_is_bit_identical(model):
    plain, with_term = fitted(model, distance=None), fitted(model)
    x, val = normal(30, 4, seed=5), batches(normal(60, 4, seed=6))
    assert torch.equal(plain.predict_proba(x), with_term.predict_proba(x))
    plain.calibrate(val)
    with_term.calibrate(val)
    with_term.hyperparameters = plain.hyperparameters
    with_term.tuning = plain.tuning
    assert torch.equal(plain.predict_proba(x), with_term.predict_proba(x))
    scores = with_term.uncertainty(x)
    for name, score in vars(plain.uncertainty(x)).items():
        assert score is None or torch.equal(score, getattr(scores, name)), name


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_calibrate_sets_the_scale_by_rule(model, likelihood):
    ella = fitted(model, likelihood=likelihood)
    x = normal(200, 4, seed=6)
    y = labels(x)
    generator = torch.Generator().manual_seed(0)
    y[:40] = torch.randint(CLASSES, (40,), generator=generator)  # mistakes: variance helps
    y = y if likelihood == "classification" else x[:, :CLASSES] + normal(200, CLASSES, seed=8)
    plain = fitted(model, distance=None, likelihood=likelihood).calibrate(batches(x, y))
    ella.calibrate(batches(x, y))
    assert ella.hyperparameters.distance_scale > 0
    fourth = ella._fit.distance(ella._fit.features.stages(x)) ** 4
    posterior = plain.tuning.posterior
    variance = posterior.gaussian(plain._evaluate(x).gaussian, plain.likelihood).variance()
    expected = 0.1 * variance.mean() / fourth.mean()
    assert ella.hyperparameters.distance_scale == pytest.approx(expected.item())
    assert ella.tuning.posterior.distance_scale == ella.hyperparameters.distance_scale


def test_the_score_that_was_tuned_is_that_of_what_predicts(model):
    ella = fitted(model)
    x = normal(150, 4, seed=6)
    y = labels(x).roll(3)
    ella.calibrate(batches(x, y))
    assert ella.hyperparameters.distance_scale > 0
    probs = ella.predict_proba(x)
    nll = -probs.gather(1, y.unsqueeze(1)).log().mean().item()
    assert nll == pytest.approx(ella.tuning.nll, rel=1e-6)


class TwoClusters:
    """Two examples, the second far away; S is 1 for both."""

    def __init__(self, far_is_wrong):
        self.y = torch.tensor([0] * 50 + [1 if far_is_wrong else 0] * 50)

    def gaussian_at(self, precision):
        mean = torch.tensor([[3.0, 0.0]]).double().expand(100, 2)
        factor = torch.eye(2).double().expand(100, 2, 2) / math.sqrt(precision)
        outside = torch.cat([torch.ones(50), torch.full((50,), 300.0)]).double()
        return LogitGaussian(mean, factor, None, outside)


@pytest.mark.parametrize("far_is_wrong", [True, False])
def test_a_term_that_costs_likelihood_is_left_out(far_is_wrong):
    data = TwoClusters(far_is_wrong)
    search = Search(data.gaussian_at, Categorical(), data.y, Probit())
    grid = [0.1, 1.0, 10.0]
    plain = search.run(grid)
    found = search.with_distance(plain, grid, 1.0)
    if far_is_wrong:
        assert found.hyperparameters.distance_scale > 0
        assert found.nll < plain.nll
    else:
        assert found == plain


def test_variance_grows_along_rays_away_from_the_data(model):
    ella = fitted(model).calibrate(batches(normal(200, 4, seed=6), labels(normal(200, 4)).roll(1)))
    ella.hyperparameters = replace(ella.hyperparameters, distance_scale=0.05)
    for ray in normal(8, 4, seed=7):
        x = torch.stack([ray * r for r in (2.0, 4.0, 8.0, 16.0, 32.0)])
        variance = ella.gaussian(x).variance().mean(1)
        assert (variance.diff() > 0).all()
        entropy = ella.uncertainty(x, n_samples=2000).entropy
        assert entropy[-1] > 0.9 * math.log(CLASSES)


def test_nonsense_is_finite(model):
    ella = fitted(model)
    ella.hyperparameters = replace(ella.hyperparameters, distance_scale=0.1)
    x = torch.full((1, 4), 1e30, dtype=torch.float64)
    assert ella._fit.distance(ella._fit.features.stages(x)).item() == HIGHEST
    probs = ella.predict_proba(x)
    torch.testing.assert_close(probs.sum(1), torch.ones(1).double())


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_files_and_streams_keep_it(model, method, tmp_path):
    ella = fitted(model, method)
    x, more = normal(9, 4, seed=5), batches(3 + normal(30, 4, seed=9))
    ella.partial_fit(more)
    ella.calibrate(batches(normal(100, 4, seed=6), labels(normal(100, 4, seed=6)).roll(1)))
    ella.hyperparameters = replace(ella.hyperparameters, distance_scale=0.2)
    ella.save(tmp_path / "ella")
    again = ELLA.load(tmp_path / "ella", model, progress=False)
    assert again.distance == Distance()
    assert torch.equal(again.predict_proba(x), ella.predict_proba(x))
    ella.forget(more)
    whole = fitted(model, method)
    stages = ella._fit.features.stages(x)
    torch.testing.assert_close(ella._fit.distance(stages), whole._fit.distance(stages))
    again.decay(0.5)
    stages = again._fit.features.stages(x)
    assert again._fit.distance(stages).shape == (9,)


def test_draws_of_parts_that_are_tempered_and_one_that_is_not():
    """Their covariance is T·S/τ² + vI, and the mean stays m/τ."""
    factor = normal(4, CLASSES, 2)
    outside = torch.tensor([0.1, 1.0, 3.0, 0.0], dtype=torch.float64)
    gaussian = LogitGaussian(normal(4, CLASSES, seed=1), factor, factor[..., 0] ** 2, outside)
    draws = gaussian.drawn(4000, 0)(2.0, 1.5)
    expected = 2.0 / 1.5**2 * replace(gaussian, outside=None).covariance()
    expected = expected + outside[:, None, None] * torch.eye(CLASSES)
    centred = draws - gaussian.mean.T / 1.5
    torch.testing.assert_close(centred.mean(0), torch.zeros(CLASSES, 4).double())
    found = torch.einsum("scn,sdn->ncd", centred, centred) / 4000
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("link", [MonteCarlo(4000), Probit()])
def test_links_see_all_of_the_variance(link):
    mean, v = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([5.0]).double()
    with_v = LogitGaussian(mean, mean.new_zeros(1, 2, 0), None, v)
    as_residual = LogitGaussian(mean, mean.new_zeros(1, 2, 0), v.expand(1, 2))
    torch.testing.assert_close(link(with_v), link(as_residual))
    assert with_v.rows(slice(0, 1)).outside is not None
    joined = LogitGaussian.joined([with_v, with_v])
    torch.testing.assert_close(link(joined), link(as_residual).expand(2, 2))


def test_logits_of_a_norm_nearer_to_the_typical_one():
    """Mean and covariance times g and g², g = (r/‖centred mean‖)^a; what is outside stays."""
    factor, outside = normal(4, CLASSES, 2), torch.tensor([0.1, 1.0, 3.0, 0.0]).double()
    mean = normal(4, CLASSES, seed=1)
    mean[3] = 1.5  # no class stands out: as if the norm were a tenth of r
    block = normal(4, CLASSES, CLASSES, seed=3)
    for residual in (None, factor[..., 0] ** 2, block @ block.mT):
        gaussian = LogitGaussian(mean, factor, residual, outside)
        found = gaussian.normalised(0.5, 2.0)
        for i in range(4):
            norm = sum((m - mean[i].mean()).item() ** 2 for m in mean[i]) ** 0.5
            gain = (2.0 / max(norm, 0.2)) ** 0.5
            torch.testing.assert_close(found.mean[i], mean[i] * gain)
            covariance = replace(gaussian, outside=None).covariance()[i] * gain**2
            covariance = covariance + outside[i] * torch.eye(CLASSES)
            torch.testing.assert_close(found.covariance()[i], covariance)
        assert gaussian.normalised(0.0, 2.0) is gaussian
        torch.testing.assert_close(found.norm()[:3], gaussian.norm()[:3] ** 0.5 * 2.0**0.5)


class Norms:
    """Two hundred examples whose norm says nothing: a tenth of each of two norms is wrong."""

    def __init__(self, informative):
        self.y = torch.arange(200) % 3
        size = torch.where(torch.arange(200) < 100, 6.0, 1.5).double()
        self.mean = torch.nn.functional.one_hot(self.y, 3).double() * size.unsqueeze(1)
        wrong = torch.arange(200) % 10 == 0
        if informative:
            wrong = torch.where(size > 2, torch.arange(200) % 50 == 0, torch.arange(200) % 3 == 0)
        self.y = torch.where(wrong, (self.y + 1) % 3, self.y)

    def gaussian_at(self, precision):
        factor = torch.eye(3).double().expand(200, 3, 3) * 0.1 / math.sqrt(precision)
        return LogitGaussian(self.mean, factor, None, torch.ones(200).double())


@pytest.mark.parametrize("informative", [True, False])
def test_the_exponent_that_suits_the_data_is_chosen(informative):
    data, grid = Norms(informative), [0.1, 1.0, 10.0]
    search = Search(data.gaussian_at, Categorical(), data.y, Probit())
    plain = search.run(grid)
    found = search.with_distance(plain, grid, 1e-3, (0.0, 0.5, 1.0)).hyperparameters
    assert found.norm_exponent == (0.0 if informative else 1.0)
    assert found.typical_norm == pytest.approx(3.75 * (2 / 3) ** 0.5)


def test_two_classes_are_not_normalised():
    data, grid = Norms(informative=False), [0.1, 1.0, 10.0]
    search = Search(
        lambda precision: LogitGaussian(
            data.mean[:, :2],
            data.gaussian_at(precision).factor[:, :2],
            None,
            data.gaussian_at(precision).outside,
        ),
        Categorical(),
        data.y.clamp_max(1),
        Probit(),
    )
    plain = search.run(grid)
    found = search.with_distance(plain, grid, 1e-3, (0.0, 0.5, 1.0))
    assert found == search.with_distance(plain, grid, 1e-3)
    assert found.hyperparameters.distance_scale > 0


@pytest.mark.parametrize("value", [(), 0.5, (2.0,), ("a",), (math.nan,), (-0.1,)])
def test_bad_exponents(value):
    with pytest.raises((TypeError, ValueError), match="`exponents`"):
        Distance(exponents=value)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "big"])
@pytest.mark.parametrize("name", ["share", "ridge"])
def test_bad_settings(name, value):
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must be"):
        Distance(**{name: value})


def test_a_number_is_no_distance(model):
    with pytest.raises(TypeError, match=r"`distance` must be a Distance; got 0\.1"):
        ELLA(model, distance=0.1)


def test_scores_by_their_formulas(model):
    ella = fitted(model).calibrate(batches(normal(100, 4, seed=6), labels(normal(100, 4)).roll(1)))
    ella.hyperparameters = replace(ella.hyperparameters, temperature=1.0, distance_scale=0.2)
    x = torch.cat([normal(5, 4, seed=7), 20 * normal(5, 4, seed=8)])
    scores, gaussian = ella.uncertainty(x), ella.gaussian(x)
    stages = ella._fit.features.stages(x)
    torch.testing.assert_close(scores.distance, ella._fit.distance(stages))
    for i, (m, v) in enumerate(zip(gaussian.mean, gaussian.variance(), strict=True)):
        total = sum((m / (1 + math.pi * v / 8).sqrt()).exp().tolist())
        assert scores.corrected_energy[i].item() == pytest.approx(-math.log(total))
        centred = m - m.mean()
        norm = sum(abs(each) ** 3 for each in centred.tolist()) ** (1 / 3)
        assert scores.max_logit_p_norm[i].item() == pytest.approx(-centred.max().item() / norm)
    plain = fitted(model, distance=None)
    assert plain.uncertainty(x).distance is None
    assert plain.uncertainty([x[:3], x[3:]]).corrected_energy.shape == (10,)


def test_two_classes_have_no_p_norm():
    assert max_logit_p_norm(LogitGaussian(normal(4, 2), normal(4, 2, 1))) is None
    known = max_logit_p_norm(LogitGaussian(torch.zeros(1, 3), torch.zeros(1, 3, 1)))
    assert known.item() == 0  # no class stands out


def test_wide_stages_are_folded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(4, 1500), nn.ReLU(), nn.Linear(1500, CLASSES)).double()
    ella = fitted(wide)
    x = normal(6, 4, seed=5)
    stages = ella._fit.features.stages(x)
    assert {z.shape[1] for z in stages} == {1024}
    _, read = ella._fit.features(x)
    for found, expected in zip(read, stages, strict=True):
        torch.testing.assert_close(found, expected)
    far = ella._fit.distance(ella._fit.features.stages(10 * x))
    assert (far > ella._fit.distance(stages)).all()
    module = ella.predictive_module(16)
    ella.hyperparameters = replace(ella.hyperparameters, distance_scale=0.2)
    module = ella.predictive_module(16)
    torch.testing.assert_close(module(x)[0], ella.predict_proba(x, n_samples=16))


def test_data_that_are_all_alike_have_no_distance(model):
    x = torch.ones(30, 4, dtype=torch.float64)
    ella = ELLA(model, eigenfunctions=LastLayer(), distance=Distance(), **QUIET)
    ella.fit([(x, torch.arange(30) % CLASSES)]).calibrate([(x, torch.arange(30) % CLASSES)])
    assert ella.hyperparameters.distance_scale == 0
    assert torch.isfinite(ella.predict_proba(normal(3, 4))).all()


def test_shifted_data_count_a_little(model):
    """The search minimises NLL(val) + .03 · NLL(shifted); what it reports is NLL(val)."""
    x, far = normal(200, 4, seed=6), 3 * normal(200, 4, seed=9)
    y = labels(x)
    y[:30] = y[:30].roll(1)
    shifted = batches(far, labels(far).roll(7))
    unnormalised = Distance(exponents=(0.0,))
    plain = fitted(model, distance=unnormalised).calibrate(batches(x, y))
    ella = fitted(model, distance=unnormalised).calibrate(batches(x, y), shifted=shifted)
    scale = plain.hyperparameters.distance_scale
    assert ella.hyperparameters.distance_scale == pytest.approx(scale)
    assert scale > 0

    def nll(method, x, y):
        probs = method.predict_proba(x)
        return -probs.gather(1, y.unsqueeze(1)).log().mean().item()

    def objective(method):
        return nll(method, x, y) + 0.03 * nll(method, far, labels(far).roll(7))

    assert nll(ella, x, y) == pytest.approx(ella.tuning.nll, rel=1e-6)
    assert objective(ella) < objective(plain) + 1e-4
    assert nll(ella, far, labels(far).roll(7)) < nll(plain, far, labels(far).roll(7))


def test_shifted_data_change_nothing_without_the_term(model):
    x = normal(100, 4, seed=6)
    val = batches(x, labels(x).roll(1))
    plain = fitted(model, distance=None).calibrate(val)
    other = fitted(model, distance=None).calibrate(val, shifted=batches(3 * x))
    assert plain.tuning == other.tuning
