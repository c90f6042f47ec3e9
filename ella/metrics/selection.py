"""Selective prediction: how few errors are left when the least certain examples are refused."""

import torch
from torch import Tensor


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
