"""Metrics against hand-computed values and plain numpy references."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ella import metrics

PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4], [0.5, 0.25, 0.25]])
LABELS = torch.tensor([0, 2, 2, 1])

# Names of all metrics, by what they are computed from.
WITH_NETCAL = (
    "expected_calibration_error",
    "adaptive_calibration_error",
    "maximum_calibration_error",
    "classwise_calibration_error",
    "evaluate",
)
FROM_LABELS = ("accuracy", "negative_log_likelihood", "brier", *WITH_NETCAL)
WITH_SKLEARN = ("auroc", "aupr", "fpr_at_95_tpr")
FROM_GAUSSIANS = ("gaussian_negative_log_likelihood", "interval_coverage")
FROM_SCORES = ("area_under_risk_coverage", *WITH_SKLEARN)


def random_case(n=400, c=5, seed=0):
    rng = np.random.default_rng(seed)
    probs = torch.as_tensor(rng.dirichlet(np.full(c, 0.4), n))
    labels = torch.as_tensor([rng.choice(c, p=row / row.sum()) for row in probs.numpy()])
    return probs, labels


def numpy_ece(probs, labels, num_bins):
    """Bins [a, b), the last one closed; written independently of the library."""
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    total, largest = 0.0, 0.0
    for b in range(num_bins):
        low, high = b / num_bins, (b + 1) / num_bins
        inside = (confidence >= low) & ((confidence < high) | (b == num_bins - 1))
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
            largest = max(largest, gap)
    return total, largest


def two_class(confidences):
    top = torch.tensor(confidences)
    return torch.stack([top, 1 - top], dim=1)


def test_hand_values():
    assert metrics.accuracy(PROBS, LABELS) == 0.5
    expected_nll = -np.log([0.7, 0.3, 0.4, 0.25]).mean()
    assert metrics.negative_log_likelihood(PROBS, LABELS) == pytest.approx(expected_nll, rel=1e-6)
    squares = [0.09 + 0.04 + 0.01, 0.01 + 0.36 + 0.49, 0.09 + 0.09 + 0.36, 0.25 + 0.5625 + 0.0625]
    assert metrics.brier(PROBS, LABELS) == pytest.approx(np.mean(squares), rel=1e-6)


def test_nll_of_impossible_label_is_finite():
    value = metrics.negative_log_likelihood(two_class([1.0]), torch.tensor([1]))
    assert value == pytest.approx(-np.log(torch.finfo(torch.float32).tiny), rel=1e-6)


def test_calibrated_data_have_no_calibration_error():
    probs = two_class([0.75] * 4 + [0.6] * 5)
    labels = torch.tensor([0, 0, 0, 1, 0, 0, 0, 1, 1])
    assert metrics.expected_calibration_error(probs, labels) == pytest.approx(0, abs=1e-6)
    assert metrics.maximum_calibration_error(probs, labels) == pytest.approx(0, abs=1e-6)


def test_calibration_errors_by_hand():
    probs = two_class([0.95, 0.95, 0.65, 0.65])
    labels = torch.tensor([0, 1, 0, 0])  # accuracy .5 at .95 and 1 at .65
    assert metrics.expected_calibration_error(probs, labels, 10) == pytest.approx(0.4, abs=1e-6)
    assert metrics.maximum_calibration_error(probs, labels, 10) == pytest.approx(0.45, abs=1e-6)


def test_adaptive_error_averages_bins_of_equal_mass():
    probs = two_class([0.6, 0.62, 0.9, 0.96])
    labels = torch.tensor([0, 1, 0, 0])  # halves: |.5 - .61| and |1 - .93|
    value = metrics.adaptive_calibration_error(probs, labels, 2)
    assert value == pytest.approx((0.11 + 0.07) / 2, abs=1e-6)


def sorted_ace(probs, labels, num_bins):
    """Bins of as many examples each, along the sorted confidences; ties in the order given."""
    confidence, correct = probs.max(1), probs.argmax(1) == labels
    order = sorted(range(len(labels)), key=lambda i: confidence[i])
    size, gaps = len(labels) // num_bins, []
    for start in range(0, len(labels), size):
        rows = order[start : start + size]
        gaps.append(abs(correct[rows].mean() - confidence[rows].mean()))
    assert len(gaps) == num_bins
    return np.mean(gaps)


def test_adaptive_error_with_many_confidences_of_one():
    probs = two_class([1.0] * 300 + [0.6] * 10)
    labels = torch.zeros(310, dtype=torch.long)
    labels[:30] = 1  # a tenth of the certain ones are wrong
    # Halves of 155: ten at .6 and right, 145 at 1 of which 30 are wrong; then 155 at 1 and right.
    value = metrics.adaptive_calibration_error(probs, labels, num_bins=2)
    assert value == pytest.approx((abs(125 - 151) / 155 + 0) / 2, abs=1e-6)
    expected = sorted_ace(probs.double().numpy(), labels.numpy(), 10)
    value = metrics.adaptive_calibration_error(probs, labels, num_bins=10)
    assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_bins", [5, 16])
def test_adaptive_error_agrees_with_sorting(num_bins):
    probs, labels = random_case(400)
    probs[100:250] = torch.eye(5, dtype=torch.float64)[labels[100:250].roll(1)]
    expected = sorted_ace(probs.numpy(), labels.numpy(), num_bins)
    value = metrics.adaptive_calibration_error(probs, labels, num_bins)
    assert value == pytest.approx(expected, abs=1e-8)


def test_confidence_of_exactly_one_is_in_the_top_bin():
    # torchmetrics 1.9 puts it in a bin of its own and returns .525.
    probs = two_class([0.95, 1.0])
    value = metrics.expected_calibration_error(probs, torch.tensor([1, 0]), 10)
    assert value == pytest.approx(0.475, abs=1e-6)


@pytest.mark.parametrize("num_bins", [5, 15])
@pytest.mark.parametrize("c", [2, 5])
def test_agrees_with_numpy(num_bins, c):
    probs, labels = random_case(c=c)
    ece, mce = numpy_ece(probs.numpy(), labels.numpy(), num_bins)
    value = metrics.expected_calibration_error(probs, labels, num_bins)
    assert value == pytest.approx(ece, abs=1e-10)
    assert metrics.maximum_calibration_error(probs, labels, num_bins) == pytest.approx(mce)


def test_top_label_when_only_two_of_many_classes_occur():
    probs, labels = random_case()
    keep = labels <= 1
    ece, _ = numpy_ece(probs[keep].numpy(), labels[keep].numpy(), 15)
    value = metrics.expected_calibration_error(probs[keep], labels[keep])
    assert value == pytest.approx(ece, abs=1e-10)


def test_evaluate_collects_the_single_metrics():
    probs, labels = random_case()
    assert metrics.evaluate(probs, labels) == {
        "accuracy": metrics.accuracy(probs, labels),
        "nll": metrics.negative_log_likelihood(probs, labels),
        "brier": metrics.brier(probs, labels),
        "ece": metrics.expected_calibration_error(probs, labels),
        "ace": metrics.adaptive_calibration_error(probs, labels),
    }


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    inside = torch.randint(0, 6, (30,), generator=generator).double()
    outside = torch.randint(2, 9, (40,), generator=generator).double()
    wins = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside)
    assert metrics.auroc(inside, outside) == pytest.approx(wins.mean().item())
    assert metrics.auroc(outside, inside) == pytest.approx(1 - wins.mean().item())


def test_fpr_at_95_tpr():
    outside = torch.arange(20.0)  # 95 % are at or above 1
    inside = torch.tensor([-1.0, 0.5, 1.0, 2.0])
    assert metrics.fpr_at_95_tpr(inside, outside) == 0.5
    assert metrics.fpr_at_95_tpr(inside, outside + 100) == 0


def test_aupr():
    assert metrics.aupr(torch.zeros(3), torch.ones(2)) == 1
    # Ranked out, in, out: precision 1 at recall 1/2, 2/3 at recall 1.
    value = metrics.aupr(torch.tensor([1.0]), torch.tensor([2.0, 0.0]))
    assert value == pytest.approx((1 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("probs", "labels", "error", "message"),
    [
        (PROBS[0], LABELS, ValueError, r"`probs` must have shape \(n, c\)"),
        (PROBS[:0], LABELS[:0], ValueError, "n >= 1"),
        (PROBS[:, :1], LABELS, ValueError, "c >= 2"),
        (PROBS, LABELS[:2], ValueError, r"`labels` must have shape \(4,\)"),
        (PROBS.log(), LABELS, ValueError, "softmax"),
        (PROBS / 2, LABELS, ValueError, "softmax"),
        (PROBS.clone().fill_(torch.nan), LABELS, ValueError, "NaN"),
        (PROBS, LABELS + 1, ValueError, r"0\.\.2"),
        (PROBS, LABELS.float(), TypeError, "integers"),
        (PROBS.tolist(), LABELS, TypeError, "`probs` must be a tensor or a NumPy array"),
        ([PROBS, PROBS], LABELS, TypeError, r"join batches with torch\.cat"),
        (PROBS, LABELS.tolist(), TypeError, "`labels` must be a tensor or a NumPy array"),
        (PROBS.numpy(), LABELS.float().numpy(), TypeError, "integers"),
        (PROBS, np.array(["a", "b", "a", "c"]), TypeError, r"`labels` must hold numbers.*searchs"),
        (
            PROBS.numpy().astype(object),
            LABELS,
            TypeError,
            "`probs` must hold numbers; got dtype o",
        ),
    ],
)
@pytest.mark.parametrize("metric", [metrics.accuracy, metrics.expected_calibration_error])
def test_bad_inputs(metric, probs, labels, error, message):
    with pytest.raises(error, match=message):
        metric(probs, labels)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("kind", ["probs", "soft", "scores"])
def test_numpy_arrays_are_as_good_as_tensors(kind):
    probs, labels = random_case(60, 3)
    probs = probs.float()  # the floor of log p depends on the dtype
    probs[0] = torch.tensor([1.0, 0, 0])
    labels[0] = 1
    soft = random_case(60, 3, seed=1)[0]
    names, pair = {
        "probs": (FROM_LABELS, (probs, labels)),
        "soft": (("cross_entropy_to", "divergence_from"), (probs, soft)),
        "scores": (FROM_SCORES, (soft[:, 0], soft[:, 1])),
    }[kind]
    for name in names:
        metric = getattr(metrics, name)
        expected = metric(*pair)
        first, second = (part.numpy().copy() for part in pair)
        assert metric(first, second) == expected
        assert metric(read_only(first), pair[1]) == expected
        assert metric(pair[0].clone().requires_grad_(), read_only(second)) == expected
        backwards = metric(first[::-1], second[::-1])
        assert backwards == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint64", ">i4", "<i8"])
def test_labels_of_every_integer_dtype(dtype):
    labels = LABELS.numpy().astype(dtype)
    for name in FROM_LABELS:
        metric = getattr(metrics, name)
        assert metric(PROBS.numpy().astype(">f4"), labels) == metric(PROBS, LABELS)


def test_frames_are_as_good_as_arrays():
    """What scikit-learn calls `y_true` is often a Series, and it need not start at index 0."""
    pandas = pytest.importorskip("pandas")
    probs, labels = random_case(60, 3)
    frame = pandas.DataFrame(probs.numpy(), index=range(100, 160), columns=list("abc"))
    series = pandas.Series(labels.numpy(), index=frame.index)
    for name in FROM_LABELS:
        metric = getattr(metrics, name)
        assert metric(frame, series) == metric(probs, labels)
    assert metrics.auroc(frame["a"], frame["b"]) == metrics.auroc(probs[:, 0], probs[:, 1])


def test_the_same_numbers_as_scikit_learn():
    """For `(y_true, probabilities)` as scikit-learn takes them; here predictions come first."""
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    probs, y_true = (part.numpy() for part in random_case(200, 4))
    pairs = {
        metrics.negative_log_likelihood: sklearn_metrics.log_loss(y_true, probs),
        metrics.accuracy: sklearn_metrics.accuracy_score(y_true, probs.argmax(1)),
    }
    for ours, theirs in pairs.items():
        assert ours(probs, y_true) == pytest.approx(theirs, rel=1e-12)


def test_numpy_arrays_can_be_drawn_and_ranked():
    probs, labels = PROBS.numpy(), LABELS.numpy()
    assert len(metrics.reliability_diagram({"MAP": probs}, labels).axes) == 1
    scores, errors = np.array([0.3, 0.1, 0.2]), np.array([True, False, False])
    coverage, risk = metrics.risk_coverage(scores, errors)
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3])


def test_bad_scores_and_bins():
    with pytest.raises(TypeError, match="`scores_in` must be a tensor"):
        metrics.auroc([0.1, 0.2], torch.ones(3))
    with pytest.raises(ValueError, match="`targets` must be probabilities"):
        metrics.cross_entropy_to(PROBS, 2 * PROBS)
    with pytest.raises(ValueError, match="`scores_out`"):
        metrics.auroc(torch.ones(3), torch.ones(0))
    with pytest.raises(ValueError, match="NaN"):
        metrics.aupr(torch.tensor([torch.nan]), torch.ones(2))
    with pytest.raises(ValueError, match="`num_bins`"):
        metrics.expected_calibration_error(PROBS, LABELS, 0)


def test_reliability_diagram_draws_what_it_says():
    probs, labels = two_class([0.96, 1.0, 0.65, 0.65]), torch.tensor([1, 0, 0, 0])
    figure = metrics.reliability_diagram({"MAP": probs, "same": probs}, labels, num_bins=10)
    assert len(figure.axes) == 2
    panel = figure.axes[0]
    assert panel.get_title() == "MAP\nECE 0.415"
    bars, gaps = panel.containers
    centers = [bar.get_x() + bar.get_width() / 2 for bar in bars]
    assert centers == pytest.approx([0.65, 0.95])
    assert [bar.get_height() for bar in bars] == pytest.approx([1.0, 0.5])
    assert [bar.get_height() for bar in gaps] == pytest.approx([-0.35, 0.48], abs=1e-6)
    figure.canvas.draw()


def test_reliability_diagram_needs_a_method():
    with pytest.raises(ValueError, match="empty"):
        metrics.reliability_diagram({}, LABELS)


WITHOUT_EXTRA = """
import sys
sys.modules.update(dict.fromkeys(("netcal", "sklearn", "matplotlib")))
import ella, torch
probs, soft = torch.tensor([[0.7, 0.3], [0.4, 0.6]]), torch.tensor([[0.8, 0.2], [0.5, 0.5]])
labels, scores = torch.tensor([0, 0]), torch.tensor([0.1, 0.2])
for call in CALLS:
    try:
        eval(f"ella.metrics.{call}")
    except ImportError as error:
        print(call.split("(")[0], error)
