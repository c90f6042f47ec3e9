"""Real numbers."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ella.arguments import POSITIVE, optional, settle
from ella.likelihoods.base import Likelihood, Losses, Spreads
from ella.links import LaplaceBridge, Link, MonteCarlo
from ella.predictive import LogitGaussian
from ella.scores import Uncertainty, logit_variance
from ella.targets import check_real_targets

MIN_VARIANCE = torch.finfo(torch.float32).eps
"""A model that interpolates its data leaves no residual, but a density needs a width."""


@dataclass(frozen=True)
class Normal(Likelihood):
    """Real targets of shape (n, c), each with noise variance σ²: Λ/s = I/σ².

    Attributes:
        noise_variance: σ² until `calibrate`; None takes the training residuals' mean square.

    Raises:
        ValueError: If it is not above 0.
    """

    noise_variance: float | None = None
    scale: ClassVar[str] = "noise_variance"
    # Outputs have no scale of their own, as logits do.
    spreads: ClassVar[Spreads] = Spreads(math.inf, 2.0, 3.0)
    links: ClassVar[tuple[type[Link], ...]] = (MonteCarlo, LaplaceBridge)  # all are exact here

    def __post_init__(self) -> None:
        settle(self, noise_variance=optional(POSITIVE))

    def check(self, y: Tensor, num_outputs: int) -> Tensor:
        """Targets of shape (n, c), or (n,) for one output; see `check_real_targets`."""
        return check_real_targets(y, num_outputs)

    def log_density(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log N(y; f, I)."""
        error = (y.to(outputs) - outputs).square()
        return -0.5 * (error + math.log(2 * math.pi)).sum(-1)

    def whitened(self, outputs: Tensor, phi: Tensor) -> Tensor:
        """φ itself."""
        return phi

    def statistics(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Sum of squared residuals, and their number."""
        squares = (y.double() - outputs.double()).square()
        return torch.stack([squares.sum(), squares.new_tensor(squares.numel())])

    def log_likelihood(self, statistics: Tensor, scale: float) -> float:
        """Σ log N(y; f, σ²)."""
        squares, count = statistics.tolist()
        return -0.5 * (squares / scale + count * math.log(2 * math.pi * scale))

    def initial_scale(self, statistics: Tensor) -> float:
        """σ², given or the residuals' mean square."""
        if self.noise_variance is not None:
            return self.noise_variance
        squares, count = statistics.tolist()
        if not squares < math.inf:
            raise ValueError(
                "The squares of the residuals of the training targets overflow. Scale the targets "
                "to what the model was trained on, or pass `noise_variance`."
            )
        return max(squares / count, MIN_VARIANCE)

    def dispersion(self, scale: float) -> float:
        """σ²."""
        return scale

    def response(self, outputs: Tensor, dim: int) -> Tensor:
        """F."""
        return outputs

    def predictive(self, gaussian: LogitGaussian, link: Link) -> Tensor:
        """The mean, whatever the link."""
        return gaussian.mean

    def losses(self, gaussian: LogitGaussian, y: Tensor, link: Link) -> Losses:
        """−log N(y; m, σ²(1 + T·S) + v), S at unit dispersion, outputs independent given x."""
        error = (y.to(gaussian.mean) - gaussian.mean).double().square()
        marginal = replace(gaussian, outside=None).variance().double()
        outside = 0.0 if gaussian.outside is None else gaussian.outside.double().unsqueeze(1)

        def at(temperature: float, scale: float) -> Tensor:
            variance = scale * (1 + temperature * marginal) + outside
            return 0.5 * (error / variance + (2 * math.pi * variance).log()).sum(-1)

        return at

    def uncertainty(
        self, gaussian: LogitGaussian, epistemic: LogitGaussian, link: Link, scale: float
    ) -> Uncertainty:
        """Entropy of N(m, S + σ²), information ½ log(1 + S/σ²), both summed; output variance."""
        total = (gaussian.variance() + scale).log() + math.log(2 * math.pi * math.e)
        information = torch.log1p(epistemic.variance() / scale)
        return Uncertainty(
            0.5 * total.sum(-1), 0.5 * information.sum(-1), logit_variance(epistemic)
        )
