"""Metrics as functions of how often each example counts: what `Bootstrap` resamples.

With a count of 1 each they are those of `ella.metrics`. Shapes: n examples, m methods.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ella.report.bootstrap import Statistic

BINS = 15
"""Of calibration errors, of equal width, as in `ella.metrics`."""
LEVELS = 100
"""Steps between quantiles whose calibration is measured."""


def mean_of(losses: Tensor) -> Statistic:
    """Mean loss.

    Args:
        losses: Shape (n, m).
    """
    return lambda counts: counts @ losses / counts.sum()


def root_mean_of(losses: Tensor) -> Statistic:
    """Square root of the mean loss, such as RMSE of squared errors.

    Args:
        losses: Shape (n, m).
    """
    mean = mean_of(losses)
    return lambda counts: mean(counts).sqrt()


def distance_from(shares: Tensor, level: float) -> Statistic:
    """How far a mean is from what it should be; see `ella.metrics.interval_coverage`.

    Args:
        shares: Of the targets of each example that are in their interval, shape (n, m).
        level: Probability of the interval.
    """
    mean = mean_of(shares)
    return lambda counts: (mean(counts) - level).abs()


def quantile_error(quantiles: Tensor) -> Statistic:
    r"""Mean distance of shares of targets from levels, :math:`\frac{1}{99} \sum_j |F(p_j) - p_j|`.

    F(p) is the share of all targets whose probability integral transform is at most p, and p_j
    is .01, .02, ..., .99.

    Args:
        quantiles: The transforms, shape (n, c, m).

    Reference: Accurate Uncertainties for Deep Learning Using Calibrated Regression (Kuleshov et
    al., 2018), https://arxiv.org/abs/1807.00263; there squares are summed.
    """
    levels = torch.linspace(0, 1, LEVELS + 1, dtype=torch.float64)[1:-1]
    targets, methods = quantiles.shape[1:]
    bins = torch.bucketize(quantiles.flatten(0, 1).contiguous(), levels)

    def at(counts: Tensor) -> Tensor:
        times = counts.repeat_interleave(targets)[:, None].expand(-1, methods)
        sums = counts.new_zeros(LEVELS, methods).scatter_add(0, bins, times).cumsum(0)
        return (sums[:-1] / sums[-1] - levels[:, None]).abs().mean(0)

    return at


def mean_average_precision(probs: Tensor, labels: Tensor) -> Statistic:
    r"""Average precision, :math:`\sum_k (R_k - R_{k-1}) P_k` over thresholds, mean over labels.

    Labels that no example has are left out. With equal probabilities there is one threshold for
    all of them, as in scikit-learn.

    Args:
        probs: Shape (n, c, m).
        labels: 0 or 1, shape (n, c).
    """
    c, methods = probs.shape[1:]
    columns = -probs.flatten(1)
    order = columns.argsort(dim=0)
    ranked = columns.gather(0, order)
    positive = labels.double().unsqueeze(2).expand_as(probs).flatten(1).gather(0, order)
    last = torch.searchsorted(ranked.T.contiguous(), ranked.T.contiguous(), right=True).T - 1

    def at(counts: Tensor) -> Tensor:
        times = counts[order]
        hits = times * positive
        found, chosen = hits.cumsum(0), times.cumsum(0)
        precision = (found / chosen.clamp_min(1)).gather(0, last)
        total = found[-1]
        each = ((hits * precision).sum(0) / total.clamp_min(1)).view(c, methods)
        return each.sum(0) / (total.view(c, methods) > 0).sum(0).clamp_min(1)

    return at


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


def area_under_retention(scores: Tensor, losses: Tensor) -> Statistic:
    """Mean loss of the 1, 2, ..., n surest examples, averaged; of equal scores in random order.

    Without ties it is `ella.metrics.area_under_risk_coverage`. With them it is what that is on
    average over the order of the data: a method with one score for all has its mean loss.

    Args:
        scores: Uncertainty, shape (n, m).
        losses: Shape (n, m).
    """
    return _retained(scores, losses, lambda kept: kept.mean())


def retained_at(scores: Tensor, losses: Tensor, level: float) -> Statistic:
    """The largest share of examples, surest first, whose mean loss is at most `level`; 0 if none.

    Args:
        scores: Uncertainty, shape (n, m).
        losses: Shape (n, m).
        level: The mean loss that is allowed.
    """
    return _retained(scores, losses, lambda kept: kept.new_tensor(kept_at(kept, level)))


def retained_errors(scores: Tensor, losses: Tensor) -> Tensor:
    """Expected mean loss of the 1, 2, ..., n surest examples, of one method, shape (n,)."""
    found: list[Tensor] = []

    def kept(losses: Tensor) -> Tensor:
        found.append(losses)
        return losses[-1]

    _retained(scores[:, None], losses[:, None], kept)(torch.ones_like(losses))
    return found[0]


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


def _retained(scores: Tensor, losses: Tensor, number: Callable[[Tensor], Tensor]) -> Statistic:
    """What follows from mean losses of the surest, a loss being the mean of those that tie."""
    columns = []
    for score, loss in zip(scores.T, losses.T, strict=True):
        order = score.argsort()
        _, groups = score[order].unique_consecutive(return_inverse=True)
        columns.append((order, groups, loss[order]))

    def of_one(order: Tensor, groups: Tensor, loss: Tensor, counts: Tensor) -> Tensor:
        times = counts[order]
        sums = times.new_zeros(2, int(groups[-1]) + 1)
        sums.index_add_(1, groups, torch.stack([times * loss, times]))
        means = (sums[0] / sums[1].clamp_min(1))[groups]
        repeated = means.repeat_interleave(times.long())
        sizes = torch.arange(1, len(repeated) + 1, dtype=torch.float64)
        return number(repeated.cumsum(0) / sizes)

    return lambda counts: torch.stack([of_one(*each, counts) for each in columns])
