"""The numbers that shape the predictive, and what `calibrate` says of them."""

from collections.abc import Callable
from dataclasses import dataclass

from ella.arguments import NOT_NEGATIVE, POSITIVE, settle
from ella.likelihoods import Likelihood
from ella.predictive import LogitGaussian


class NotFittedError(RuntimeError):
    """A method that needs `fit` was called before it."""


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers that shape the predictive; set by the user, by `fit` or by `calibrate`.

    Attributes:
        prior_precision: δ = 1/σ₀², the precision of the Gaussian prior on every weight.
        temperature: T, multiplies the posterior covariance; 0 for no posterior at all.
        logit_temperature: τ, divides the outputs (all but `Normal`).
        noise_variance: σ² of the Gaussian likelihood (`Normal`).
        distance_scale: s, multiplies the distance term (`Distance`); 0 for none.
        norm_exponent: a, of the norm of centred logits by which logits are divided (`Distance`);
            0 leaves them as they are.
        typical_norm: r, the norm at which that changes nothing.

    Raises:
        ValueError: If a number is not finite or not above 0 (T, s and a: below 0).
    """

    prior_precision: float
    temperature: float = 1.0
    logit_temperature: float = 1.0
    noise_variance: float = 1.0
    distance_scale: float = 0.0
    norm_exponent: float = 0.0
    typical_norm: float = 1.0

    def __post_init__(self) -> None:
        positive = ("prior_precision", "logit_temperature", "noise_variance", "typical_norm")
        settle(self, **dict.fromkeys(positive, POSITIVE))
        not_negative = ("temperature", "distance_scale", "norm_exponent")
        settle(self, **dict.fromkeys(not_negative, NOT_NEGATIVE))

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
        found = gaussian_at(self.unit_precision(likelihood)).widened(self.distance_scale)
        found = found.normalised(self.norm_exponent, self.typical_norm)
        return found.tempered(self.temperature * dispersion, self.logit_temperature)


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

    @property
    def warning(self) -> str:
        """What to say of `edges`."""
        found = " and ".join(
            f"the {name.replace('_', ' ')} ({getattr(self.hyperparameters, name):.3g})"
            for name in self.edges
        )
        return (
            f"calibrate: {self.num_examples} validation examples alone would put {found} at an "
            f"end of the searched range; in brackets is what the hyperprior made of it. More "
            f"validation data may settle it."
        )
