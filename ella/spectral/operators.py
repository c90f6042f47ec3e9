"""Kernel operators: the kernel integral of a function, estimated on a batch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class KernelOperator(Protocol):
    r"""The integral operator :math:`(Tψ)(x) = E_{x'}[κ(x, x') ψ(x')]` of a kernel κ."""

    def apply(self, x: Tensor, sources: Tensor, values: Tensor) -> Tensor:
        r"""The batch estimate :math:`\frac{1}{m} \sum_j κ(x_i, s_j) v_j`.

        Args:
            x: n inputs, in whatever form the kernel reads: vectors, features, indices of nodes.
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
        # Not `torch.cdist`: it has no forward-mode derivative.
        norms = x.square().sum(1).unsqueeze(1) + y.square().sum(1)
        squares = (norms - 2 * x @ y.T).clamp_min(0)
        return torch.exp(-0.5 * squares / self.length_scale**2)


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


class Graph:
    r"""The normalised adjacency matrix :math:`n D^{-1/2} A D^{-1/2}` as a kernel on node indices.

    With the factor n and the uniform distribution on the n nodes, the integral operator is
    multiplication by :math:`D^{-1/2} A D^{-1/2}`. Its spectrum lies in [-1, 1]: it is indefinite,
    so train with `NestedLoRA`. Nodes without edges have zero rows.

    Args:
        edges: Pairs of node indices, shape (2, m), in any order and direction; repetitions count
            once and loops not at all.
        num_nodes: n.
        weights: Of the edges, shape (m,), at least 0; None gives each 1. Of repetitions the
            largest counts.

    Raises:
        ValueError: If an index is out of range, or a weight negative.
    """

    def __init__(self, edges: Tensor, num_nodes: int, weights: Tensor | None = None) -> None:
        if edges.numel() and not 0 <= int(edges.min()) <= int(edges.max()) < num_nodes:
            raise ValueError(
                f"`edges` must hold node indices in [0, {num_nodes}); got "
                f"[{int(edges.min())}, {int(edges.max())}]."
            )
        weights = torch.ones(edges.shape[1]) if weights is None else weights
        if weights.numel() and weights.min() < 0:
            raise ValueError(f"`weights` must be at least 0; got {weights.min().item():g}.")
        kept = edges[0] != edges[1]
        both = torch.cat([edges[:, kept], edges[:, kept].flip(0)], dim=1)
        codes, which = torch.unique(both[0] * num_nodes + both[1], return_inverse=True)
        values = weights.new_zeros(len(codes))
        values.scatter_reduce_(0, which, weights[kept].repeat(2), "amax")
        rows, columns = codes // num_nodes, codes % num_nodes
        degree = values.new_zeros(num_nodes).index_add_(0, rows, values)
        # An edge of weight 0 may be the only one of its nodes.
        values = torch.where(values > 0, values / (degree[rows] * degree[columns]).sqrt(), 0)
        self.num_nodes = num_nodes
        self.matrix = torch.sparse_coo_tensor(
            torch.stack([rows, columns]), values, (num_nodes, num_nodes), check_invariants=True
        ).coalesce()

    def apply(self, x: Tensor, sources: Tensor, values: Tensor) -> Tensor:
        """See `KernelOperator.apply`; inputs are node indices."""
        block = self.matrix.index_select(0, x).index_select(1, sources)
        product = torch.sparse.mm(block, values.flatten(1)) * (self.num_nodes / len(sources))
        return product.unflatten(1, values.shape[1:])
