"""The search over (prior precision δ, temperature T, scale) shared by every method.

A method hands over `gaussian_at(δ)`, the Gaussian over its outputs on validation data at prior
precision δ, computed from cached features. Nothing here knows how it was made.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from ella.hyperparameters import Hyperparameters, Tuning
from ella.hyperprior import (
    REACH,
    Function,
    Hyperprior,
    Lattice,
    Logs,
    compass,
    log_sum,
    means,
)
from ella.likelihoods import Likelihood
from ella.links import Link
from ella.predictive import LogitGaussian
from ella.processes import Processes
from ella.validation import Score

NO_DISTANCE = 1e-6
"""Mean fourth power of distances, which is about 1, below which they are rounding."""

SHIFTED_WEIGHT = 0.03
"""Of the negative log-likelihood of shifted validation data, beside that of those as they are."""

EXPONENT_SPREAD = 0.5
"""Standard deviation of the half-normal hyperprior of the exponent of logit norms."""

LOG_ODDS = 1.0
"""Of a posterior against none, before any validation data, in nats."""

NEGLIGIBLE = 12.0
"""A precision whose best point is that many nats less likely than the best weighs nothing."""


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
        precision: δ at unit dispersion.
        temperature: T.
        scale: The likelihood's.
        nll: Validation negative log-likelihood an example.
    """

    precision: float
    temperature: float
    scale: float
    nll: float

    def hyperparameters(self, likelihood: Likelihood) -> Hyperparameters:
        """In the user's terms."""
        precision = self.precision / likelihood.dispersion(self.scale)
        plain = Hyperparameters(precision, self.temperature)
        return replace(plain, **{likelihood.scale: self.scale})


@dataclass(frozen=True)
class Belief:
    """What the validation data say of one model's hyperparameters.

    Attributes:
        mean: At the posterior means of log δ, log T and the log scale.
        log_evidence: log ∫ likelihood × hyperprior, in nats.
    """

    mean: Point
    log_evidence: float


