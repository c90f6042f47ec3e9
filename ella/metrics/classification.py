"""How good class probabilities are: numbers from (probs, labels)."""

import torch

from ella.metrics._checked import (
    Array,
    probs_and_bits,
    probs_and_labels,
    probs_and_targets,
    smallest,
)
from ella.metrics.calibration import adaptive_calibration_error, expected_calibration_error


def accuracy(probs: Array, labels: Array) -> float:
    """Share of examples whose most probable class is the label.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).

    Raises:
        TypeError: If the labels are not integers, or an argument is neither a tensor nor a NumPy
            array; lists are refused.
        ValueError: If shapes or values are bad. The same for every metric here.
    """
    rows, classes = probs_and_labels(probs, labels)
    return (rows.argmax(1) == classes).double().mean().item()


def negative_log_likelihood(probs: Array, labels: Array) -> float:
    r"""Mean negative log-likelihood :math:`-\frac{1}{n} \sum_i \log p_{i, y_i}`, in nats.

    Probabilities are floored at the smallest normal number of their dtype, so that one saturated
    float32 softmax gives a large number, not infinity.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).
    """
    rows, classes = probs_and_labels(probs, labels)
    own = rows.gather(1, classes.unsqueeze(1))
    return -own.clamp_min(smallest(probs)).log().mean().item()


def binary_negative_log_likelihood(probs: Array, targets: Array) -> float:
    r"""Mean negative log-likelihood of independent yes-or-no labels, in nats an example.

    .. math:: -\frac{1}{n} \sum_i \sum_c
        \big( y_{ic} \log p_{ic} + (1 - y_{ic}) \log (1 - p_{ic}) \big)

    Both p and 1 - p are floored as in `negative_log_likelihood`, which for two classes is this
    with the probability of the second one.

    Args:
        probs: Probability of each label, shape (n, c), or (n,) for c = 1. Rows need not sum to 1.
        targets: Whether it applies, 0 or 1 in any dtype, in the same shape.
    """
    yes, applies = probs_and_bits(probs, targets)
    own = torch.where(applies, yes, 1 - yes)
    return -own.clamp_min(smallest(probs)).log().sum(1).mean().item()


def brier(probs: Array, labels: Array) -> float:
    r"""The Brier score :math:`\frac{1}{n} \sum_i \sum_c (p_{ic} - [y_i = c])^2`, in [0, 2].

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).

    Reference: Verification of forecasts expressed in terms of probability (Brier, 1950).
    """
    rows, classes = probs_and_labels(probs, labels)
    one_hot = torch.nn.functional.one_hot(classes, rows.shape[1])
    return (rows - one_hot).square().sum(1).mean().item()


def cross_entropy_to(probs: Array, targets: Array) -> float:
    r"""Mean cross-entropy :math:`-\sum_c t_{ic} \log p_{ic}` to soft labels, in nats.

    Args:
        probs: Class probabilities, shape (n, c).
        targets: Probabilities too, such as the shares of people who chose each class.
    """
    rows, soft = probs_and_targets(probs, targets)
    return -(soft * rows.clamp_min(smallest(probs)).log()).sum(1).mean().item()


def divergence_from(probs: Array, targets: Array) -> float:
    """Mean Kullback-Leibler divergence KL(targets ‖ probs), in nats; see `cross_entropy_to`."""
    _, soft = probs_and_targets(probs, targets)
    return cross_entropy_to(probs, targets) + torch.xlogy(soft, soft).sum(1).mean().item()


def evaluate(probs: Array, labels: Array) -> dict[str, float]:
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
