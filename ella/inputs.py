"""What a user may pass in, and the one sentence said when it is something else."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

MASK_KEY = "attention_mask"
"""Where a mapping holds the mask (n, positions) of its sequences: 0 is padding."""


@runtime_checkable
class Collated(Protocol):
    """A batch that is one object, passed to the model as it is: PyTorch Geometric's, or your own.

    Its number of examples is the length of `to_data_list()`.
    """

    def to_data_list(self) -> list[Any]:
        """Its examples, one by one."""

    @classmethod
    def from_data_list(cls, data_list: list[Any]) -> "Self":
        """A batch of some examples."""

    def to(self, device: torch.device) -> "Self":
        """The same on a device."""


@dataclass(frozen=True)
class Rows:
    """Rows (example, position) of a model with an output for every position.

    What has n examples and P positions has n·P rows; everything that takes inputs takes some of
    them, and counts rows where it counts examples otherwise.

    Attributes:
        inputs: Of the model.
        example: Which of the inputs a row belongs to, shape (m,).
        position: Its position, counted through all axes of positions, shape (m,).
    """

    inputs: "Inputs"
    example: Tensor
    position: Tensor

    @classmethod
    def all_of(cls, inputs: "Inputs", num_positions: int) -> "Rows":
        """Every position of every example, example by example."""
        n, device = num_examples(inputs), input_tensors(inputs)[0].device
        example = torch.arange(n, device=device).repeat_interleave(num_positions)
        return cls(inputs, example, torch.arange(num_positions, device=device).repeat(n))

    def some(self, index: slice | Tensor) -> "Rows":
        """Some of the rows, without the inputs that they do not need."""
        example, position = self.example[index], self.position[index]
        needed, example = example.unique(return_inverse=True)
        return Rows(take(self.inputs, needed), example, position)

    def unfolded(self) -> "Rows":
        """The same rows, each with a copy of its input."""
        zeros = torch.zeros_like(self.example)
        return Rows(take(self.inputs, self.example), zeros, self.position)


Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | Collated | Rows
"""One batch of model inputs: `model(x)`, `model(*x)` or `model(**x)`; axis 0 is n examples."""


def model_inputs(x: Inputs) -> Inputs:
    """What the model itself is called with: of rows, the inputs that they are rows of."""
    return x.inputs if isinstance(x, Rows) else x


# What users have instead of tensors


def is_array(value: object) -> bool:
    """Whether it is an array of some library: NumPy, pandas, JAX, CuPy, ..."""
    return hasattr(value, "__dlpack__") or hasattr(value, "__array__")


def as_tensor(value: object, name: str = "x") -> Tensor:
    """A tensor from an array of any library, or from a list of numbers or of such arrays.

    Raises:
        TypeError: If it holds something else than numbers, or rows of several lengths.
    """
    if isinstance(value, Tensor):
        return value
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        return torch.from_dlpack(value)
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Tensor) for v in value):
        shapes = {tuple(v.shape) for v in value}
        if len(shapes) == 1:
            return torch.stack(list(value))
    try:
        array = np.asarray(value)
    except ValueError:  # rows of several lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"`{name}` must hold numbers, in rows of one length; got {type(value).__name__} of "
            f"dtype {array.dtype}. Encode or pad it first."
        )
    # torch has no arithmetic on these; copied, as torch warns of arrays that it may not change.
    array = array.astype(np.int64) if array.dtype in (np.uint16, np.uint32, np.uint64) else array
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise TypeError(f"`{name}` holds masked values. Fill them first, with `filled`.")
    kept = np.float64 if array.dtype == np.longdouble else array.dtype.newbyteorder("=")
    array = array.astype(kept)
    return torch.from_numpy(np.array(array, copy=True, order="C"))


def as_inputs(x: object, device: torch.device | None = None) -> Inputs:
    """A batch of model inputs with tensors for arrays; named tuples become tuples.

    Args:
        x: Whatever the user has.
        device: Where arrays are put; tensors stay where they are.

    Raises:
        TypeError: If there is no such thing in it.
    """
    if isinstance(x, (Tensor, Rows)):
        return x
    if isinstance(x, Mapping):
        return {key: _as_value(value, device, str(key)) for key, value in x.items()}
    if isinstance(x, tuple):
        return tuple(_as_value(value, device) for value in x)
    if isinstance(x, Collated):
        return x
    if is_array(x):
        return as_tensor(x).to(device)
    raise TypeError(
        f"`x` must be a tensor or an array, a tuple or a mapping of them; got "
        f"{type(x).__name__}. Convert it first, for example with torch.as_tensor(x)."
    )


def _as_value(value: object, device: torch.device | None, name: str = "x") -> object:
    """What a tuple or a mapping may hold: arrays become tensors, settings stay as they are."""
    if isinstance(value, (Tensor, Collated, bool, int, float, str, type(None))):
        return value
    if is_array(value):
        return as_tensor(value, name).to(device)
    if isinstance(value, Mapping):
        return {key: _as_value(each, device, str(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        if value and all(isinstance(each, (int, float, list)) for each in value):
            return as_tensor(value, name).to(device)
        items = [_as_value(each, device, name) for each in value]
        return items if isinstance(value, list) else tuple(items)
    return value


# The structure of a batch


def _matched(function: Callable[..., Any], *parts: Any) -> Any:  # noqa: ANN401
    """Apply a function to what batches of one structure hold at the same place."""
    first = parts[0]
    if isinstance(first, Tensor):
        return function(*parts)
    if isinstance(first, Rows):
        fields = (_matched(function, *(vars(p)[name] for p in parts)) for name in vars(first))
        return Rows(*fields)
    if isinstance(first, Mapping):
        return {key: _matched(function, *(part[key] for part in parts)) for key in first}
    if isinstance(first, (tuple, list)):
        columns = [_matched(function, *column) for column in zip(*parts, strict=True)]
        return columns if isinstance(first, list) else tuple(columns)
    return function(*parts) if isinstance(first, Collated) else first


def map_inputs(x: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a tensor function to every tensor of a batch, keeping its structure."""
    found: Inputs = _matched(lambda t: function(t) if isinstance(t, Tensor) else t, x)
    return found


