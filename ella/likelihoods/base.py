"""What a likelihood p(y | f) must say of itself."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ella.links import LaplaceBridge, Link, MonteCarlo
from ella.predictive import LogitGaussian
from ella.scores import Uncertainty, entropy, logit_variance

Losses = Callable[[float, float], Tensor]
"""(T, scale) ↦ negative log-likelihood of each example, shape (n,), float64, in nats."""


@dataclass(frozen=True)
class Spreads:
    """Standard deviations of log-normal hyperpriors.

    Attributes:
        precision: Of log δ, around the δ at which the prior standard deviation of an output is 1.
        temperature: Of log T, around 1.
        scale: Of the log scale, around where it starts.
    """

    # Chosen for logits on digits, small MLPs and ResNet-20. Twice as wide, one misclassified
    # example in ten moves the variance of the logits by a factor of 4.
    precision: float = 0.5
    temperature: float = 0.25
    scale: float = 0.15


class Likelihood(ABC):
    r"""A likelihood p(y | f) of targets given the n×c outputs of a model.

    With a dispersion s (the noise variance of a Gaussian; 1 for the others) Λ/s is its curvature.
    All sums over data are kept at s = 1, and s is applied when they are used.

    Attributes:
        scale: The hyperparameter that `calibrate` searches beside δ and T: "logit_temperature",
            τ, which divides the outputs, or "noise_variance", σ².
        spreads: Of the hyperprior; see `Spreads`.
        links: The links that have a meaning.
        fewest_normalised: The fewest outputs whose norm says how sure the model is, apart from
            their direction; None for a likelihood of which it does not.
    """

    scale: ClassVar[str] = "logit_temperature"
    spreads: ClassVar[Spreads] = Spreads()
    links: ClassVar[tuple[type[Link], ...]] = (MonteCarlo,)
    fewest_normalised: ClassVar[int | None] = None

    # Targets

    @abstractmethod
    def check(self, y: Tensor, num_outputs: int) -> Tensor:
        """Validate targets, and return them in the form that the other methods expect.

        Raises:
            TypeError: If their dtype is wrong.
            ValueError: If their shape or a value is.
        """

    def weights(self, y: Tensor) -> Tensor | None:
        """How much each example counts, shape (n,), 0 for not at all; None for 1 each."""
        return None

    # Densities

    @abstractmethod
    def log_density(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log p(y | f) at s = 1 for outputs (..., n, c), shape (..., n), in nats, unweighted."""

    @abstractmethod
    def whitened(self, outputs: Tensor, phi: Tensor) -> Tensor:
        """Λ as a factor: W of shape (n, r, k) with WᵀW = φᵀΛφ at s = 1, unweighted.

        Args:
            outputs: f, shape (n, c).
            phi: φ, shape (n, c, k), float64.
        """

    # Sums over data

    def statistics(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Sums from which `log_likelihood` follows at any scale, shape (s,), float64."""
        density = self.log_density(outputs.double(), y)
        weights = self.weights(y)
        return (density if weights is None else density * weights).sum().unsqueeze(0)

    def log_likelihood(self, statistics: Tensor, scale: float) -> float:
        """Σ log p(y | f) over all data in `statistics`, in nats."""
        return statistics[0].item()

    def initial_scale(self, statistics: Tensor) -> float:
        """The scale until `calibrate`: what the training data say, or 1."""
        return 1.0

    def dispersion(self, scale: float) -> float:
        """S at a value of the scale."""
        return 1.0

    # Predictions

    @abstractmethod
    def response(self, outputs: Tensor, dim: int) -> Tensor:
        """The mean of y, or the probabilities of its values, given outputs along one axis."""

    def condensed(
        self, gaussian: LogitGaussian, link: Link, y: Tensor | None = None, scale: float = 1.0
    ) -> LogitGaussian:
        """The Gaussian with as much as the link has to see, if that is less than all.

        Args:
            gaussian: Over the outputs.
            link: The link that predicts.
            y: Checked targets, where their density will be asked for.
            scale: What the outputs were divided by.
        """
        return gaussian

    def predictive(self, gaussian: LogitGaussian, link: Link) -> Tensor:
        """The response averaged over the Gaussian, shape (n, c)."""
        parts = (gaussian.residual, gaussian.outside)
        if gaussian.factor.shape[-1] == 0 and all(part is None for part in parts):
            # Nothing to average: links approximate.
            return gaussian.spread(self.response(gaussian.mean, -1))
        return gaussian.spread(link(gaussian, self.response))

    def decide(self, average: Tensor) -> Tensor:
        """What `predict` says, from the averaged response (n, c)."""
        return average

    def losses(self, gaussian: LogitGaussian, y: Tensor, link: Link) -> Losses:
        """Negative log predictive density, weighted so that its mean is the score.

        This one averages densities over draws, whatever the link.

        Args:
            gaussian: Over the outputs, at T = τ = 1 and unit dispersion.
            y: Checked targets.
            link: The one that will predict.
        """
        draws = link if isinstance(link, MonteCarlo) else MonteCarlo()
        drawn = gaussian.drawn(draws.num_samples, draws.seed)

        def at(temperature: float, scale: float) -> Tensor:
            if temperature == 0 and gaussian.outside is None:
                return self.scored(-self.log_density((gaussian.mean / scale).double(), y), y)
            f = drawn(temperature, scale)
            densities = self.log_density(f.transpose(1, 2).double(), y)
            return self.scored(math.log(len(f)) - densities.logsumexp(0), y)

        return at

    @abstractmethod
    def uncertainty(
        self, gaussian: LogitGaussian, epistemic: LogitGaussian, link: Link, scale: float
    ) -> Uncertainty:
        """The scores that make sense.

        Args:
            gaussian: What predicts.
            epistemic: What scores of the weights' uncertainty are read from: the same Gaussian, or
                the best one with T > 0 where `calibrate` found that probabilities need none.
            link: The link that predicts.
            scale: The likelihood's.
        """

    # Help for subclasses, and for those who call them

    def num_counted(self, y: Tensor) -> int:
        """How many examples count."""
        weights = self.weights(y)
        return len(y) if weights is None else int((weights > 0).sum())

    def scored(self, losses: Tensor, y: Tensor) -> Tensor:
        """Losses times weights, of mean 1 over the examples."""
        weights = self.weights(y)
        return losses if weights is None else losses * (weights * len(y) / weights.sum())

    def check_link(self, link: Link) -> Link:
        """The link, if it has a meaning here.

        Raises:
            ValueError: For one of ella's that has none.
        """
        if type(link) in (LaplaceBridge, MonteCarlo) and not isinstance(link, self.links):
            names = " or ".join(kind.__name__ for kind in self.links)
            raise ValueError(
                f"{type(link).__name__} is no link for {type(self).__name__}; use {names}."
            )
        return link


class Discrete(Likelihood):
    """A likelihood whose response is probabilities: `predict_proba` is for these."""

    links: ClassVar[tuple[type[Link], ...]] = (MonteCarlo,)

    def log_probability(self, probs: Tensor, y: Tensor) -> Tensor:
        """Log p(y) under averaged probabilities (n, classes), shape (n,), float64."""
        chosen = probs.gather(1, y.unsqueeze(1)).squeeze(1)
        return chosen.clamp_min(torch.finfo(probs.dtype).tiny).log().double()

    def losses(self, gaussian: LogitGaussian, y: Tensor, link: Link) -> Losses:
        """See `Likelihood.losses`: −log of the averaged probability of y."""
        averages = link.tempered(gaussian, self.response)

        def at(temperature: float, scale: float) -> Tensor:
            if temperature == 0 and gaussian.outside is None:
                return self.scored(-self.log_density(gaussian.mean / scale, y).double(), y)
            return self.scored(-self.log_probability(averages(temperature, scale), y), y)

        return at

    def decide(self, average: Tensor) -> Tensor:
        """The most probable value, shape (n,)."""
        return average.argmax(-1)

    def uncertainty(
        self, gaussian: LogitGaussian, epistemic: LogitGaussian, link: Link, scale: float
    ) -> Uncertainty:
        """Entropy, mutual information, logit variance and confidence deficit."""
        probs = self.predictive(gaussian, link)
        return Uncertainty(
            self.entropy(probs),
            self._information(epistemic, link),
            logit_variance(epistemic),
            1 - self.confidence(probs),
        )

    def entropy(self, probs: Tensor, dim: int = -1) -> Tensor:
        """Entropy of probabilities along one axis, in nats."""
        return entropy(probs, dim)

    def confidence(self, probs: Tensor) -> Tensor:
        """How probable the decision is, shape (n,)."""
        return probs.amax(-1)

    def _information(self, gaussian: LogitGaussian, link: Link) -> Tensor:
        draws = link if isinstance(link, MonteCarlo) else MonteCarlo()
        each = self.response(
            self.condensed(gaussian, draws)
            .settled()
            .compressed()
            .draws(draws.num_samples, draws.seed),
            1,
        )
        total = self.entropy(each.mean(0).T)
        return (total - self.entropy(each, 1).mean(0)).clamp_min(0)
