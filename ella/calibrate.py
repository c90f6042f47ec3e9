"""The search over (prior precision δ, temperature T, output scale) shared by every method.

A method hands over `gaussian_at(δ)`, the Gaussian over its logits on validation data at prior
precision δ, computed from cached features. Nothing here knows how it was made.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

from ella.predictive import Link, LogitGaussian

REACH = math.log(30.0)
"""How far T and the output scale may move from 1 (from σ²), in the log."""

TEMPERATURE_SPREAD = 2.0
"""Standard deviation of log T under the hyperprior."""


class Score(Protocol):
    """Validation negative log-likelihood of a Gaussian over outputs, in nats per example."""

    @property
    def scale_spread(self) -> float:
        """Standard deviation of the log output scale under the hyperprior."""

    def __call__(self, gaussian: LogitGaussian, temperature: float, scale: float) -> float:
        """The score at posterior temperature T ≥ 0 and output scale > 0."""

    def prepared(self, gaussian: LogitGaussian) -> Callable[[float, float], float]:
        """(T > 0, scale) ↦ the score, to be tried at many of them."""
        return lambda temperature, scale: self(gaussian, temperature, scale)


@dataclass(frozen=True)
class ClassificationScore(Score):
    """Negative log-likelihood of labels; the scale is the logit temperature τ.

    Attributes:
        labels: Class indices, shape (n,).
        link: How logits become probabilities; the one used for prediction.
        scale_spread: See `Score`.
    """

    labels: Tensor
    link: Link
    scale_spread: float = 0.5

    def __call__(self, gaussian: LogitGaussian, temperature: float, scale: float) -> float:
        """Mean of −log p(y), with p floored at the smallest float of its dtype."""
        if temperature == 0:
            return self._of((gaussian.mean / scale).log_softmax(-1))
        return self.prepared(gaussian)(temperature, scale)

    def prepared(self, gaussian: LogitGaussian) -> Callable[[float, float], float]:
        """See `Score.prepared`."""
        probabilities = self.link.tempered(gaussian)

        def score(temperature: float, scale: float) -> float:
            probs = probabilities(temperature, scale)
            return self._of(probs.clamp_min(torch.finfo(probs.dtype).tiny).log())

        return score

    def _of(self, log_probs: Tensor) -> float:
        return -log_probs.gather(1, self.labels.unsqueeze(1)).double().mean().item()


@dataclass(frozen=True)
class RegressionScore(Score):
    """Negative log-likelihood of real targets; the scale is the noise variance σ².

    Attributes:
        targets: Shape (n, c).
        scale_spread: See `Score`.
    """

    targets: Tensor
    scale_spread: float = 3.0

    def __call__(self, gaussian: LogitGaussian, temperature: float, scale: float) -> float:
        """Mean of −log N(y; m, T·S + σ²), outputs taken as independent given x."""
        variance = temperature * gaussian.variance().double() + scale
        error = (self.targets - gaussian.mean).double().square()
        return (0.5 * (error / variance + (2 * math.pi * variance).log())).sum(-1).mean().item()


@dataclass(frozen=True)
class Tuning:
    """What the search chose, and what it was compared with (all scores on the validation data).

    Attributes:
        prior_precision: δ.
        temperature: T; 0 means that the posterior was switched off (temperature scaling or MAP).
        scale: Logit temperature τ, or noise variance σ² for regression.
        nll: Negative log-likelihood reached, in nats per example.
        map_nll: The same for T = 0 at the initial scale.
        scaled_nll: The same for T = 0 at the best scale: temperature scaling.
        num_examples: Number of validation examples.
        at_edge: Whether the best δ lies at an end of the grid.
    """

    prior_precision: float
    temperature: float
    scale: float
    nll: float
    map_nll: float
    scaled_nll: float
    num_examples: int
    at_edge: bool


def precision_grid(prior_variance: float, num: int = 15) -> list[float]:
    """Prior precisions at which the prior standard deviation of a logit runs from 30 to 0.03.

    Args:
        prior_variance: Mean of diag κ(x, x), the prior variance of a logit at δ = 1.
        num: Number of grid points, evenly spaced in log δ.
    """
    low, high = math.log10(prior_variance / 30**2), math.log10(prior_variance / 0.03**2)
    return [10 ** (low + (high - low) * i / (num - 1)) for i in range(num)]


def search(
    gaussian_at: Callable[[float], LogitGaussian],
    score: Score,
    precisions: list[float],
    *,
    initial_scale: float = 1.0,
) -> Tuning:
    """Minimise the validation score over (δ, T, scale).

    δ runs over a grid, refined once around its best point; for each δ, T and the scale are found
    by compass search in the log domain, started from the neighbouring δ's optimum. Log-normal
    hyperpriors around T = 1 and the initial scale, worth less than a nat in total for ordinary
    values, keep small validation sets from choosing extremes (many draws that vote, τ near 0).
    T = 0 with the initial scale (the MAP) and with the best scale (temperature scaling) are
    candidates, so the result is never worse than either on these data.

    Args:
        gaussian_at: δ ↦ Gaussian over the outputs of the validation inputs.
        score: Validation negative log-likelihood.
        precisions: Increasing grid of δ; empty for a method that has none.
        initial_scale: Scale of the MAP: 1 for logits, the fitted noise variance for regression.

    Raises:
        ValueError: If the score of the MAP is not finite.
    """
    largest = precisions[-1] if precisions else 1.0
    plain = gaussian_at(largest)
    n = len(plain.mean)
    map_nll = score(plain, 0.0, initial_scale)
    if not math.isfinite(map_nll):
        raise ValueError(
            "The validation NLL of the model itself is not finite. Check its outputs."
        )
    at = (math.log(initial_scale),)
    (scale,), scaled_nll = _compass(lambda logs: score(plain, 0.0, math.exp(logs[0])), at, at)
    best = min(
        (map_nll, largest, 0.0, initial_scale),
        (scaled_nll, largest, 0.0, math.exp(scale)),
    )
    at_edge = False
    found: dict[float, tuple[float, tuple[float, ...]]] = {}

    origin = (0.0, math.log(initial_scale))
    spreads = (TEMPERATURE_SPREAD, score.scale_spread)

    def penalty(logs: tuple[float, ...]) -> float:
        """Negative log hyperprior per example."""
        terms = zip(logs, origin, spreads, strict=True)
        return sum(((log - at) / spread) ** 2 for log, at, spread in terms) / (2 * n)

    def optimise_at(precision: float, start: tuple[float, ...]) -> tuple[float, ...]:
        score_at = score.prepared(gaussian_at(precision).compressed())

        def objective(logs: tuple[float, ...]) -> float:
            return score_at(math.exp(logs[0]), math.exp(logs[1])) + penalty(logs)

        # The neighbour's optimum is near: a smaller first step than from nowhere.
        logs, value = _compass(objective, start, origin, step=0.4 if found else 1.0)
        found[precision] = (value, logs)
        return logs

    if precisions:
        start: tuple[float, ...] = origin
        for precision in reversed(precisions):  # from nearly the MAP towards a wide posterior
            start = optimise_at(precision, start)
        centre = min(found, key=lambda precision: found[precision][0])
        step = math.sqrt(precisions[-1] / precisions[0]) ** (1 / max(len(precisions) - 1, 1))
        for precision in (centre / step, centre * step):
            optimise_at(precision, found[centre][1])
        precision = min(found, key=lambda precision: found[precision][0])
        value, logs = found[precision]
        nll, (log_temperature, log_scale) = value - penalty(logs), logs
        best = min(best, (nll, precision, math.exp(log_temperature), math.exp(log_scale)))
        at_edge = best[2] > 0 and not precisions[0] < precision < precisions[-1]
    return Tuning(
        prior_precision=best[1],
        temperature=best[2],
        scale=best[3],
        nll=best[0],
        map_nll=map_nll,
        scaled_nll=scaled_nll,
        num_examples=n,
        at_edge=at_edge,
    )


def _compass(
    function: Callable[[tuple[float, ...]], float],
    start: tuple[float, ...],
    origin: tuple[float, ...],
    step: float = 1.0,
) -> tuple[tuple[float, ...], float]:
    """Compass search: try all 3^d − 1 directions, move to the best, else halve the step.

    The point stays within `REACH` of `origin` along each axis.
    """
    known: dict[tuple[float, ...], float] = {}

    def at(point: tuple[float, ...]) -> float:
        # A step shares up to five of its nine points with the step before.
        key = tuple(round(p, 9) for p in point)
        if key not in known:
            known[key] = function(point)
        return known[key]

    point, value = start, at(start)
    while step > 0.05:
        neighbours = [(at(p), p) for p in _neighbours(point, origin, step)]
        best_value, best_point = min(neighbours)
        if best_value < value - 1e-7:
            point, value = best_point, best_value
        else:
            step /= 2
    return point, value


def _neighbours(
    point: tuple[float, ...], origin: tuple[float, ...], step: float
) -> Iterator[tuple[float, ...]]:
    # Diagonals too: more variance and a sharper mean trade off along a narrow valley.
    for signs in product((-1, 0, 1), repeat=len(point)):
        moved = (p + sign * step for p, sign in zip(point, signs, strict=True))
        # When a small validation set is classified without error, the score has no minimum: stop
        # where no useful temperature lies.
        yield tuple(
            min(max(m, at - REACH), at + REACH) for m, at in zip(moved, origin, strict=True)
        )