def input_tensors(x: Inputs) -> list[Tensor]:
    """The tensors of one batch, in a fixed order."""
    if isinstance(x, Tensor):
        return [x]
    found: list[Tensor] = []

    def note(value: Any) -> None:  # noqa: ANN401
        found.extend([value] if isinstance(value, Tensor) else collated_tensors(value))

    _matched(note, x)
    return found


def collated_tensors(x: Collated) -> list[Tensor]:
    """The tensors of a batch that is one object, as far as it lists them."""
    listed = x.to_dict() if hasattr(x, "to_dict") else vars(x)
    return [value for value in listed.values() if isinstance(value, Tensor)]


def num_examples(x: Inputs) -> int:
    """n, the length of the first axis of a batch."""
    if isinstance(x, Rows):
        return len(x.position)
    if isinstance(x, Tensor):
        return x.shape[0]
    sizes: list[int] = []
    _matched(lambda value: sizes.append(_length(value)), x)
    return sizes[0]


def _length(value: Tensor | Collated) -> int:
    if isinstance(value, Tensor):
        return value.shape[0]  # a third of the time of `len`
    known = getattr(value, "num_graphs", None)
    return known if isinstance(known, int) else len(value.to_data_list())


def take(x: Inputs, part: slice | Tensor) -> Inputs:
    """Some examples of a batch."""

    def some(value: Tensor | Collated) -> Tensor | Collated:
        if isinstance(value, Tensor):
            return value[part]
        listed = value.to_data_list()
        which = range(len(listed))[part] if isinstance(part, slice) else part.tolist()
        return type(value).from_data_list([listed[i] for i in which])

    if isinstance(x, Rows):
        return x.some(part)
    found: Inputs = _matched(some, x)
    return found


