"""How good probabilities and uncertainty scores are: numbers from (probs, labels) or scores.

Calibration errors come from netcal and rank statistics from scikit-learn (`ella[metrics]`).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ella.inputs import check_class_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

ROW_SUM_TOLERANCE = 1e-2
"""How far a row of `probs` may be from 1: half-precision softmax is off by a few 1e-3."""


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class is the label.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If shapes or values are bad. The same for every metric here.
    """
    probs, labels = _checked(probs, labels)
    return (probs.argmax(1) == labels).double().mean().item()


def negative_log_likelihood(probs: Tensor, labels: Tensor) -> float:
    r"""Mean negative log-likelihood :math:`-\frac{1}{n} \sum_i \log p_{i, y_i}`, in nats.

    Probabilities are floored at the smallest normal number of their dtype, so that one saturated
    float32 softmax gives a large number, not infinity.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
    """
    tiny = torch.finfo(probs.dtype).tiny if probs.is_floating_point() else 0.0
    probs, labels = _checked(probs, labels)
    return -_of_labels(probs, labels).clamp_min(tiny).log().mean().item()


def brier(probs: Tensor, labels: Tensor) -> float:
    r"""The Brier score :math:`\frac{1}{n} \sum_i \sum_c (p_{ic} - [y_i = c])^2`, in [0, 2].

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).

    Reference: Verification of forecasts expressed in terms of probability (Brier, 1950).
    """
    probs, labels = _checked(probs, labels)
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[1])
    return (probs - one_hot).square().sum(1).mean().item()