"""


def test_only_what_needs_the_extra_asks_for_it():
    needs = dict.fromkeys(WITH_NETCAL, "netcal") | dict.fromkeys(WITH_SKLEARN, "sklearn")
    needs |= {"reliability_diagram": "matplotlib"}
    calls = [f"{name}(probs, labels)" for name in FROM_LABELS]
    calls += [f"{name}(scores, scores)" for name in ("risk_coverage", *FROM_SCORES)]
    calls += ["cross_entropy_to(probs, soft)", "divergence_from(probs, soft)"]
    calls += ["reliability_diagram({'MAP': probs}, labels)"]
    calls += [f"{name}(scores, scores, scores)" for name in FROM_GAUSSIANS]
    calls += ["binary_negative_log_likelihood(soft[:, 0], labels)"]
    calls += ["root_mean_squared_error(scores, scores)"]
    called = {call.split("(")[0] for call in calls}
    assert called == set(metrics.__all__) - {"ROW_SUM_TOLERANCE"}  # none forgotten
    done = subprocess.run(
        [sys.executable, "-c", f"CALLS = {calls!r}{WITHOUT_EXTRA}"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert dict(line.split(" ", 1) for line in done.stdout.splitlines()) == {
        name: f'This metric needs {package}: pip install "ella-laplace[metrics]".'
        for name, package in needs.items()
    }


# Soft labels, classwise calibration, selective prediction


def test_classwise_calibration_error_is_the_mean_over_classes():
    probs, labels = random_case(200, 3)
    expected = 0.0
    for c in range(3):
        for low in range(15):
            inside = (probs[:, c] > low / 15) & (probs[:, c] <= (low + 1) / 15)
            if inside.any():
                gap = (labels[inside] == c).double().mean() - probs[inside, c].double().mean()
                expected += inside.double().mean() * gap.abs() / 3
    assert metrics.classwise_calibration_error(probs, labels) == pytest.approx(float(expected))


def test_soft_labels_reduce_to_hard_ones():
    probs, labels = random_case(50, 4)
    hard = torch.nn.functional.one_hot(labels, 4).double()
    nll = metrics.negative_log_likelihood(probs, labels)
    assert metrics.cross_entropy_to(probs, hard) == pytest.approx(nll)
    assert metrics.divergence_from(probs, hard) == pytest.approx(nll)
    soft = random_case(50, 4, seed=1)[0].clamp_min(1e-9)
    soft = soft / soft.sum(1, keepdim=True)
    assert metrics.divergence_from(soft, soft) == pytest.approx(0, abs=1e-6)
    entropy = -(soft * soft.log()).sum(1).mean().item()
    gap = metrics.cross_entropy_to(probs, soft) - metrics.divergence_from(probs, soft)
    assert gap == pytest.approx(entropy, rel=1e-5)
    with pytest.raises(ValueError, match="must have one shape"):
        metrics.cross_entropy_to(probs, soft[:, :3] / soft[:, :3].sum(1, keepdim=True))


def test_risk_coverage_by_hand():
    scores = torch.tensor([0.3, 0.1, 0.2, 0.4])
    errors = torch.tensor([True, False, False, True])
    coverage, risk = metrics.risk_coverage(scores, errors)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0, 0, 1 / 3, 1 / 2])
    assert metrics.area_under_risk_coverage(scores, errors) == pytest.approx(5 / 24)
    with pytest.raises(ValueError, match=r"must have one shape; got \(4,\), \(2,\)"):
        metrics.risk_coverage(scores, errors[:2])
    with pytest.raises(ValueError, match="NaN or infinite"):
        metrics.risk_coverage(scores / 0, errors)


# Independent labels


def binary_case(n=40, c=3, seed=0):
    rng = np.random.default_rng(seed)
    probs = rng.uniform(0.01, 0.99, (n, c))
    return probs, (rng.uniform(size=(n, c)) < probs).astype(int)


def test_binary_likelihood_agrees_with_a_loop():
    probs, targets = binary_case()
    expected = 0.0
    for p, y in zip(probs, targets, strict=True):
        expected -= math.log(math.prod(p[j] if y[j] else 1 - p[j] for j in range(3))) / len(probs)
    found = metrics.binary_negative_log_likelihood(probs, targets)
    assert found == pytest.approx(expected, rel=1e-12)
    for other in (targets.astype(bool), targets.astype(float), torch.as_tensor(targets)):
        assert metrics.binary_negative_log_likelihood(probs, other) == found
    flipped = metrics.binary_negative_log_likelihood(1 - probs, 1 - targets)
    assert flipped == pytest.approx(found)


def test_binary_likelihood_by_hand():
    probs, targets = torch.tensor([[0.9, 0.2], [0.5, 0.4]]), torch.tensor([[1, 0], [1, 1]])
    expected = -(math.log(0.9 * 0.8) + math.log(0.5 * 0.4)) / 2
    found = metrics.binary_negative_log_likelihood(probs, targets)
    assert found == pytest.approx(expected, rel=1e-6)


def test_binary_likelihood_of_two_classes_is_the_categorical_one():
    probs, targets = binary_case(c=1)
    both = np.concatenate([1 - probs, probs], axis=1)
    expected = metrics.negative_log_likelihood(both, targets[:, 0])
    assert metrics.binary_negative_log_likelihood(probs, targets) == pytest.approx(expected)
    assert metrics.binary_negative_log_likelihood(probs[:, 0], targets) == pytest.approx(expected)


@pytest.mark.parametrize("certain", [0.0, 1.0])
def test_binary_likelihood_of_the_impossible_is_finite(certain):
    probs, targets = torch.tensor([[certain]]), torch.tensor([[1 - certain]])
    value = metrics.binary_negative_log_likelihood(probs, targets)
    assert value == pytest.approx(-np.log(torch.finfo(torch.float32).tiny), rel=1e-6)
    assert metrics.binary_negative_log_likelihood(probs, 1 - targets) == 0
    rounded = probs * (1 + 1e-6)  # as an average may be
    assert metrics.binary_negative_log_likelihood(rounded, 1 - targets) == 0


@pytest.mark.parametrize(
    ("probs", "targets", "error", "message"),
    [
        (PROBS, LABELS, ValueError, r"must have one shape; got \(4, 3\), \(4, 1\)"),
        (PROBS.log(), PROBS > 0.3, ValueError, "sigmoid"),
        (1 + PROBS, PROBS > 0.3, ValueError, "sigmoid"),
        (PROBS, PROBS, ValueError, "`targets` must be 0 or 1"),
        (PROBS[None], PROBS[None], ValueError, r"`probs` must have shape \(n, c\)"),
        (PROBS.tolist(), PROBS > 0.3, TypeError, "`probs` must be a tensor"),
    ],
)
def test_bad_binary_inputs(probs, targets, error, message):
    with pytest.raises(error, match=message):
        metrics.binary_negative_log_likelihood(probs, targets)


# Regression


def gaussian_case(shape, seed=0):
    """Means, variances and targets, one of which lies far out."""
    rng = np.random.default_rng(seed)
    mean, scatter = rng.normal(size=(2, *shape))
    variance = rng.uniform(0.2, 3, shape)
    scatter.flat[0] = 5.0
    return mean, variance, mean + np.sqrt(variance) * scatter


def loop_over_targets(mean, variance, targets):
    """NLL, RMSE and coverage at 0.9, one target at a time."""
    nll = squares = inside = 0.0
    for m, v, y in zip(mean.flat, variance.flat, targets.flat, strict=True):
        nll -= math.log(math.exp(-((y - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v))
        squares += (y - m) ** 2
        below = 0.5 * (1 + math.erf((y - m) / math.sqrt(2 * v)))
        inside += 0.05 < below < 0.95
    return nll / len(mean), math.sqrt(squares / mean.size), inside / mean.size


@pytest.mark.parametrize("shape", [(50,), (50, 1), (40, 3)])
def test_gaussian_scores_agree_with_a_loop(shape):
    case = gaussian_case(shape)
    nll, rmse, coverage = loop_over_targets(*case)
    assert 0.5 < coverage < 1
    mean, _, targets = case
    assert metrics.gaussian_negative_log_likelihood(*case) == pytest.approx(nll, rel=1e-12)
    assert metrics.root_mean_squared_error(mean, targets) == pytest.approx(rmse, rel=1e-12)
    assert metrics.interval_coverage(*case, level=0.9) == coverage
    tensors = [torch.as_tensor(part).requires_grad_() for part in case]
    assert metrics.gaussian_negative_log_likelihood(*tensors) == pytest.approx(nll, rel=1e-12)


def test_gaussian_scores_by_hand():
    mean, variance = torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([[1.0, 4.0], [1.0, 1.0]])
    targets = torch.tensor([[1.0, 1.0], [2.0, -2.0]])
    # Squared errors over variances: 1, 0, 0, 4; one variance of 4; log 2π twice an example.
    nll = (0.5 * (1 + 4) + 0.5 * math.log(4)) / 2 + math.log(2 * math.pi)
    found = metrics.gaussian_negative_log_likelihood(mean, variance, targets)
    assert found == pytest.approx(nll, rel=1e-12)
    assert metrics.root_mean_squared_error(mean, targets) == pytest.approx(math.sqrt(5 / 4))
    # At 68.27 % z is 1, at 95 % it is 1.96, at 95.46 % it is 2.0006.
    levels = {0.68: 0.5, 0.6827: 0.75, 0.95: 0.75, 0.9546: 1.0}
    for level, expected in levels.items():
        assert metrics.interval_coverage(mean, variance, targets, level) == expected


def test_gaussian_scores_follow_the_unit_of_the_targets():
    mean, variance, targets = gaussian_case((40, 3))
    scaled = 7 * mean, 49 * variance, 7 * targets
    nll = metrics.gaussian_negative_log_likelihood(mean, variance, targets)
    found = metrics.gaussian_negative_log_likelihood(*scaled)
    assert found == pytest.approx(nll + 3 * math.log(7))
    rmse = metrics.root_mean_squared_error(mean, targets)
    assert metrics.root_mean_squared_error(7 * mean, 7 * targets) == pytest.approx(7 * rmse)
    assert metrics.interval_coverage(*scaled) == metrics.interval_coverage(mean, variance, targets)


def test_one_output_needs_no_axis():
    mean, variance, targets = gaussian_case((30,))
    flat = metrics.gaussian_negative_log_likelihood(mean, variance, targets)
    mixed = metrics.gaussian_negative_log_likelihood(mean[:, None], variance, targets[:, None])
    assert mixed == flat


ONES = torch.ones(4, 2)


@pytest.mark.parametrize("metric", [getattr(metrics, name) for name in FROM_GAUSSIANS])
@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ((ONES, ONES, ONES[:, 0]), ValueError, r"`mean`, `targets` .* got \(4, 2\), \(4, 1\)"),
        ((ONES, ONES[:1], ONES), ValueError, r"`mean`, `variance` .* got \(4, 2\), \(1, 2\)"),
        ((ONES, ONES.diag_embed(), ONES), ValueError, r"`variance` must have shape \(n, c\)"),
        ((ONES[:0], ONES[:0], ONES[:0]), ValueError, "n >= 1"),
        ((ONES, 0 * ONES, ONES), ValueError, "`variance` must be positive"),
        ((ONES, ONES, ONES / 0), ValueError, "`targets` holds NaN or infinite"),
        ((ONES, ONES, ONES.tolist()), TypeError, "`targets` must be a tensor"),
    ],
)
def test_bad_gaussians(metric, case, error, message):
    with pytest.raises(error, match=message):
        metric(*case)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_level_is_a_probability(level):
    with pytest.raises(ValueError, match="`level` must lie between 0 and 1"):
        metrics.interval_coverage(ONES, ONES, ONES, level)
