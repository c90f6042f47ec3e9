"""Follows what a forward pass does with weights, and the gradients that come back to it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ella.uses import (
    Elementwise,
    Grouped,
    Product,
    Projection,
    Transposed,
    Use,
    by_channels,
    by_last,
)

Size = int | tuple[int, ...]
"""One number for all axes, or one for each."""
GRAM_POSITIONS = 64
"""Norms are exact where a layer sees at most so many positions of an example."""


class Tracing(TorchFunctionMode):
    """Notes every use of given weights, in this thread, and follows the gradients to it.

    Args:
        names: Names of weights by `id`; others are left alone.
        projections: By name, of those with more than one axis.
        n: Number of examples that a forward pass is over.
        like: A tensor of the dtype that everything is computed in.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        projections: Mapping[str, Projection],
        n: int,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.names, self.projections, self.n, self.like = names, projections, n, like
        self.uses: list[Use] = []
        self.roots: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Tensor:
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        note = _NOTES.get(func)
        use = None if note is None else note(self, *args, **kwargs)
        output = func(*args, **kwargs)
        return output if use is None else self._followed(use, output)

    def _followed(self, use: Use, output: Tensor) -> Tensor:
        if not output.requires_grad:  # nothing before it has weights: gradients end here
            root = output.detach().requires_grad_()
            self.roots.append(root)
            output = root.clone()  # which may be written into
        output.register_hook(use.receive)
        self.uses.append(use)
        return output

    def name(self, weight: Tensor | None) -> str | None:
        """Of a weight, if it is one of those given."""
        return None if weight is None else self.names.get(id(weight))

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
        """`torch.nn.functional.linear`."""
        name, n = self.name(weight), self.n
        if name is None:
            return None
        projection = self.projections[name]
        a = by_last(x.detach(), n).to(self.like)
        gram = a.mT @ a if a.shape[-1] <= GRAM_POSITIONS else None
        read = projection.right @ a
        return Product(name, projection.left, read, gram, self.name(bias), lambda g: by_last(g, n))

    def product(self, x: Tensor, weight: Tensor) -> Use | None:
        """`torch.matmul` of inputs and a matrix."""
        return self._times(x, weight, None)

    def product_and_sum(
        self, bias: Tensor, x: Tensor, weight: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> Use | None:
        """`torch.addmm`, as in the layers of GPT-2."""
        if (beta, alpha) != (1, 1) or bias.ndim != 1:
            return None
        return self._times(x, weight, bias)

    def _times(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Use | None:
        name, n = self.name(weight), self.n
        if name is None or weight.ndim != 2 or x.ndim < 2:
            return None
        projection = self.projections[name]
        a = by_last(x.detach(), n).to(self.like)
        gram = a.mT @ a if a.shape[-1] <= GRAM_POSITIONS else None
        read, left = projection.left @ a, projection.right
        return Transposed(name, left, read, gram, self.name(bias), lambda g: by_last(g, n))

    def convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
    ) -> Use | None:
        """`torch.nn.functional.conv1d`, `conv2d` and `conv3d`."""
        name, n, axes = self.name(weight), self.n, weight.ndim - 2
        if name is None or x.ndim != weight.ndim:
            return None
        projection, bias_name = self.projections[name], self.name(bias)
        if groups > 1:
            if isinstance(padding, str):
                return None
            settings = (_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)
            return Grouped(name, projection, bias_name, x, weight, settings, n)
        a, kernels = x.detach().to(self.like), projection.right.view(-1, *weight.shape[1:])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
        read = by_channels(convolve(a, kernels, None, stride, padding, dilation), n)
        gram = None
        if read.shape[-1] <= GRAM_POSITIONS and axes == 2 and not isinstance(padding, str):
            patches = F.unfold(a, weight.shape[2:], dilation, padding, stride)
            patches = by_channels(patches, n)
            gram = patches.mT @ patches
        return Product(name, projection.left, read, gram, bias_name, lambda g: by_channels(g, n))

    def embedding(
        self,
        ids: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        *args: object,
        **kwargs: object,
    ) -> Use | None:
        """`torch.nn.functional.embedding`, as a product with one-hot vectors."""
        name, n = self.name(weight), self.n
        if name is None:
            return None
        # A row of the weight is one token's: P is for tokens, Q for the numbers of each.
        projection = self.projections[name]
        seen = projection.left.T[ids]
        if padding_idx is not None:
            seen = seen * (ids != padding_idx % len(weight)).unsqueeze(-1)
        flat = seen.reshape(n, -1, seen.shape[-1]).mT
        return Transposed(name, projection.right, flat, None, None, lambda g: by_last(g, n))

    def batch_norm(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Use | None:
        """`torch.nn.functional.batch_norm` with running statistics."""
        names = self.name(weight), self.name(bias)
        if names == (None, None) or training or running_mean is None or running_var is None:
            return None
        normed = F.batch_norm(x.detach(), running_mean, running_var, None, None, False, 0.0, eps)
        return Elementwise(*names, normed.to(self.like), lambda g: by_channels(g, self.n))

    def layer_norm(
        self,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Use | None:
        """`torch.nn.functional.layer_norm`."""
        names = self.name(weight), self.name(bias)
        if names == (None, None):
            return None
        normed = F.layer_norm(x.detach(), shape, None, None, eps).to(self.like)
        return Elementwise(*names, normed, lambda g: _over_shape(g, len(shape), self.n))

    def rms_norm(
        self,
        x: Tensor,
        shape: Sequence[int],
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Use | None:
        """`torch.nn.functional.rms_norm`."""
        name = self.name(weight)
        if name is None:
            return None
        normed = F.rms_norm(x.detach(), shape, None, eps).to(self.like)
        return Elementwise(name, None, normed, lambda g: _over_shape(g, len(shape), self.n))

    def group_norm(
        self,
        x: Tensor,
        num_groups: int,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Use | None:
        """`torch.nn.functional.group_norm`."""
        names = self.name(weight), self.name(bias)
        if names == (None, None):
            return None
        normed = F.group_norm(x.detach(), num_groups, None, None, eps).to(self.like)
        return Elementwise(*names, normed, lambda g: by_channels(g, self.n))


def _over_shape(values: Tensor, axes: int, n: int) -> Tensor:
    """Values (n·f, *positions, *shape) as (n, numbers of the shape, f·positions)."""
    return by_last(values.flatten(-axes), n)


def _each(value: Size, axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else [*value] * (axes // len(value))


_NOTES: dict[object, Callable[..., Use | None]] = {
    F.linear: Tracing.linear,
    torch.addmm: Tracing.product_and_sum,
    torch.matmul: Tracing.product,
    torch.mm: Tracing.product,
    torch.Tensor.matmul: Tracing.product,
    torch.Tensor.mm: Tracing.product,
    F.conv1d: Tracing.convolution,
    F.conv2d: Tracing.convolution,
    F.conv3d: Tracing.convolution,
    F.embedding: Tracing.embedding,
    F.batch_norm: Tracing.batch_norm,
    F.layer_norm: Tracing.layer_norm,
    F.group_norm: Tracing.group_norm,
}
if hasattr(F, "rms_norm"):
    _NOTES[F.rms_norm] = Tracing.rms_norm
