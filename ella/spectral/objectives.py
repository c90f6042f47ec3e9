"""Objectives whose minimisers are the leading eigenfunctions, as gradients in (ψ, Tψ).

Since T is self-adjoint, the derivative of <ψ, Tψ> is 2 <dψ, Tψ>: no objective needs a gradient
through the operator. All take two independent half-batches: ψ and Tψ on one, with Tψ integrated
over the other, the *source*. Values have shape (n, c, k) and are flattened to (n·c, k) here.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Objective(Protocol):
    """What `SpectralLoss` needs of an objective, on the network's own output ψ."""

    def gradient(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> Tensor:
        """dL/dψ, shape (n, c, k), from ψ, Tψ on one half-batch and ψ on the source half."""

    def loss(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> float:
        """The value that is minimised, for watching held-out data."""


def inner(left: Tensor, right: Tensor) -> Tensor:
    """The (k, k) inner products: mean over examples, sum over outputs."""
    return torch.einsum("nci,ncj->ij", left, right) / len(left)


@dataclass(frozen=True)
class NeuralEFObjective:
    r"""NeuralEF: :math:`\max \sum_j R_{jj} - \sum_{i<j} R_{ij}^2 / R_{ii}` with E‖ψ_j‖² = 1.

    R = E[ψᵀ Tψ]. The gradient for column j is -(Tψ_j - Σ_{i<j} (R_ij/R_ii) Tψ_i), earlier columns
    held fixed. The constraint is kept by dividing ψ_j by its root mean square over both
    half-batches, which makes the objective blind to scale: the gradient in the raw ψ is what
    remains of the above at right angles to ψ_j, over that root. Valid for positive semi-definite
    operators only, as it divides by R_ii.

    Reference: NeuralEF: Deconstructing Kernels by Deep Neural Networks (Deng et al., 2022),
    https://arxiv.org/abs/2205.00165
    """

    def gradient(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> Tensor:
        """See `Objective.gradient`."""
        norm = self._norm(psi, source)
        psi, tpsi = psi / norm, tpsi / norm
        ratio = self._ratio(inner(psi, tpsi))
        gradient = -2 * (tpsi - tpsi @ ratio.triu(1)) / len(psi)
        # The half's own radial part stands for that of the batch. For a kernel operator, whose
        # R on one half is the transpose of that on the other, the two are equal.
        return (gradient - psi * inner(psi, gradient).diagonal()) / norm

    def loss(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> float:
        """See `Objective.loss`."""
        norm = self._norm(psi, source)
        r = inner(psi / norm, tpsi / norm)
        penalty = (self._ratio(r) * r).triu(1).sum()
        return (penalty - r.trace()).item()

    @staticmethod
    def _norm(psi: Tensor, source: Tensor) -> Tensor:
        """sqrt(E‖ψ_j‖²) over both half-batches, shape (k,)."""
        both = torch.cat([psi, source])
        return inner(both, both).diagonal().clamp_min(1e-12).sqrt()

    @staticmethod
    def _ratio(r: Tensor) -> Tensor:
        """R_ij / R_ii; rows whose R_ii is not positive yet (noise) deflate nothing."""
        diagonal = r.diagonal().unsqueeze(1)
        return torch.where(diagonal > 0, r / diagonal.clamp_min(1e-12), 0)


@dataclass(frozen=True)
class NestedLoRA:
    r"""NestedLoRA: the best low-rank approximation of T at every rank at once.

    Minimises :math:`\sum_l w_l \|T - \sum_{j≤l} ψ_j ψ_j^\top\|_{HS}^2`; with v_l the tail sums of
    the weights and M_il = min(v_i, v_l) the gradient is -4(v Tψ - ψ (M ∘ G)), G = E[ψᵀψ] on the
    source half. The minimiser is √μ_j times the j-th eigenfunction, so that ψψᵀ ≈ κ without a
    separate eigenvalue. Unbiased on two half-batches, and safe on indefinite operators.

    Attributes:
        nested: Joint nesting with equal weights (v_l = (k-l)/k); otherwise only the span of the
            leading k is sought (LoRA, the spectral contrastive loss).

    Reference: Operator SVD with Neural Networks via Nested Low-Rank Approximation (Ryu et al.,
    2024), https://arxiv.org/abs/2402.03655
    """

    nested: bool = True

    def gradient(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> Tensor:
        """See `Objective.gradient`."""
        v = self._weights(psi)
        mask = torch.minimum(v.unsqueeze(0), v.unsqueeze(1))
        return -4 * (v * tpsi - psi @ (mask * inner(source, source))) / len(psi)

    def loss(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> float:
        """See `Objective.loss`; the constant ‖T‖² is left out."""
        v = self._weights(psi)
        mask = torch.minimum(v.unsqueeze(0), v.unsqueeze(1))
        cross = (mask * inner(psi, psi) * inner(source, source)).sum()
        return (cross - 2 * (v * inner(psi, tpsi).diagonal()).sum()).item()

    def _weights(self, psi: Tensor) -> Tensor:
        k = psi.shape[-1]
        steps = torch.arange(k, 0, -1, dtype=psi.dtype, device=psi.device) / k
        return steps if self.nested else torch.ones_like(steps)


@dataclass(frozen=True)
class TraceObjective:
    r"""Maximises :math:`\mathrm{tr}(G^{-1} R)`, G = E[ψᵀψ] and R = E[ψᵀTψ]: the span only.

    Its value depends on the span of ψ alone, so functions are unordered until Rayleigh-Ritz. The
    gradient is :math:`-2 (Tψ G^{-1} - ψ G^{-1} R G^{-1})` with both matrices of the same rows:
    their inverse makes it biased on small batches.

    Reference: Spectral Inference Networks (Pfau et al., 2018), https://arxiv.org/abs/1806.02215
    """

    def gradient(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> Tensor:
        """See `Objective.gradient`; the source is not used."""
        inverse, ratio = self._ratio(psi, tpsi)
        return -2 * (tpsi @ inverse - psi @ (ratio @ inverse)) / len(psi)

    def loss(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> float:
        """See `Objective.loss`."""
        return -self._ratio(psi, tpsi)[1].trace().item()

    @staticmethod
    def _ratio(psi: Tensor, tpsi: Tensor) -> tuple[Tensor, Tensor]:
        """G⁻¹ and G⁻¹R, with R symmetric."""
        second, kernel = inner(psi, psi), inner(psi, tpsi)
        eye = torch.eye(len(second), dtype=psi.dtype, device=psi.device)
        jitter = (
            10
            * torch.finfo(psi.dtype).eps
            * second.diagonal().mean().clamp_min(torch.finfo(psi.dtype).tiny * 1e8)
        )
        inverse = torch.linalg.inv(second + jitter * eye)
        return inverse, inverse @ (kernel + kernel.T) / 2
