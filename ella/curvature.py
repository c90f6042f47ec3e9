"""Likelihoods and the k×k Gauss-Newton matrix G, summed over data."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ella.inputs import Inputs, batches, check_class_labels, check_real_targets


class Likelihood(Protocol):
    """A likelihood p(y | f), as far as the Laplace approximation needs it."""

    def check(self, y: Tensor, num_outputs: int) -> Tensor:
        """Validate targets; return them in the form the other methods expect."""

    def projected_hessian(self, logits: Tensor, phi: Tensor) -> Tensor:
        """Σ_i φ(x_i)ᵀ Λ_i φ(x_i), shape (k, k), Λ = −∂² log p/∂f²."""

    def log_likelihood(self, logits: Tensor, y: Tensor) -> float:
        """Σ_i log p(y_i | f_i), in nats."""


@dataclass(frozen=True)
class Softmax:
    """Classes: Λ = diag(p) − ppᵀ with p = softmax(f)."""

    def check(self, y: Tensor, num_outputs: int) -> Tensor:
        """Class indices in [0, c); see `check_class_labels`."""
        check_class_labels(y, num_outputs)
        return y

    def projected_hessian(self, logits: Tensor, phi: Tensor) -> Tensor:
        r"""Σ φᵀ(diag(p) − ppᵀ)φ as a Gram matrix of centred, weighted features.

        :math:`Λ = \sum_c p_c (e_c - p)(e_c - p)^\top`, so no cancellation can make G indefinite.
        """
        probs = logits.double().softmax(-1)
        phi = phi.double()
        centred = phi - torch.einsum("nc,nck->nk", probs, phi).unsqueeze(1)
        rows = (probs.sqrt().unsqueeze(-1) * centred).flatten(0, 1)
        return rows.T @ rows

    def log_likelihood(self, logits: Tensor, y: Tensor) -> float:
        """Σ log softmax(f)[y]."""
        return logits.double().log_softmax(-1).gather(1, y.unsqueeze(1)).sum().item()


@dataclass(frozen=True)
class Gaussian:
    """Real targets with noise variance σ²: Λ = I/σ².

    Attributes:
        noise_variance: σ².
    """

    noise_variance: float = 1.0

    def check(self, y: Tensor, num_outputs: int) -> Tensor:
        """Targets of shape (n, c); see `check_real_targets`."""
        return check_real_targets(y, num_outputs)

    def projected_hessian(self, logits: Tensor, phi: Tensor) -> Tensor:
        """Σ φᵀφ / σ²."""
        rows = phi.double().flatten(0, 1)
        return rows.T @ rows / self.noise_variance

    def log_likelihood(self, logits: Tensor, y: Tensor) -> float:
        """Σ log N(y; f, σ²)."""
        scale = self.noise_variance**0.5
        return torch.distributions.Normal(logits.double(), scale).log_prob(y.double()).sum().item()


@dataclass(frozen=True)
class Curvature:
    """Sums over data: plain sums, so batches, later data, and processes add up.

    Attributes:
        matrix: G, shape (k, k), float64.
        log_likelihood: Σ log p(y | f), in nats.
        prior_variance: Σ over examples of the mean over outputs of κ(x, x), the prior variance of
            an output at prior precision 1.
        num_examples: How many examples were seen.
    """

    matrix: Tensor
    log_likelihood: float
    prior_variance: float
    num_examples: int

    def __add__(self, other: "Curvature") -> "Curvature":
        """The sums over both sets of data."""
        return Curvature(
            self.matrix + other.matrix,
            self.log_likelihood + other.log_likelihood,
            self.prior_variance + other.prior_variance,
            self.num_examples + other.num_examples,
        )


def accumulate_curvature(
    parts: Iterable[tuple[tuple[Tensor, Tensor, Tensor | None], Tensor]], likelihood: Likelihood
) -> Curvature:
    r"""Sum the Gauss-Newton matrix :math:`G = \sum_i φ(x_i)^\top Λ_i φ(x_i)` over data.

    Args:
        parts: Per batch ((logits (n, c), φ (n, c, k), residual or None), targets). The order and
            the split into batches do not matter.
        likelihood: Gives Λ.

    Returns:
        The sums, in float64.

    Raises:
        ValueError: If there is no batch, or a batch's targets are bad.

    Reference: Accelerated Linearized Laplace Approximation for Bayesian Deep Learning
    (Deng et al., 2022), eq. 13, https://arxiv.org/abs/2210.12642
    """
    total: Curvature | None = None
    for (logits, phi, residual), y in parts:
        y = likelihood.check(y, logits.shape[1])
        prior = phi.square().sum(-1)
        if residual is not None:
            prior = prior + (residual.diagonal(dim1=1, dim2=2) if residual.ndim == 3 else residual)
        part = Curvature(
            likelihood.projected_hessian(logits, phi),
            likelihood.log_likelihood(logits, y),
            prior.double().mean(-1).sum().item(),
            len(logits),
        )
        total = part if total is None else total + part
    if total is None:
        raise ValueError("No data: expected at least one batch.")
    return total


def noise_variance_of(
    outputs: Callable[[Inputs], Tensor], loader: Iterable[Any], device: torch.device
) -> float:
    """σ² of a Gaussian likelihood: the mean square of the residuals.

    Args:
        outputs: f, from inputs to (n, c).
        loader: Training data.
        device: Where the model is.

    Raises:
        TypeError: If a batch or the targets have the wrong form.
        ValueError: If a batch or a target is bad.
    """
    total, count = 0.0, 0
    for x, y in batches(loader, device):
        predicted = outputs(x).double()
        error = predicted - check_real_targets(cast(Tensor, y), predicted.shape[1])
        total += error.square().sum().item()
        count += error.numel()
    # A model that interpolates its data leaves nothing, but a density needs a width.
    return max(total / count, torch.finfo(torch.float32).eps)
