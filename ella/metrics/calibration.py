"""How far confidence is from accuracy, by netcal (extra `metrics`)."""

from torch import Tensor

from ella.metrics._checked import Array, probs_and_labels
from ella.metrics._extras import imported


def expected_calibration_error(probs: Array, labels: Array, num_bins: int = 15) -> float:
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


def adaptive_calibration_error(probs: Array, labels: Array, num_bins: int = 15) -> float:
    r"""ACE: the mean over bins of equal *mass* of :math:`|acc_b - conf_b|`, top label only.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
        num_bins: Number of bins; equal confidences fill them in the order given.

    Reference: Measuring Calibration in Deep Learning (Nixon et al., 2019),
    https://arxiv.org/abs/1904.01685
    """
    return _calibration_error("ACE", probs, labels, num_bins)


def maximum_calibration_error(probs: Array, labels: Array, num_bins: int = 15) -> float:
    r"""MCE: the largest :math:`|acc_b - conf_b|` over bins of equal width.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
        num_bins: Number of bins. A bin with few examples dominates it.

    Reference: Obtaining Well Calibrated Probabilities Using Bayesian Binning (Naeini et al.,
    2015).
    """
    return _calibration_error("MCE", probs, labels, num_bins)


def classwise_calibration_error(probs: Array, labels: Array, num_bins: int = 15) -> float:
    r"""Classwise ECE: the mean over classes of the ECE of :math:`p_c` for "the label is c".

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
        num_bins: Number of bins of equal width.

    Reference: Beyond temperature scaling: Obtaining well-calibrated multiclass probabilities with
    Dirichlet calibration (Kull et al., 2019), https://arxiv.org/abs/1910.12656
    """
    _check_bins(num_bins)
    rows, classes = probs_and_labels(probs, labels)
    metric = imported("netcal.metrics").ECE(num_bins)
    errors = [
        float(metric.measure(column.clamp_max(1).numpy(), (classes == c).long().numpy()))
        for c, column in enumerate(rows.T)
    ]
    return sum(errors) / len(errors)


def top_label(probs: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """Confidence in [0, 1] and correctness in {0, 1} of the most probable class, shape (n,)."""
    rows, classes = probs_and_labels(probs, labels)
    confidence, predicted = rows.max(1)
    return confidence.clamp_max(1), (predicted == classes).long()


def _calibration_error(name: str, probs: Array, labels: Array, num_bins: int) -> float:
    _check_bins(num_bins)
    # netcal gets (confidence, correct), not probs: with probs it would measure class 1 instead
    # of the top label whenever only two classes occur among the labels.
    confidence, correct = top_label(probs, labels)
    if name == "ACE":
        confidence = _without_ties(confidence)
    # Without equal_intervals=False netcal's ACE is an average over bins of equal width.
    metric = getattr(imported("netcal.metrics"), name)(num_bins, equal_intervals=name != "ACE")
    return float(metric.measure(confidence.numpy(), correct.numpy()))


def _check_bins(num_bins: int) -> None:
    if num_bins < 1:
        raise ValueError(f"`num_bins` must be at least 1; got {num_bins}.")


def _without_ties(confidence: Tensor) -> Tensor:
    """Confidences moved by at most 1e-9 so that no two are equal, the order being kept.

    A confident network puts many at exactly 1.0, where bins of equal mass would have no width.
    """
    ranks = confidence.argsort(stable=True).argsort()
    return confidence * (1 - 1e-9) + 1e-9 * ranks / len(confidence)
