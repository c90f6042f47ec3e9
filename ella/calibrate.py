"""The search over (prior precision δ, temperature T, scale) shared by every method.

A method hands over `gaussian_at(δ)`, the Gaussian over its outputs on validation data at prior
precision δ, computed from cached features. Nothing here knows how it was made.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from torch import Tensor

from ella.likelihoods import Likelihood
from ella.predictive import Link, LogitGaussian

REACH = math.log(30.0)
"""How far T and the scale may move from 1 (from σ²), in the log."""

TEMPERATURE_SPREAD = 2.0
"""Standard deviation of log T under the hyperprior."""


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers that shape the predictive; set by the user, by `fit` or by `calibrate`.

    Attributes:
        prior_precision: δ = 1/σ₀², the precision of the Gaussian prior on every weight.
        temperature: T, multiplies the posterior covariance; 0 for no posterior at all.
        logit_temperature: τ, divides the outputs (all but `Normal`).
        noise_variance: σ² of the Gaussian likelihood (`Normal`).

    Raises:
        ValueError: If a number is not finite or not above 0 (T: below 0).
    """

    prior_precision: float
    temperature: float = 1.0
    logit_temperature: float = 1.0
    noise_variance: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            zero = name == "temperature" and value == 0
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and (zero or 0 < value < math.inf)):
                raise ValueError(f"`{name}` must be a finite number above 0; got {value!r}.")

    def scale(self, likelihood: Likelihood) -> float:
        """The number that is this likelihood's scale."""
        value: float = getattr(self, likelihood.scale)
        return value

    def unit_precision(self, likelihood: Likelihood) -> float:
        """The precision s·δ that stands for δ at unit dispersion."""
        return self.prior_precision * likelihood.dispersion(self.scale(likelihood))

    def gaussian(
        self, gaussian_at: Callable[[float], LogitGaussian], likelihood: Likelihood
    ) -> LogitGaussian:
        """The Gaussian over the outputs at these numbers.

        Args:
            gaussian_at: δ ↦ the one at T = τ = 1 and unit dispersion.
            likelihood: Gives the dispersion s: with it S is s·S at the precision s·δ.
        """
        dispersion = likelihood.dispersion(self.scale(likelihood))
        return gaussian_at(self.unit_precision(likelihood)).tempered(
            self.temperature * dispersion, self.logit_temperature
        )


@dataclass(frozen=True)
class Tuning:
    """What the search chose, and what it was compared with (all scores on the validation data).

    Attributes:
        hyperparameters: The choice. T = 0 means that the posterior was switched off (temperature
            scaling or MAP).
        posterior: The best with T > 0, which epistemic scores use; the choice if it has T > 0, and
            None for a method without a posterior.
        nll: Negative log-likelihood reached, in nats per example.
        map_nll: The same for T = 0 at the initial scale.
        scaled_nll: The same for T = 0 at the best scale: temperature scaling.
        num_examples: Number of validation examples.
        edges: Names of the hyperparameters that lie at an end of what was searched.
    """

    hyperparameters: Hyperparameters
    posterior: Hyperparameters | None
    nll: float
    map_nll: float
    scaled_nll: float
    num_examples: int
    edges: tuple[str, ...] = ()


def precision_grid(prior_variance: float, num: int = 15) -> list[float]:
    """Prior precisions at which the prior standard deviation of an output runs from 30 to 0.03.

    Args:
        prior_variance: Mean of diag κ(x, x), the prior variance of an output at δ = 1.
        num: Number of grid points, evenly spaced in log δ.
    """
    low, high = math.log10(prior_variance / 30**2), math.log10(prior_variance / 0.03**2)
    return [10 ** (low + (high - low) * i / (num - 1)) for i in range(num)]


@dataclass(frozen=True)
class Point:
    """Somewhere in the search.

    Attributes:
        value: Negative log-likelihood plus negative log hyperprior, a validation example.
        nll: Without the hyperprior.
        precision: δ at unit dispersion.
        temperature: T.
        scale: The likelihood's.
    """

    value: float
    nll: float
    precision: float
    temperature: float
    scale: float

    def hyperparameters(self, likelihood: Likelihood) -> Hyperparameters:
        """In the user's terms."""
        precision = self.precision / likelihood.dispersion(self.scale)
        plain = Hyperparameters(precision, self.temperature)
        return replace(plain, **{likelihood.scale: self.scale})


