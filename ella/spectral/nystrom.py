"""Leading eigenpairs of a Gram matrix, the classical route to eigenfunctions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ella.spectral.operators import Kernel


@dataclass(frozen=True)
class NystromBasis:
    r"""Eigenfunctions of a kernel by its eigenvectors at m landmarks.

    With :math:`K u_j = λ_j u_j` at the landmarks z, :math:`μ_j = λ_j/m` and :math:`ψ_j(x) =
    (\sqrt{m}/λ_j) \sum_i κ(x, z_i) u_{ij}`, of unit norm on the landmarks. An evaluation costs m
    kernel values. It has the interface of `Eigenbasis`.

    Reference: Using the Nyström Method to Speed Up Kernel Machines (Williams & Seeger, 2000).

    Attributes:
        kernel: κ.
        landmarks: z, shape (m, d).
        weights: :math:`\sqrt{m} u_j/λ_j`, shape (m, k), float64.
        eigenvalues: μ, shape (k,), decreasing, float64.
    """

    kernel: Kernel
    landmarks: Tensor
    weights: Tensor
    eigenvalues: Tensor

    @classmethod
    def of(cls, kernel: Kernel, landmarks: Tensor, rank: int) -> "NystromBasis":
        """The k leading eigenfunctions.

        Raises:
            ValueError: If the landmarks span fewer than `rank` directions.
        """
        m = len(landmarks)
        values, vectors = leading_eigenpairs(kernel(landmarks, landmarks), rank)
        return cls(kernel, landmarks, vectors * (m**0.5 / values), values / m)

    def __call__(self, x: Tensor) -> Tensor:
        """Values (n, 1, k) at points (n, d)."""
        products = self.kernel(x, self.landmarks)
        return (products.to(self.weights) @ self.weights).to(x).unsqueeze(1)

    def features(self, x: Tensor) -> Tensor:
        """ψ√μ, so that products of two rows are the kernel."""
        return self(x) * self.eigenvalues.sqrt().to(x)


def leading_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` largest eigenvalues of a symmetric positive semi-definite matrix.

    Args:
        gram: Shape (m, m); worked on in float64.
        rank: k.

    Returns:
        Eigenvalues (k,), decreasing, and eigenvectors (m, k), float64.

    Raises:
        ValueError: If fewer than k eigenvalues are above rounding error.
    """
    values, vectors = numerical_eigenpairs(gram)
    carried = len(values)
    if rank > carried:
        raise ValueError(
            f"`rank` is {rank}, but the {len(gram)} sampled rows span only {carried} directions. "
            f"Lower `rank` to at most {carried}, or sample more data."
        )
    return values[:rank], vectors[:, :rank]


def numerical_eigenpairs(gram: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenpairs above rounding error, decreasing: values (r,) and vectors (m, r), float64.

    Raises:
        ValueError: If the matrix is not finite.
    """
    if not torch.isfinite(gram).all():
        raise ValueError(
            "The kernel is not finite at the sampled inputs: gradients of the model overflow. "
            "Check the scale of its inputs and weights."
        )
    values, vectors = torch.linalg.eigh(gram.double())
    values, vectors = values.flip(0), vectors.flip(1)
    carried = int((values > torch.finfo(gram.dtype).eps * len(gram) * values[0]).sum())
    return values[:carried], vectors[:, :carried]


def row_gram(rows: Tensor) -> Tensor:
    """Inner products of m rows (m, p): (m, m) in float64, without a float64 copy of the rows."""
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for block in rows.split(max(1, 2**24 // len(rows)), dim=1):
        wide = block.double()
        gram += wide @ wide.T
    return gram
