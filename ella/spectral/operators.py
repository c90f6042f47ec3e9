"""Kernel operators: the kernel integral of a function, estimated on a batch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class KernelOperator(Protocol):
    r"""The integral operator :math:`(Tψ)(x) = E_{x'}[κ(x, x') ψ(x')]` of a kernel κ."""

    def apply(self, x: Any, sources: Any, values: Tensor) -> Tensor:  # noqa: ANN401
        r"""The batch estimate :math:`\frac{1}{m} \sum_j κ(x_i, s_j) v_j`.

        Args:
            x: n inputs, in whatever form the kernel reads.
            sources: m inputs s_j.
            values: v_j = ψ(s_j), shape (m, c, k).

        Returns:
            Shape (n, c, k).
        """


class Kernel(ABC):
    """A scalar kernel on vectors with a closed form; applied to each output on its own."""

    @abstractmethod
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """κ(x_i, y_j) for x (n, d) and y (m, d): shape (n, m)."""

    def apply(self, x: Tensor, sources: Tensor, values: Tensor) -> Tensor:
        """See `KernelOperator.apply`."""
        return torch.einsum("nm,mck->nck", self(x, sources), values) / len(sources)


@dataclass(frozen=True)
class RBF(Kernel):
    r"""The Gaussian kernel :math:`\exp(-\|x - y\|^2 / 2 l^2)` with length scale l."""

    length_scale: float = 1.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Shape (n, m)."""
        return torch.exp(-0.5 * torch.cdist(x, y).square() / self.length_scale**2)


@dataclass(frozen=True)
class Polynomial(Kernel):
    r"""The polynomial kernel :math:`(x^\top y + b)^q`, of rank at most (d+q choose q)."""

    degree: int = 4
    bias: float = 1.5

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Shape (n, m)."""
        return (x @ y.T + self.bias) ** self.degree


@dataclass(frozen=True)
class FeatureKernel:
    r"""A matrix-valued kernel given by its features: :math:`κ(x, x') = S(x) S(x')^\top`.

    The inputs of `apply` are the features themselves, shape (n, c, r), so that features which are
    dear (Jacobian products) are computed once and every product after that costs O(n·c·r·k).
    """

    def apply(self, x: Tensor, sources: Tensor, values: Tensor) -> Tensor:
        """See `KernelOperator.apply`."""
        return x @ (torch.einsum("mcr,mck->rk", sources, values) / len(sources))


@dataclass(frozen=True)
class Teacher:
    """Known function values in the place of Tψ, for `Regression`: the inputs are the targets."""

    def apply(self, x: Tensor, sources: Tensor, values: Tensor) -> Tensor:
        """The targets of x, shape (n, c, k), whatever ψ is."""
        return x