@dataclass(frozen=True)
class Search:
    """Minimises the validation score over (δ, T, scale).

    Attributes:
        gaussian_at: δ ↦ Gaussian over the outputs of the validation inputs.
        likelihood: Gives losses, and what its scale is.
        y: Targets that it has checked.
        link: How outputs become predictions.
        initial_scale: Scale of the MAP: 1 for logits, the fitted noise variance for regression.
    """

    gaussian_at: Callable[[float], LogitGaussian]
    likelihood: Likelihood
    y: Tensor
    link: Link
    initial_scale: float = 1.0

    def run(self, precisions: list[float]) -> Tuning:
        """Try every δ of an increasing grid, which is empty for a method that has none.

        δ runs over the grid, refined once around its best point; for each δ, T and the scale are
        found by compass search in the log domain, started from the neighbouring δ's optimum.

        Raises:
            ValueError: If the score of the MAP is not finite.
        """
        plain, scaled = self.without_posterior(precisions[-1] if precisions else 1.0)
        best = min((plain, scaled), key=lambda point: point.value)
        posterior = self.with_posterior(precisions) if precisions else None
        if posterior is not None and posterior.value < best.value:
            best = posterior
        found = None if posterior is None else posterior.hyperparameters(self.likelihood)
        return Tuning(
            hyperparameters=best.hyperparameters(self.likelihood),
            posterior=found,
            nll=best.nll,
            map_nll=plain.nll,
            scaled_nll=scaled.nll,
            num_examples=self.num_examples,
            edges=self.edges(best, precisions),
        )

    @property
    def num_examples(self) -> int:
        """Validation examples that count."""
        return self.likelihood.num_counted(self.y)

    def penalty(self, log_temperature: float, log_scale: float) -> float:
        """Negative log hyperprior per example: log-normal around T = 1 and the initial scale.

        Worth less than a nat in total for ordinary values, it keeps small validation sets from
        choosing extremes (many draws that vote, τ near 0).
        """
        moved = log_scale - math.log(self.initial_scale)
        terms = (log_temperature / TEMPERATURE_SPREAD, moved / self.likelihood.scale_spread)
        return sum(term**2 for term in terms) / (2 * self.num_examples)

    def without_posterior(self, precision: float) -> tuple[Point, Point]:
        """The MAP, and temperature scaling."""
        losses = self.likelihood.losses(self.gaussian_at(precision), self.y, self.link)
        origin = (math.log(self.initial_scale),)

        def nll(logs: tuple[float, ...]) -> float:
            return losses(0.0, math.exp(logs[0])).mean().item()

        if not math.isfinite(nll(origin)):
            raise ValueError(
                "The validation NLL of the model itself is not finite. Check its outputs."
            )
        logs, value = compass(lambda logs: nll(logs) + self.penalty(0.0, logs[0]), origin, origin)
        plain = Point(nll(origin), nll(origin), precision, 0.0, self.initial_scale)
        return plain, Point(value, nll(logs), precision, 0.0, math.exp(logs[0]))

    def with_posterior(self, precisions: list[float]) -> Point:
        """The best point with T > 0."""
        found: list[Point] = []
        for precision in reversed(precisions):  # from nearly the MAP towards a wide posterior
            found.append(self._at(precision, found[-1] if found else None))
        centre = min(found, key=lambda point: point.value)
        step = math.sqrt(precisions[-1] / precisions[0]) ** (1 / max(len(precisions) - 1, 1))
        for precision in (centre.precision / step, centre.precision * step):
            found.append(self._at(precision, centre))
        return min(found, key=lambda point: point.value)

    def _at(self, precision: float, neighbour: Point | None) -> Point:
        """The best T and scale at one δ, started where a neighbouring δ has them."""
        gaussian = self.gaussian_at(precision).compressed()
        losses = self.likelihood.losses(gaussian, self.y, self.link)
        origin = (0.0, math.log(self.initial_scale))
        start = origin
        if neighbour is not None:
            start = (math.log(neighbour.temperature), math.log(neighbour.scale))

        def nll(logs: tuple[float, ...]) -> float:
            return losses(math.exp(logs[0]), math.exp(logs[1])).mean().item()

        logs, value = compass(
            lambda logs: nll(logs) + self.penalty(*logs),
            start,
            origin,
            # The neighbour's optimum is near: a smaller first step than from nowhere.
            step=1.0 if neighbour is None else 0.4,
        )
        temperature, scale = (math.exp(log) for log in logs)
        return Point(value, value - self.penalty(*logs), precision, temperature, scale)

    def edges(self, point: Point, precisions: list[float]) -> tuple[str, ...]:
        """Hyperparameters at an end of what was searched."""
        found = []
        if point.temperature > 0 and not precisions[0] < point.precision < precisions[-1]:
            found.append("prior_precision")
        if abs(math.log(point.scale / self.initial_scale)) > REACH - 1e-6:
            found.append(self.likelihood.scale)
        return tuple(found)


def compass(
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
