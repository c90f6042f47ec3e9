"""How good class probabilities are: numbers from (probs, labels)."""

import torch
from torch import Tensor

from ella.metrics._checked import checked, checked_soft
from ella.metrics.calibration import adaptive_calibration_error, expected_calibration_error


def accuracy(probs: Tensor, labels: Tensor) -> float:
    """Share of examples whose most probable class is the label.

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).

    Raises:
        TypeError: If the labels are not integers.
        ValueError: If shapes or values are bad. The same for every metric here.
    """
    probs, labels = checked(probs, labels)
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
    probs, labels = checked(probs, labels)
    return -_of_labels(probs, labels).clamp_min(tiny).log().mean().item()


def brier(probs: Tensor, labels: Tensor) -> float:
    r"""The Brier score :math:`\frac{1}{n} \sum_i \sum_c (p_{ic} - [y_i = c])^2`, in [0, 2].

    Args:
        probs: Class probabilities, shape (n, c).
        labels: Class indices, shape (n,).

    Reference: Verification of forecasts expressed in terms of probability (Brier, 1950).
    """
    probs, labels = checked(probs, labels)
    one_hot = torch.nn.functional.one_hot(labels, probs.shape[1])
    return (probs - one_hot).square().sum(1).mean().item()


def cross_entropy_to(probs: Tensor, targets: Tensor) -> float:
    r"""Mean cross-entropy :math:`-\sum_c t_{ic} \log p_{ic}` to soft labels, in nats.

    Args:
        probs: Class probabilities, shape (n, c).
        targets: Probabilities too, such as the shares of people who chose each class.
    """
    tiny = torch.finfo(probs.dtype).tiny if probs.is_floating_point() else 0.0
    probs, targets = checked_soft(probs, targets)
    return -(targets * probs.clamp_min(tiny).log()).sum(1).mean().item()


def divergence_from(probs: Tensor, targets: Tensor) -> float:
    """Mean Kullback-Leibler divergence KL(targets ‖ probs), in nats; see `cross_entropy_to`."""
    soft = checked_soft(probs, targets)[1]
    return cross_entropy_to(probs, targets) + torch.xlogy(soft, soft).sum(1).mean().item()


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


def _of_labels(probs: Tensor, labels: Tensor) -> Tensor:
    return probs.gather(1, labels.unsqueeze(1)).squeeze(1)
