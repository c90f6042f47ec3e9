"""Metrics as functions of how often each example counts: what `Bootstrap` resamples.

With a count of 1 each they are those of `ella.metrics`. Shapes: n examples, m methods.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ella.report.bootstrap import Statistic

BINS = 15
"""Of calibration errors, of equal width, as in `ella.metrics`."""


def mean_of(losses: Tensor) -> Statistic:
    """Mean loss.

    Args:
        losses: Shape (n, m).
    """
    return lambda counts: counts @ losses / counts.sum()


def calibration_error(confidence: Tensor, correct: Tensor) -> Statistic:
    """ECE of the most probable class; see `ella.metrics.expected_calibration_error`.

    Args:
        confidence: Its probability, shape (n, m).
        correct: Whether it is the label, shape (n, m).
    """
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(confidence.contiguous(), edges, right=True)
    gaps = confidence - correct.double()

    def at(counts: Tensor) -> Tensor:
        sums = gaps.new_zeros(BINS, gaps.shape[1]).scatter_add(0, bins, counts[:, None] * gaps)
        return sums.abs().sum(0) / counts.sum()

    return at


def gap_where(chosen: Tensor, confidence: Tensor, correct: Tensor) -> Statistic:
    """Mean confidence less accuracy over some examples, which differ by method.

    Args:
        chosen: Which, shape (n, m).
        confidence: Shape (n, m).
        correct: Shape (n, m).
    """
    share, gaps = chosen.double(), (confidence - correct.double()) * chosen
    return lambda counts: counts @ gaps / (counts @ share).clamp_min(1)


def area_under_risk_coverage(scores: Tensor, wrong: Tensor) -> Statistic:
    """AURC; see `ella.metrics.area_under_risk_coverage`.

    Args:
        scores: Uncertainty, shape (n, m).
        wrong: Whether the prediction is, shape (n, m).
    """
    return _selective(scores, wrong, lambda risks: risks.mean())


def coverage_at(scores: Tensor, wrong: Tensor, risk: float) -> Statistic:
    """The largest share of examples, surest first, whose error rate is at most `risk`; 0 if none.

    Args:
        scores: Uncertainty, shape (n, m).
        wrong: Whether the prediction is, shape (n, m).
        risk: The error rate that is allowed.
    """
    return _selective(scores, wrong, lambda risks: risks.new_tensor(kept_at(risks, risk)))


def kept_at(risks: Tensor, risk: float) -> float:
    """Share of examples that may be kept, from the error rates of the 1, 2, ..., n surest."""
    allowed = (risks <= risk).nonzero()
    return (int(allowed[-1]) + 1) / len(risks) if len(allowed) else 0.0


def auroc(scores_in: Tensor, scores_out: Tensor) -> Statistic:
    """P(score out > score in), ties counting one half; see `ella.metrics.auroc`.

    Args:
        scores_in: Shape (n, m).
        scores_out: Of other examples, whose counts come second, shape (n', m).
    """
    ranked = []
    for inside, outside in zip(scores_in.T, scores_out.T, strict=True):
        values, ranks = torch.cat([inside, outside]).unique(return_inverse=True)
        ranked.append((len(values), ranks[: len(inside)], ranks[len(inside) :]))

    def of_one(size: int, ins: Tensor, outs: Tensor, counts: tuple[Tensor, Tensor]) -> Tensor:
        here, there = (
            torch.zeros(size, dtype=torch.float64).index_add(0, ranks, count)
            for ranks, count in zip((ins, outs), counts, strict=True)
        )
        lower = here.cumsum(0) - here / 2
        return (there * lower).sum() / (here.sum() * there.sum())

    return lambda *counts: torch.stack([of_one(*each, counts) for each in ranked])


def _selective(scores: Tensor, wrong: Tensor, number: Callable[[Tensor], Tensor]) -> Statistic:
    """What follows from the error rates of the 1, 2, ..., n surest examples."""
    orders = scores.argsort(dim=0, stable=True)
    errors = wrong.double().gather(0, orders)

    def at(counts: Tensor) -> Tensor:
        times = counts.long()
        repeated = [
            each.repeat_interleave(times[order])
            for each, order in zip(errors.T, orders.T, strict=True)
        ]
        sizes = torch.arange(1, len(repeated[0]) + 1, dtype=torch.float64)
        return torch.stack([number(each.cumsum(0) / sizes) for each in repeated])

    return at
