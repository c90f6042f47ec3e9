"""What a row of the Jacobian is in the weights of one layer, without making the row."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Projection:
    r"""Makes a sketch of a weight's gradient: G ↦ P G Qᵀ, with P and Q of a few rows.

    P and Q are orthonormal but for a factor, so that inner products are right on average over
    random ones, and exact for a side that is no longer than its projection.

    Attributes:
        left: P, shape (a, o).
        right: Q, shape (b, i), i counting the numbers of one output's weights.
    """

    left: Tensor
    right: Tensor

    @classmethod
    def random(
        cls, shape: tuple[int, int], sides: tuple[int, int], generator: torch.Generator
    ) -> "Projection":
        """From (o, i) to at most these sides, in float64 on the CPU: the same everywhere."""
        left, right = (_orthonormal(s, n, generator) for s, n in zip(sides, shape, strict=True))
        return cls(left, right)

    def to(self, like: Tensor) -> "Projection":
        """In the dtype and on the device of a tensor."""
        return Projection(self.left.to(like), self.right.to(like))

    @property
    def size(self) -> int:
        """Numbers of a sketch, a·b."""
        return len(self.left) * len(self.right)

    def __call__(self, gradient: Tensor) -> Tensor:
        """The sketch (a·b,) of a gradient (o, ...)."""
        return (self.left @ gradient.flatten(1) @ self.right.T).flatten()


def _orthonormal(side: int, length: int, generator: torch.Generator) -> Tensor:
    """At most `side` orthonormal rows of this length, times √(length/side)."""
    if length <= side:
        return torch.eye(length, dtype=torch.float64)
    normal = torch.randn(length, side, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal).Q.T * math.sqrt(length / side)


class Use(ABC):
    """One use of weights in a forward pass over n examples.

    Attributes:
        gradient: Of one output of each example in what the layer returned, once a backward pass
            has come by.
    """

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def receive(self, gradient: Tensor) -> None:
        """A hook of what the layer returned."""
        self.gradient = gradient

    @property
    @abstractmethod
    def names(self) -> tuple[str | None, ...]:
        """Of the weights, None for one that is not asked for."""

    @abstractmethod
    def exact(self, gradient: Tensor) -> dict[str, Tensor]:
        """Gradients of weights that are not sketched, by name, shape (n, size)."""

    def sketched(self, gradient: Tensor) -> tuple[str, Tensor, Tensor | None] | None:
        """Name, sketch (n, a·b) and, where it is cheap, squared norm (n,) of one that is."""
        return None


class Product(Use):
    """Weights W that multiply what comes in: linear layers, convolutions, embeddings.

    The gradient is Σ_t g_t a_tᵀ over positions t, so that its sketch is Σ_t (P g_t)(Q a_t)ᵀ, and
    its squared norm Σ_ts (g_t·g_s)(a_t·a_s).

    Args:
        name: Of W.
        left: P.
        read: Q a_t, shape (n, b, t).
        gram: a_t·a_s, shape (n, t, t), or None for many positions.
        bias: Its name, or None.
        channels: From the gradient as it comes to g, shape (n, o, t).
    """

    def __init__(
        self,
        name: str,
        left: Tensor,
        read: Tensor,
        gram: Tensor | None,
        bias: str | None,
        channels: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.name, self.left, self.read, self.gram = name, left, read, gram
        self.bias, self.channels = bias, channels

    @property
    def names(self) -> tuple[str | None, ...]:
        """See `Use.names`."""
        return self.name, self.bias

    def exact(self, gradient: Tensor) -> dict[str, Tensor]:
        """The bias's: the gradient summed over positions."""
        return {} if self.bias is None else {self.bias: self.channels(gradient).sum(-1)}

    def sketched(self, gradient: Tensor) -> tuple[str, Tensor, Tensor | None]:
        """See `Use.sketched`."""
        g = self.channels(gradient).to(self.left.dtype)
        sketch = ((self.left @ g) @ self.read.mT).flatten(1)
        if self.gram is None:
            return self.name, sketch, None
        return self.name, sketch, ((g.mT @ g) * self.gram).sum((1, 2))


