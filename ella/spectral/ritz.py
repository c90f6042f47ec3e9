"""Rayleigh-Ritz: the best eigenpairs inside a learned span, in float64."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ella.inputs import slices


@dataclass(frozen=True)
class Moments:
    r"""Sums over examples of :math:`ψ^\top ψ` and :math:`ψ^\top Tψ`, in float64.

    They are plain sums, so batches, and processes, add up: `a + b`.

    Attributes:
        second: Σ ψᵀψ, shape (k, k).
        kernel: Σ ψᵀTψ, shape (k, k).
        num_examples: n.
    """

    second: Tensor
    kernel: Tensor
    num_examples: int

    @classmethod
    def of(cls, psi: Tensor, tpsi: Tensor) -> "Moments":
        """The sums for one batch, ψ and Tψ of shape (n, c, k)."""
        left, right = psi.double().flatten(0, 1), tpsi.double().flatten(0, 1)
        return cls(left.T @ left, left.T @ right, len(psi))

    def __add__(self, other: "Moments") -> "Moments":
        """The sums for both sets of examples."""
        return Moments(
            self.second + other.second,
            self.kernel + other.kernel,
            self.num_examples + other.num_examples,
        )


def feature_ritz(psi: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    r"""Rayleigh-Ritz for :math:`T = SS^\top` from ψ and S at the same examples.

    :math:`E[ψ^\top Tψ] = WW^\top` with :math:`W = E[ψ^\top S]`, so T is integrated over all
    examples and the cost is linear in their number.

    Args:
        psi: ψ, shape (n, c, k).
        features: S, shape (n, c, r).

    Returns:
        As of `rayleigh_ritz`: μ of shape (k',) and A of shape (k, k').
    """
    n, left, right = len(psi), psi.double().flatten(0, 1), features.flatten(0, 1)
    w = left.new_zeros(left.shape[1], right.shape[1])
    for part in slices(len(left), 2**16):  # float64 copies of S, a part at a time
        w += left[part].T @ right[part].double()
    w /= n
    return rayleigh_ritz(Moments(left.T @ left, w @ w.T * n, n))


def rayleigh_ritz(moments: Moments, *, tolerance: float = 1e-10) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and mixing A such that ψA is orthonormal and diagonalises T in the span of ψ.

    Solves :math:`R a = μ G a` with G = E[ψᵀψ] and R = E[ψᵀTψ]: whitens with G, then diagonalises.
    The result depends on the span of ψ only, so it repairs order, scale and leakage, whatever
    objective trained ψ.

    Args:
        moments: Sums of both matrices over the same examples.
        tolerance: Directions whose share of G's largest eigenvalue is below it are dropped.

    Returns:
        Eigenvalues μ of shape (k',), decreasing, and A of shape (k, k'), float64; k' ≤ k.
    """
    second = moments.second / moments.num_examples
    kernel = moments.kernel / moments.num_examples
    variances, axes = torch.linalg.eigh((second + second.T) / 2)
    kept = variances > tolerance * variances[-1]
    whiten = axes[:, kept] / variances[kept].sqrt()
    projected = whiten.T @ ((kernel + kernel.T) / 2) @ whiten
    values, vectors = torch.linalg.eigh(projected)
    return values.flip(0), (whiten @ vectors).flip(1)
