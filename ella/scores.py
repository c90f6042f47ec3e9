"""Uncertainty scores as functions of a Gaussian over outputs, or of draws from it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ella.predictive import LogitGaussian

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Uncertainty:
    """Scores of shape (n,), or (n, *positions); higher for inputs the model knows less about.

    Attributes:
        entropy: Entropy of the averaged prediction, in nats.
        mutual_information: The part of the entropy that comes from the weights, in nats: entropy
            minus the mean entropy at known outputs.
        logit_variance: Mean marginal variance of the outputs.
        confidence_deficit: One minus the largest averaged probability ("max-softmax"); None for
            real-valued targets.
        energy: −log Σ exp of the mean logits; None for real-valued targets.
    """

    entropy: Tensor
    mutual_information: Tensor
    logit_variance: Tensor
    confidence_deficit: Tensor | None = None
    energy: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> "Uncertainty":
        """A function of every score that there is."""
        found = {name: None if v is None else function(v) for name, v in vars(self).items()}
        return Uncertainty(**found)  # type: ignore[arg-type] # None only where it may be

    @classmethod
    def joined(cls, parts: "Sequence[Uncertainty]") -> "Uncertainty":
        """The scores of all examples."""
        deficits = [p.confidence_deficit for p in parts if p.confidence_deficit is not None]
        energies = [p.energy for p in parts if p.energy is not None]
        return cls(
            torch.cat([part.entropy for part in parts]),
            torch.cat([part.mutual_information for part in parts]),
            torch.cat([part.logit_variance for part in parts]),
            torch.cat(deficits) if deficits else None,
            torch.cat(energies) if energies else None,
        )


def entropy(probs: Tensor, dim: int = -1) -> Tensor:
    """Entropy over one axis, in nats, with 0·log 0 = 0."""
    return -torch.xlogy(probs, probs).sum(dim)


def binary_entropy(probs: Tensor) -> Tensor:
    """Entropy of independent events of these probabilities, one by one, in nats."""
    return -torch.xlogy(probs, probs) - torch.xlogy(1 - probs, 1 - probs)


def logit_variance(gaussian: LogitGaussian) -> Tensor:
    """Mean marginal variance of the outputs, shape (n,)."""
    return gaussian.variance().mean(-1)


def energy(gaussian: LogitGaussian) -> Tensor:
    """−log Σ_c exp(m_c) of the mean logits, shape (n,).

    Reference: Energy-based Out-of-distribution Detection (Liu et al., 2020),
    https://arxiv.org/abs/2010.03759
    """
    return -torch.logsumexp(gaussian.mean, -1)


def joint_energy(gaussian: LogitGaussian) -> Tensor:
    """−Σ_c log(1 + exp(m_c)) of the mean logits of independent labels, shape (n,).

    Reference: Can multi-label classification networks know what they don't know? (Wang et al.,
    2021), https://arxiv.org/abs/2109.14162
    """
    return -torch.nn.functional.softplus(gaussian.mean).sum(-1)