class Elementwise(Use):
    """Weights γ and β of a normalisation, γ·x̂ + β.

    Args:
        weight: Name of γ, or None.
        bias: Name of β, or None.
        normed: x̂, in the shape of what the layer returns.
        channels: See `Product`.
    """

    def __init__(
        self,
        weight: str | None,
        bias: str | None,
        normed: Tensor,
        channels: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.weight, self.bias, self.normed, self.channels = weight, bias, normed, channels

    @property
    def names(self) -> tuple[str | None, ...]:
        """See `Use.names`."""
        return self.weight, self.bias

    def exact(self, gradient: Tensor) -> dict[str, Tensor]:
        """Σ_t g x̂ and Σ_t g."""
        found = {}
        if self.weight is not None:
            found[self.weight] = self.channels(gradient * self.normed).sum(-1)
        if self.bias is not None:
            found[self.bias] = self.channels(gradient).sum(-1)
        return found


class Grouped(Use):
    """Weights of a convolution in groups, such as a depthwise one: few, so rows are made whole.

    Args:
        name: Of the weight.
        projection: Its.
        bias: Name of the bias, or None.
        x: What came in, shape (n·f, ...).
        weight: The weight.
        settings: stride, padding, dilation and groups.
        n: Number of examples.
    """

    def __init__(
        self,
        name: str,
        projection: Projection,
        bias: str | None,
        x: Tensor,
        weight: Tensor,
        settings: tuple[list[int], list[int], list[int], int],
        n: int,
    ) -> None:
        super().__init__()
        self.name, self.projection, self.bias = name, projection, bias
        self.x, self.weight = x.detach(), weight.detach()
        self.settings, self.n = settings, n
        self.version = x._version

    @property
    def names(self) -> tuple[str | None, ...]:
        """See `Use.names`."""
        return self.name, self.bias

    def exact(self, gradient: Tensor) -> dict[str, Tensor]:
        """The bias's."""
        return {} if self.bias is None else {self.bias: by_channels(gradient, self.n).sum(-1)}

    def sketched(self, gradient: Tensor) -> tuple[str, Tensor, Tensor | None]:
        """See `Use.sketched`."""
        if self.x._version != self.version:
            raise ValueError("the input of a convolution was overwritten")
        each = zip(self.x.tensor_split(self.n), gradient.tensor_split(self.n), strict=True)
        rows = torch.stack([self._row(x, g) for x, g in each]).to(self.projection.left.dtype)
        sketches = self.projection.left @ rows.flatten(2) @ self.projection.right.T
        return self.name, sketches.flatten(1), rows.flatten(1).square().sum(-1)

    def _row(self, x: Tensor, gradient: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.settings
        none, only_weight = [0] * len(stride), [False, True, False]
        _, found, _ = torch.ops.aten.convolution_backward(
            *(gradient, x, self.weight, None, stride, padding, dilation, False, none),
            *(groups, only_weight),
        )
        return found


class Transposed(Product):
    """Rows of the weight belong to what comes in, columns to what goes out.

    An embedding, where what comes in is one-hot, or inputs times a matrix.
    """

    def sketched(self, gradient: Tensor) -> tuple[str, Tensor, Tensor | None]:
        """See `Use.sketched`."""
        name, sketch, square = super().sketched(gradient)
        shape = (len(sketch), len(self.left), self.read.shape[1])
        return name, sketch.view(shape).mT.flatten(1), square


def by_channels(values: Tensor, n: int) -> Tensor:
    """Values (n·f, channels, *positions) as (n, channels, f·positions)."""
    flat = values.flatten(2) if values.ndim > 2 else values.unsqueeze(-1)
    return flat.unflatten(0, (n, -1)).transpose(1, 2).flatten(2)


def by_last(values: Tensor, n: int) -> Tensor:
    """Values (n·f, *positions, channels) as (n, channels, f·positions)."""
    return values.reshape(n, -1, values.shape[-1]).mT
