r"""The forward Laplacian: value, gradient and Laplacian of a function in one forward pass.

One pass costs about d + 2 evaluations in d dimensions, where differentiating twice backwards would
cost d + 1 backward passes and their memory.

Reference: Forward Laplacian: A New Computational Framework for Neural Network-based Variational
Monte Carlo (Li et al., 2023), https://arxiv.org/abs/2307.08214
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jvp


class Jet(NamedTuple):
    """A function of x ∈ R^d at n points, with its derivatives in x.

    Attributes:
        value: Any shape.
        gradient: The d partial derivatives, shape (d, *value.shape).
        laplacian: The sum of the second partial derivatives, shape of `value`.
    """

    value: Tensor
    gradient: Tensor
    laplacian: Tensor

    @classmethod
    def of(cls, function: Callable[[Tensor], Tensor], x: Tensor) -> "Jet":
        """Any function of x (n, d) that treats its rows apart, by two nested forward derivatives.

        For networks prefer to carry the jet through the layers: this takes two derivatives along
        each axis.
        """
        value = function(x)
        gradients, laplacian = [], torch.zeros_like(value)
        for axis in torch.eye(x.shape[1], dtype=x.dtype, device=x.device):
            along = axis.expand_as(x)

            def slope(at: Tensor, along: Tensor = along) -> Tensor:
                return jvp(function, (at,), (along,))[1]

            first, second = jvp(slope, (x,), (along,))[:2]
            gradients.append(first)
            laplacian = laplacian + second
        return cls(value, torch.stack(gradients), laplacian)

    def linear(self, function: Callable[[Tensor], Tensor], bias: Tensor) -> "Jet":
        """After an affine map, of which `function` is the linear part; it broadcasts in front."""
        value, laplacian = function(self.value) + bias, function(self.laplacian)
        return Jet(value, function(self.gradient), laplacian)

    def elementwise(self, function: Callable[[Tensor], Tensor]) -> "Jet":
        r"""After f at each element: :math:`∇ = f'∇u, Δ = f'Δu + f''\|∇u\|^2`."""
        ones = torch.ones_like(self.value)

        def slope(at: Tensor) -> Tensor:
            return jvp(function, (at,), (ones,))[1]

        # Without gradients on, torch takes first derivatives that have no second (SiLU). Nothing
        # is recorded under no_grad all the same, as the values then have no graph.
        with torch.enable_grad():
            first, second = jvp(slope, (self.value,), (ones,))[:2]
        laplacian = first * self.laplacian + second * self.gradient.square().sum(0)
        return Jet(function(self.value), first * self.gradient, laplacian)

    def __mul__(self, other: "Jet") -> "Jet":  # type: ignore[override]
        r"""The product uv: :math:`∇ = v∇u + u∇v, Δ = vΔu + 2∇u·∇v + uΔv`."""
        mixed = 2 * (self.gradient * other.gradient).sum(0)
        return Jet(
            self.value * other.value,
            self.gradient * other.value + self.value * other.gradient,
            self.laplacian * other.value + mixed + self.value * other.laplacian,
        )