def expected_calibration_error(probs: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    r"""ECE: :math:`\sum_b \frac{n_b}{n} |acc_b - conf_b|` over bins of equal width.

    The confidence is the probability of the most probable class.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
        num_bins: Number of bins.

    Reference: On Calibration of Modern Neural Networks (Guo et al., 2017),
    https://arxiv.org/abs/1706.04599
    """
    return _calibration_error("ECE", probs, labels, num_bins)


def adaptive_calibration_error(probs: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    r"""ACE: the mean over bins of equal *mass* of :math:`|acc_b - conf_b|`, top label only.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
        num_bins: Number of bins.

    Reference: Measuring Calibration in Deep Learning (Nixon et al., 2019),
    https://arxiv.org/abs/1904.01685
    """
    return _calibration_error("ACE", probs, labels, num_bins)


def classwise_calibration_error(probs: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    r"""Classwise ECE: the mean over classes of the ECE of :math:`p_c` for "the label is c".

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
        num_bins: Number of bins of equal width.

    Reference: Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities with
    Dirichlet calibration (Kull et al., 2019), https://arxiv.org/abs/1910.12656
    """
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1; got {num_bins}.")
    probs, labels = _checked(probs, labels)
    metric = _imported("netcal.metrics").ECE(num_bins)
    errors = [
        float(metric.measure(column.clamp_max(1).numpy(), (labels == c).long().numpy()))
        for c, column in enumerate(probs.T)
    ]
    return sum(errors) / len(errors)


def cross_entropy_to(probs: Tensor, targets: Tensor) -> float:
    r"""Mean cross-entropy :math:`-\sum_c t_{ic} \log p_{ic}` to soft labels, in nats.

    Args:
        probs: Class probabilities, shape (n, c).
        targets: Probabilities too, such as the shares of people who chose each class.
    """
    tiny = torch.finfo(probs.dtype).tiny if probs.is_floating_point() else 0.0
    probs, targets = _checked_soft(probs, targets)
    return -(targets * probs.clamp_min(tiny).log()).sum(1).mean().item()


def divergence_from(probs: Tensor, targets: Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(targets ‖ probs), in nats; see `cross_entropy_to`."""
    soft = _checked_soft(probs, targets)[1]
    return cross_entropy_to(probs, targets) + torch.xlogy(soft, soft).sum(1).mean().item()


def risk_coverage(scores: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Selective prediction: the error rate among the examples that one is surest of.

    Args:
        scores: Uncertainty, higher meaning less certain, shape (n,).
        errors: Whether the prediction was wrong, or any loss, shape (n,).

    Returns:
        Coverage 1/n, 2/n, ..., 1 and the mean error at each, ties in the order given; float64.

    Raises:
        ValueError: If shapes or values are bad.

    Reference: Selective Classification for Deep Neural Networks (Geifman & El-Yaniv, 2017),
    https://arxiv.org/abs/1705.08500
    """
    scores, errors = scores.detach().cpu().double(), errors.detach().cpu().double()
    if scores.ndim != 1 or len(scores) == 0 or errors.shape != scores.shape:
        raise ValueError(
            f"`scores` and `errors` must both have shape (n,) with n >= 1; got "
            f"{tuple(scores.shape)} and {tuple(errors.shape)}."
        )
    if not (torch.isfinite(scores).all() and torch.isfinite(errors).all()):
        raise ValueError("`scores` or `errors` holds NaN or infinite values.")
    counts = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    return counts / len(scores), errors[scores.argsort(stable=True)].cumsum(0) / counts


def area_under_risk_coverage(scores: Tensor, errors: Tensor) -> float:
    """AURC, the mean of `risk_coverage` over coverages; lower is better."""
    return risk_coverage(scores, errors)[1].mean().item()


def maximum_calibration_error(probs: Tensor, labels: Tensor, num_bins: int = 15) -> float:
    r"""MCE: the largest :math:`|acc_b - conf_b|` over bins of equal width.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
        num_bins: Number of bins. A bin with few examples dominates it.

    Reference: Obtaining Well Calibrated Probabilities Using Bayesian Binning (Naeini et al.,
    2015).
    """
    return _calibration_error("MCE", probs, labels, num_bins)


def evaluate(probs: Tensor, labels: Tensor) -> dict[str, float]:
    """All of it: "accuracy", "nll" (nats), "brier", "ece" and "ace" (15 bins).

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
    """
    return {
        "accuracy": accuracy(probs, labels),
        "nll": negative_log_likelihood(probs, labels),
        "brier": brier(probs, labels),
        "ece": expected_calibration_error(probs, labels),
        "ace": adaptive_calibration_error(probs, labels),
    }


def reliability_diagram(
    probs_by_method: Mapping[str, Tensor], labels: Tensor, num_bins: int = 15
) -> "Figure":
    """Accuracy against confidence, one panel per method, side by side.

    A bar is the accuracy in its bin, drawn darker the more examples it holds; the hatched part is
    the gap to the mean confidence of the bin, which a calibrated method does not have.

    Args:
        probs_by_method: Class probabilities of shape (n, c) by the title of their panel.
        labels: Class indices, shape (n,).
        num_bins: Number of bins of equal width.

    Returns:
        A figure that belongs to no window and no global state; save it with `figure.savefig`.
    """
    if not probs_by_method:
        raise ValueError("`probs_by_method` is empty: expected at least one method.")
    figure_class = _imported("matplotlib.figure").Figure
    count = len(probs_by_method)
    figure = figure_class(figsize=(3.1 * count + 0.5, 4.0), layout="constrained")
    panels = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, probs) in zip(panels, probs_by_method.items(), strict=True):
        ece = expected_calibration_error(probs, labels, num_bins)
        _draw_reliability(panel, *_top_label(probs, labels), num_bins)
        panel.set_title(f"{name}\nECE {ece:.3f}", fontsize=10)
        panel.set_xlabel("confidence")
    panels[0].set_ylabel("accuracy")
    panels[0].legend(loc="upper left", fontsize=8, frameon=False)
    return figure


def auroc(scores_in: Tensor, scores_out: Tensor) -> float:
    """Area under the ROC curve: P(score out > score in), ties counting one half.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.

    Raises:
        ValueError: If the scores are empty, not of shape (n,), or not finite. The same for every
            out-of-distribution metric here.
    """
    scores, is_out = _detection(scores_in, scores_out)
    return float(_imported("sklearn.metrics").roc_auc_score(is_out, scores))


def aupr(scores_in: Tensor, scores_out: Tensor) -> float:
    """Average precision with the out-of-distribution examples as positives; depends on n : m.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.
    """
    scores, is_out = _detection(scores_in, scores_out)
    return float(_imported("sklearn.metrics").average_precision_score(is_out, scores))


def fpr_at_95_tpr(scores_in: Tensor, scores_out: Tensor) -> float:
    """Share of in-distribution examples flagged when at least 95 % of the others are.

    Args:
        scores_in: Scores of in-distribution examples, shape (n,).
        scores_out: Scores of out-of-distribution examples, shape (m,); they should be higher.
    """
    scores, is_out = _detection(scores_in, scores_out)
    false_rate, true_rate, _ = _imported("sklearn.metrics").roc_curve(
        is_out, scores, drop_intermediate=False
    )
    return float(false_rate[true_rate >= 0.95].min())


def _checked(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Checked probabilities as float64 and labels as int64, both on the CPU."""
    if not isinstance(probs, Tensor) or not isinstance(labels, Tensor):
        raise TypeError(
            f"`probs` and `labels` must be tensors; got {type(probs).__name__} and "
            f"{type(labels).__name__}. Convert them with torch.as_tensor."
        )
    if probs.ndim != 2 or probs.shape[1] < 2 or len(probs) == 0:
        raise ValueError(
            f"`probs` must have shape (n, c) with n >= 1 and c >= 2; got {tuple(probs.shape)}. "
            f"For two classes give both probabilities."
        )
    if labels.shape != probs.shape[:1]:
        raise ValueError(f"`labels` must have shape ({len(probs)},); got {tuple(labels.shape)}.")
    probs, labels = probs.detach().cpu().double(), labels.detach().cpu()
    if not torch.isfinite(probs).all():
        raise ValueError("`probs` holds NaN or infinite values.")
    if (probs < 0).any() or ((probs.sum(1) - 1).abs() > ROW_SUM_TOLERANCE).any():
        raise ValueError(
            "The rows of `probs` must be probabilities; apply .softmax(-1) to logits."
        )
    check_class_labels(labels, probs.shape[1])
    return probs, labels.long()


def _checked_soft(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 probabilities of one shape (n, c), on the CPU."""
    checked = [_checked(part, part.argmax(1))[0] for part in (probs, targets)]
    if checked[0].shape != checked[1].shape:
        raise ValueError(
            f"`probs` and `targets` must have one shape; got {tuple(probs.shape)} and "
            f"{tuple(targets.shape)}."
        )
    return checked[0], checked[1]


def _of_labels(probs: Tensor, labels: Tensor) -> Tensor:
    return probs.gather(1, labels.unsqueeze(1)).squeeze(1)


def _top_label(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence in [0, 1] and correctness in {0, 1} of the most probable class, shape (n,)."""
    probs, labels = _checked(probs, labels)
    confidence, predicted = probs.max(1)
    return confidence.clamp_max(1), (predicted == labels).long()


def _calibration_error(name: str, probs: Tensor, labels: Tensor, num_bins: int) -> float:
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1; got {num_bins}.")
    # netcal gets (confidence, correct), not probs: with probs it would measure class 1 instead
    # of the top label whenever only two classes occur among the labels.
    confidence, correct = _top_label(probs, labels)
    if name == "ACE":
        confidence = _without_ties(confidence)
    # Without equal_intervals=False netcal's ACE is an average over bins of equal width.
    metric = getattr(_imported("netcal.metrics"), name)(num_bins, equal_intervals=name != "ACE")
    return float(metric.measure(confidence.numpy(), correct.numpy()))


def _without_ties(confidence: Tensor) -> Tensor:
    """Confidences moved by at most 1e-9 so that no two are equal, the order being kept.

    A confident network puts many at exactly 1.0, where bins of equal mass would have no width.
    """
    wide = confidence.double()
    ranks = wide.argsort(stable=True).argsort().double()
    return wide * (1 - 1e-9) + 1e-9 * ranks / len(wide)


def _detection(scores_in: Tensor, scores_out: Tensor) -> tuple["NDArray[Any]", "NDArray[Any]"]:
    """All scores (n + m,) and whether they are out of distribution."""
    parts = []
    for name, scores in (("scores_in", scores_in), ("scores_out", scores_out)):
        scores = torch.as_tensor(scores).detach().cpu().double()
        if scores.ndim != 1 or len(scores) == 0:
            raise ValueError(
                f"`{name}` must have shape (n,) with n >= 1; got {tuple(scores.shape)}."
            )
        if not torch.isfinite(scores).all():
            raise ValueError(f"`{name}` holds NaN or infinite values.")
        parts.append(scores)
    is_out = torch.cat([torch.zeros(len(parts[0])), torch.ones(len(parts[1]))])
    return torch.cat(parts).numpy(), is_out.numpy()


def _draw_reliability(panel: "Axes", confidence: Tensor, correct: Tensor, num_bins: int) -> None:
    # The top bin is closed: confidence exactly 1, which float32 softmax reaches, belongs to it.
    index = (confidence * num_bins).long().clamp_max(num_bins - 1)
    counts = torch.bincount(index, minlength=num_bins)
    filled = counts > 0
    mean_of = [
        torch.bincount(index, weights=values.double(), minlength=num_bins)[filled] / counts[filled]
        for values in (correct, confidence)
    ]
    bin_accuracy, bin_confidence = (mean.numpy() for mean in mean_of)
    centers = ((torch.arange(num_bins) + 0.5) / num_bins)[filled].numpy()
    shades = 0.35 + 0.65 * (counts[filled] / counts.max()).sqrt().numpy()
    colors = [(0.12, 0.38, 0.62, shade) for shade in shades]
    width = 0.94 / num_bins
    panel.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, zorder=3)
    panel.bar(centers, bin_accuracy, width, color=colors, label="accuracy")
    panel.bar(
        centers,
        bin_confidence - bin_accuracy,
        width,
        bottom=bin_accuracy,
        facecolor=(0.84, 0.24, 0.16, 0.18),
        edgecolor=(0.84, 0.24, 0.16, 0.8),
        hatch="////",
        linewidth=0.6,
        label="gap to confidence",
    )
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.spines[["top", "right"]].set_visible(False)


def _imported(name: str) -> Any:  # noqa: ANN401 - a module
    """Import a module of the `metrics` extra."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f'This metric needs {name.split(".")[0]}: pip install "ella[metrics]".'
        ) from error