@dataclass(frozen=True)
class Search:
    r"""Chooses (δ, T, scale) by validation likelihood × hyperprior.

    The hyperprior is log-normal: around T = 1, the initial scale, and the δ at which the prior
    standard deviation of an output is 1, with the likelihood's `spreads`. Not the best point is
    taken but the posterior mean of the logarithms, so that a small validation set, whose best
    point may lie anywhere, moves them as far as it has something to say, and a large one puts
    them where it is best. With and without a posterior (T = 0: temperature scaling, of which the
    MAP is the centre of the hyperprior) are two models, chosen by their evidence.

    Measured on published CIFAR-10 networks and the digits (experiments/small_validation.md): best
    points cost more than they bring below 100 examples, and wide hyperpriors let ten examples, one
    of them classified wrong, raise the test score of a good network by a fifth.

    Attributes:
        gaussian_at: δ ↦ Gaussian over the outputs of the validation inputs.
        likelihood: Gives losses, what its scale is, and the hyperprior's spreads.
        y: Targets that it has checked.
        link: How outputs become predictions.
        distance_scale: s, multiplies the distance term.
        norm_exponent: See `Hyperparameters`.
        typical_norm: See `Hyperparameters`.
        shifted: The same on data that are shifted, whose likelihood counts a little.
        initial_scale: Scale of the MAP: 1 for logits, the fitted noise variance for regression.
        processes: Who has the other validation data; None if nobody has.
        counts: Whether these data count, or are there only to compute along.
    """

    gaussian_at: Callable[[float], LogitGaussian]
    likelihood: Likelihood
    y: Tensor
    link: Link
    distance_scale: float = 0.0
    norm_exponent: float = 0.0
    typical_norm: float = 1.0
    shifted: "Search | None" = None
    initial_scale: float = 1.0
    processes: Processes | None = None
    counts: bool = True

    @cached_property
    def score(self) -> Score:
        """How losses become one number."""
        processes = self.processes or Processes()
        return Score.of(self.likelihood, self.y, processes, counts=self.counts)

    def run(self, precisions: list[float]) -> Tuning:
        """Try every δ of an increasing grid, which is empty for a method that has none.

        Raises:
            ValueError: If the score of the MAP is not finite.
        """
        map_nll, scaled = self.without_posterior(precisions[-1] if precisions else 1.0)
        chosen, posterior = scaled, None
        if precisions:
            posterior = self.with_posterior(precisions)
            if posterior.log_evidence + LOG_ODDS > scaled.log_evidence:
                chosen = posterior
        found = None if posterior is None else self._numbers(posterior.mean)
        return Tuning(
            hyperparameters=self._numbers(chosen.mean),
            posterior=found,
            nll=chosen.mean.nll,
            map_nll=map_nll,
            scaled_nll=scaled.mean.nll,
            num_examples=self.num_examples,
            edges=self._edges(chosen.mean, precisions),
        )

    def with_distance(
        self,
        tuning: Tuning,
        precisions: list[float],
        share: float,
        exponents: Sequence[float] = (0.0,),
        shifted: "Search | None" = None,
    ) -> Tuning:
        """Search again with a distance term, and take it unless it costs too much likelihood.

        Its scale makes it `share` of the variance of the outputs that the posterior gives, on
        average over the data; it is not searched, as data like those of training ask for none.
        For the same reason it may cost a standard error of their negative log-likelihood: that is
        about what it takes on them, for what it brings on others.

        Args:
            tuning: What was found without it.
            precisions: See `run`.
            share: ρ.
            exponents: Of the norm of the logits, to choose from.
            shifted: On shifted data, which show how much T and τ should leave to the term.
        """
        if tuning.posterior is None:
            return tuning
        gaussian = tuning.posterior.gaussian(self.gaussian_at, self.likelihood)
        outside = self.gaussian_at(precisions[0]).outside
        if outside is None:
            return tuning
        means = self.score.mean(gaussian.variance().mean(-1)), self.score.mean(outside)
        if means[1] < NO_DISTANCE:  # nothing moves: there is no unit to measure distances in
            return tuning
        wider = replace(self, distance_scale=share * means[0] / means[1], shifted=shifted)
        precision = tuning.posterior.unit_precision(self.likelihood)
        wider = wider._normalised(precision, exponents)
        found = wider.run(precisions)
        if shifted is not None:  # what it reached on both is not what it reached here
            nll = self.score.mean(wider.losses_at(found.hyperparameters))
            found = replace(found, nll=nll)
        losses = self.losses_at(tuning.hyperparameters)
        spread = self.score.mean(losses.square()) - self.score.mean(losses) ** 2
        error = math.sqrt(max(spread, 0.0) / max(self.num_examples - 1, 1))
        if found.nll > tuning.nll + error:
            return tuning
        return replace(found, map_nll=tuning.map_nll, scaled_nll=tuning.scaled_nll)

    def _normalised(self, precision: float, exponents: Sequence[float]) -> "Search":
        """With the exponent of the logits' norm that has the best mode at one δ.

        Its hyperprior is the half of a normal distribution, so that few data leave it at 0.
        """
        gaussian, fewest = self._gaussian_at(precision), self.likelihood.fewest_normalised
        if fewest is None or gaussian.mean.shape[1] < fewest:
            return self
        norm = self.score.mean(gaussian.norm())
        if not norm > 0:  # all outputs alike: there is nothing to divide by
            return self
        prior, found = self._hyperprior, []
        for exponent in exponents:
            there = replace(self, norm_exponent=exponent, typical_norm=norm)
            nll = there._nll_at(precision)

            def value(logs: Logs, nll: Function = nll) -> float:
                return nll(logs) + prior.penalty(logs)

            least = value(compass(value, prior.origin, prior.origin))
            own = (exponent / EXPONENT_SPREAD) ** 2 / (2 * self.num_examples)
            found.append((least + own, there))
        return min(found, key=lambda each: each[0])[1]

    def losses_at(self, chosen: Hyperparameters) -> Tensor:
        """Losses of the examples at chosen hyperparameters."""
        gaussian = self._gaussian_at(chosen.unit_precision(self.likelihood))
        losses = self.likelihood.losses(gaussian, self.y, self.link)
        return losses(chosen.temperature, chosen.scale(self.likelihood)).double()

    def _gaussian_at(self, precision: float) -> LogitGaussian:
        found = self.gaussian_at(precision).widened(self.distance_scale)
        return found.normalised(self.norm_exponent, self.typical_norm)

    def _numbers(self, point: Point) -> Hyperparameters:
        found = point.hyperparameters(self.likelihood)
        return replace(
            found,
            distance_scale=self.distance_scale,
            norm_exponent=self.norm_exponent,
            typical_norm=self.typical_norm,
        )

    @property
    def num_examples(self) -> int:
        """Validation examples that count."""
        return self.score.num_examples

    def without_posterior(self, precision: float) -> tuple[float, Belief]:
        """The negative log-likelihood of the MAP, and temperature scaling."""
        objective = self._objective(precision)

        def nll(logs: Logs) -> float:
            return objective(0.0, math.exp(logs[0]))

        origin = (math.log(self.initial_scale),)
        map_nll = nll(origin)
        if not math.isfinite(map_nll):
            raise ValueError(
                "The validation NLL of the model itself is not finite. Check its outputs."
            )
        prior = Hyperprior(origin, (self.likelihood.spreads.scale,), self.num_examples)
        mode = compass(lambda logs: nll(logs) + prior.penalty(logs), origin, origin)
        lattice = prior.lattice(nll, mode, prior.widths(nll, mode))
        (log_scale,) = means(lattice)
        point = Point(precision, 0.0, math.exp(log_scale), nll((log_scale,)))
        return map_nll, Belief(point, log_sum(lattice) - prior.log_normaliser)

    def with_posterior(self, precisions: list[float]) -> Belief:
        """T > 0: the mode of (T, scale) at each δ, then a lattice around the best ones."""
        prior = self._hyperprior
        values, modes = self._modes(precisions, prior)
        best = values.index(min(values))
        widths = prior.widths(self._nll_at(precisions[best]), modes[best])
        step = math.log(precisions[-1] / precisions[0]) / max(len(precisions) - 1, 1)
        lattice: Lattice = []
        for i in range(max(0, best - 2), min(len(modes), best + 3)):
            if self.num_examples * (values[i] - values[best]) < NEGLIGIBLE:
                log_prior = math.log(step) - self.num_examples * self._penalty(i, precisions)
                around = prior.lattice(self._nll_at(precisions[i]), modes[i], widths)
                lattice += [((float(i), *logs), weight + log_prior) for logs, weight in around]
        evidence = log_sum(lattice) - prior.log_normaliser - self._log_normaliser(precisions)
        point = self._point(means(lattice), precisions, step)
        return Belief(point, evidence)

    def _modes(
        self, precisions: list[float], prior: "Hyperprior"
    ) -> tuple[list[float], list[Logs]]:
        """Least values, an example, and where they are, at each δ."""
        values, modes = [], []
        start, step = prior.origin, 1.0
        for i in reversed(range(len(precisions))):  # from nearly the MAP to a wide posterior
            nll = self._nll_at(precisions[i])

            def value(logs: Logs, nll: Function = nll) -> float:
                return nll(logs) + prior.penalty(logs)

            # The neighbour's optimum is near: a smaller first step than from nowhere.
            start, step = compass(value, start, prior.origin, step), 0.4
            values.append(value(start) + self._penalty(i, precisions))
            modes.append(start)
        return values[::-1], modes[::-1]

    def _point(self, means: Logs, precisions: list[float], step: float) -> Point:
        """δ on the grid, as not every method can evaluate others; T makes up for the rest."""
        place, log_temperature, log_scale = means
        nearest = round(place)
        log_temperature += (nearest - place) * step
        nll = self._nll_at(precisions[nearest])((log_temperature, log_scale))
        return Point(precisions[nearest], math.exp(log_temperature), math.exp(log_scale), nll)

    def _nll_at(self, precision: float) -> Function:
        """(log T, log scale) ↦ validation negative log-likelihood an example, at one δ."""
        objective = self._objective(precision)
        return lambda logs: objective(math.exp(logs[0]), math.exp(logs[1]))

    def _objective(self, precision: float) -> Callable[[float, float], float]:
        """(T, scale) ↦ negative log-likelihood an example, with a share of that under shift."""
        gaussian = self._gaussian_at(precision).compressed()
        losses = self.likelihood.losses(gaussian, self.y, self.link)
        if self.shifted is None:
            return lambda temperature, scale: self.score.mean(losses(temperature, scale))
        other = replace(
            self.shifted,
            distance_scale=self.distance_scale,
            norm_exponent=self.norm_exponent,
            typical_norm=self.typical_norm,
        )._objective(precision)

        def both(temperature: float, scale: float) -> float:
            own = self.score.mean(losses(temperature, scale))
            return own + SHIFTED_WEIGHT * other(temperature, scale)

        return both

    @property
    def _hyperprior(self) -> "Hyperprior":
        spreads = self.likelihood.spreads
        origin = (0.0, math.log(self.initial_scale))
        return Hyperprior(origin, (spreads.temperature, spreads.scale), self.num_examples)

    def _penalty(self, index: int, precisions: list[float]) -> float:
        """Negative log hyperprior of a δ, an example; its mean is the middle of the grid."""
        moved = math.log(precisions[index] / math.sqrt(precisions[0] * precisions[-1]))
        return (moved / self.likelihood.spreads.precision) ** 2 / (2 * self.num_examples)

    def _log_normaliser(self, precisions: list[float]) -> float:
        """Log ∫ of the hyperprior of log δ over the grid."""
        spread = self.likelihood.spreads.precision
        width = math.log(precisions[-1] / precisions[0])
        return math.log(min(spread * math.sqrt(2 * math.pi), max(width, 1.0)))

    def _edges(self, chosen: Point, precisions: list[float]) -> tuple[str, ...]:
        """Hyperparameters that the validation data alone would put at an end of the search.

        The hyperprior keeps its means away from there, so that it is the likelihood that is
        asked: is it no worse at an end of one of them, the others being as chosen?
        """
        found, low, high = [], math.exp(-REACH), math.exp(REACH)
        if chosen.temperature > 0:
            temperature, scale = math.log(chosen.temperature), math.log(chosen.scale)
            ends = (self._nll_at(precisions[i])((temperature, scale)) for i in (0, -1))
            if any(end <= chosen.nll for end in ends):
                found.append("prior_precision")
            nll = self._nll_at(chosen.precision)
            if any(nll((end, scale)) <= chosen.nll for end in (-REACH, REACH)):
                found.append("temperature")
        objective = self._objective(chosen.precision)
        ends = (objective(0.0, self.initial_scale * end) for end in (low, high))
        if any(end <= chosen.nll for end in ends):
            found.append(self.likelihood.scale)
        return tuple(found)
