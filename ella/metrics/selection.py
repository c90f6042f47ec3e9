"""Selective prediction: how few errors are left when the least certain examples are refused."""

import torch
from torch import Tensor

from ella.metrics._checked import Array, check_one_shape, scores_of_examples


def risk_coverage(scores: Array, errors: Array) -> tuple[Tensor, Tensor]:
    """Selective prediction: the error rate among the examples that one is surest of.

    Args:
        scores: Uncertainty, higher meaning less certain, shape (n,).
        errors: Whether the prediction was wrong, or any loss, shape (n,).

    Returns:
        Coverage 1/n, 2/n, ..., 1 and the mean error at each, ties in the order given, as float64
        tensors.

    Raises:
        TypeError: If an argument is neither a tensor nor a NumPy array.
        ValueError: If shapes or values are bad.

    Reference: Selective Classification for Deep Neural Networks (Geifman & El-Yaniv, 2017),
    https://arxiv.org/abs/1705.08500
    """
    uncertain, wrong = scores_of_examples("scores", scores), scores_of_examples("errors", errors)
    check_one_shape(scores=uncertain, errors=wrong)
    counts = torch.arange(1, len(uncertain) + 1, dtype=torch.float64)
    return counts / len(uncertain), wrong[uncertain.argsort(stable=True)].cumsum(0) / counts


def area_under_risk_coverage(scores: Array, errors: Array) -> float:
    """AURC, the mean of `risk_coverage` over coverages; lower is better."""
    return risk_coverage(scores, errors)[1].mean().item()
