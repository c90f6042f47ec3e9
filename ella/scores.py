"""Uncertainty scores as functions of a Gaussian over outputs, or of draws from it."""

import math
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

    A score is None where it has no meaning: all but the first three for real-valued targets, the
    last three as their descriptions say.

    Attributes:
        entropy: Entropy of the averaged prediction, in nats. The all-rounder.
        mutual_information: The part of the entropy that comes from the weights, in nats: entropy
            minus the mean entropy at known outputs. For what more data would settle.
        logit_variance: Mean marginal variance of the outputs.
        confidence_deficit: One minus the largest averaged probability ("max-softmax"). For which
            predictions are wrong.
        energy: −log Σ exp of the mean logits. For inputs of no class.
        corrected_energy: The same with each mean logit divided by √(1 + πv/8), v being its
            variance. For inputs of no class; of classes, not of labels that are independent.
        max_logit_p_norm: Minus the largest centred mean logit, divided by the 3-norm of all. For
            which predictions are wrong; with more than two classes.
        distance: D(x) of the `Distance` term, where there is one. For inputs unlike those of
            training, of known classes or not.
    """

    entropy: Tensor
    mutual_information: Tensor
    logit_variance: Tensor
    confidence_deficit: Tensor | None = None
    energy: Tensor | None = None
    corrected_energy: Tensor | None = None
    max_logit_p_norm: Tensor | None = None
    distance: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> "Uncertainty":
        """A function of every score that there is."""
        found = {name: None if v is None else function(v) for name, v in vars(self).items()}
        return Uncertainty(**found)  # type: ignore[arg-type] # None only where it may be

    @classmethod
    def joined(cls, parts: "Sequence[Uncertainty]") -> "Uncertainty":
        """The scores of all examples."""
        found = {}
        for name in vars(parts[0]):
            values = [value for part in parts if (value := getattr(part, name)) is not None]
            found[name] = torch.cat(values) if values else None
        return cls(**found)  # type: ignore[arg-type] # None only where it may be


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


def corrected_energy(gaussian: LogitGaussian) -> Tensor:
    r"""Energy of logits as the probit approximation sees them, shape (n,).

    :math:`-\log \sum_c \exp(m_c / \sqrt{1 + π v_c / 8})`: far away it does not fall as logits
    grow, because their variance grows faster.
    """
    spread = (1 + math.pi / 8 * gaussian.variance()).sqrt()
    return -torch.logsumexp(gaussian.mean / spread, -1)


def max_logit_p_norm(gaussian: LogitGaussian) -> Tensor | None:
    r"""Minus :math:`\max_c \bar m_c / ‖\bar m‖_3` of centred mean logits, shape (n,).

    None for fewer than three classes, where it is constant.

    Reference: How to Fix a Broken Confidence Estimator: Evaluating Post-hoc Methods for Selective
    Classification with Deep Neural Networks (Cattelan & Silva, 2024),
    https://arxiv.org/abs/2305.15508
    """
    if gaussian.mean.shape[-1] < 3:
        return None
    centred = gaussian.mean - gaussian.mean.mean(-1, keepdim=True)
    norm = torch.linalg.vector_norm(centred, ord=3, dim=-1)
    return -centred.amax(-1) / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def joint_energy(gaussian: LogitGaussian) -> Tensor:
    """−Σ_c log(1 + exp(m_c)) of the mean logits of independent labels, shape (n,).

    Reference: Can multi-label classification networks know what they don't know? (Wang et al.,
    2021), https://arxiv.org/abs/2109.14162
    """
    return -torch.nn.functional.softplus(gaussian.mean).sum(-1)