def attention_mask(x: Inputs) -> Tensor | None:
    """The mask of padded sequences, shape (n, positions), if the inputs say which they are."""
    x = model_inputs(x)
    mask = x.get(MASK_KEY) if isinstance(x, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def concatenate(parts: Sequence[Inputs]) -> Inputs:
    """Join batches of one structure and one shape of examples along the examples."""

    def joined(*values: Any) -> Any:  # noqa: ANN401
        if isinstance(values[0], Tensor):
            return torch.cat(values)
        listed = [example for value in values for example in value.to_data_list()]
        return type(values[0]).from_data_list(listed)

    if isinstance(parts[0], Rows):
        return _joined_rows([part for part in parts if isinstance(part, Rows)])
    found: Inputs = _matched(joined, *parts)
    return found


def _joined_rows(parts: Sequence[Rows]) -> Rows:
    starts = np.cumsum([0, *(num_examples(part.inputs) for part in parts)])
    examples = [part.example + int(start) for part, start in zip(parts, starts, strict=False)]
    inputs = concatenate([part.inputs for part in parts])
    return Rows(inputs, torch.cat(examples), torch.cat([part.position for part in parts]))


def example_shape(x: Inputs) -> tuple[object, ...]:
    """Shapes and dtypes of one example: batches that agree in it can be joined."""
    x = model_inputs(x)
    if not isinstance(x, Tensor) and any(isinstance(v, Collated) for v in leaves(x)):
        return (type(x).__name__,)
    return tuple((tuple(t.shape[1:]), t.dtype) for t in input_tensors(x))


def leaves(x: Inputs) -> list[Tensor | Collated]:
    """The tensors and batch objects that a batch holds."""
    found: list[Tensor | Collated] = []
    _matched(found.append, x)
    return found


def slices(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(n)."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def moved(x: Inputs, device: torch.device, dtype: torch.dtype | None = None) -> Inputs:
    """The same on a device, its real numbers in a dtype if one is given."""

    def move(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, Tensor) and value.is_floating_point() and dtype is not None:
            return value.to(device, dtype)
        return value.to(device)

    found: Inputs = _matched(move, x)
    return found


def check_iterable(x: object) -> None:
    """Raise a `TypeError` for what is neither a batch nor a loader."""
    if not isinstance(x, Iterable) or isinstance(x, str):
        raise TypeError(
            f"`x` must be one batch (a tensor, an array, a tuple or a mapping of them) or a "
            f"loader of batches; got {type(x).__name__}."
        )


def check_inputs(x: Inputs, device: torch.device) -> int:
    """Check one batch of inputs and return its number of examples n.

    Raises:
        TypeError: If `x` holds no tensor.
        ValueError: If it is empty, its tensors disagree on n, hold NaN or infinity, or live
            on another device than the model.
    """
    if isinstance(x, Rows):
        check_inputs(x.inputs, device)
        return len(x.position)
    if not isinstance(x, (Tensor, tuple, Mapping, Collated)):
        raise TypeError(
            f"`x` must be a tensor, a tuple of tensors or a mapping of tensors; got "
            f"{type(x).__name__}. Convert it first, for example with torch.as_tensor(x)."
        )
    if isinstance(x, Tensor) and x.ndim:
        _check_tensor(x, device)
        return _checked_length(x.shape[0])
    found = [x] if isinstance(x, Tensor) else leaves(x)
    if not found or any(isinstance(value, Tensor) and value.ndim == 0 for value in found):
        raise TypeError("`x` must hold at least one tensor whose first axis is the examples.")
    sizes = {_length(value) for value in found}
    if len(sizes) != 1:
        raise ValueError(
            f"The tensors of `x` disagree on the number of examples: {sorted(sizes)}."
        )
    for tensor in input_tensors(x):
        _check_tensor(tensor, device)
    return _checked_length(sizes.pop())


def _checked_length(n: int) -> int:
    if n == 0:
        raise ValueError("`x` is empty: expected at least one example.")
    return n


def _check_tensor(tensor: Tensor, device: torch.device) -> None:
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        raise TypeError(
            f"`x` must be a dense tensor; got one that is {kind}. Convert it first, for example "
            f"with x.to_dense(), x.to_padded_tensor(0) or x.dequantize()."
        )
    if tensor.device != device:
        raise ValueError(
            f"`x` is on {tensor.device}, but the model is on {device}. "
            f"Move it with x.to({str(device)!r}), or pass a loader, whose batches are moved."
        )
    if (tensor.is_floating_point() or tensor.is_complex()) and not all_finite(tensor):
        raise ValueError("`x` holds NaN or infinite values. Remove or impute them first.")


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    if tensor.is_complex():
        return bool(torch.isfinite(tensor).all())
    # One sum says so, in a third of the time; only one that overflowed needs a closer look.
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())
