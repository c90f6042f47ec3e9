"""Yes or no, once or for several labels."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ella.likelihoods.base import Discrete
from ella.links import Link
from ella.predictive import LogitGaussian
from ella.scores import Uncertainty, binary_entropy, joint_energy


@dataclass(frozen=True)
class Bernoulli(Discrete):
    """c independent labels, yes or no: p = sigmoid(f), Λ = diag(p(1 − p)).

    One logit for two classes, or multi-label. `predict_proba` gives the probability of a one, of
    the shape of the logits; negative log-likelihoods and entropies are sums over the labels.
    """

    def check(self, y: Tensor, num_outputs: int) -> Tensor:
        """Zeros and ones of shape (n, c), or (n,) for one output; any dtype.

        Raises:
            ValueError: If the shape does not fit, or a value is neither 0 nor 1.
        """
        y = y.unsqueeze(-1) if y.ndim == 1 else y
        if y.ndim != 2 or y.shape[1] != num_outputs:
            raise ValueError(
                f"Binary targets must have shape (n, {num_outputs}), as the model has "
                f"{num_outputs} outputs; got {tuple(y.shape)}."
            )
        if not ((y == 0) | (y == 1)).all():
            raise ValueError(
                'Binary targets must be 0 or 1. For class indices use likelihood="classification".'
            )
        return y.to(torch.float64)

    def log_density(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Σ_c log of the probability of y_c."""
        return -F.softplus(torch.where(y > 0.5, -outputs, outputs)).sum(-1)

    def log_probability(self, probs: Tensor, y: Tensor) -> Tensor:
        """See `Discrete.log_probability`."""
        chosen = torch.where(y > 0.5, probs, 1 - probs)
        return chosen.clamp_min(torch.finfo(probs.dtype).tiny).log().double().sum(-1)

    def whitened(self, outputs: Tensor, phi: Tensor) -> Tensor:
        """φ times the standard deviation of each label."""
        wide = outputs.double()
        return (wide.sigmoid() * (-wide).sigmoid()).sqrt().unsqueeze(-1) * phi

    def response(self, outputs: Tensor, dim: int) -> Tensor:
        """sigmoid(f)."""
        return outputs.sigmoid()

    def decide(self, average: Tensor) -> Tensor:
        """1 where a one is more probable than not, shape (n, c)."""
        return (average > 0.5).long()

    def entropy(self, probs: Tensor, dim: int = -1) -> Tensor:
        """Of all labels together, which are independent given f."""
        return binary_entropy(probs).sum(dim)

    def confidence(self, probs: Tensor) -> Tensor:
        """Mean over the labels of how probable the decision is."""
        return torch.maximum(probs, 1 - probs).mean(-1)

    def uncertainty(
        self, gaussian: LogitGaussian, epistemic: LogitGaussian, link: Link, scale: float
    ) -> Uncertainty:
        """All scores; the energy is that of independent labels (`joint_energy`)."""
        found = super().uncertainty(gaussian, epistemic, link, scale)
        return replace(found, energy=joint_energy(gaussian))
