"""What a model returns: where its logits are in it, and which axes are positions."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ella.inputs import Rows

Output = str | int | Callable[[Any], Tensor] | None
"""Where the logits are: a name, an index, `returned` ↦ logits, or None for the obvious guess."""

NAMES = ("logits", "out", "output", "scores")
"""Under which logits are looked for."""


def check_output(output: object) -> None:
    """Raise a `TypeError` unless it says where logits are."""
    if not (output is None or isinstance(output, (str, int)) or callable(output)):
        raise TypeError(
            f"`output` must be a name, an index, a function of what the model returns, or None; "
            f"got {type(output).__name__}."
        )


def find_logits(returned: Any, output: Output = None) -> Tensor:  # noqa: ANN401
    """The tensor of logits in what a model returned.

    The guess is the tensor itself; what a mapping or an object calls "logits", or else one of
    `NAMES`; the only tensor of a mapping; the first element of a tuple if its others are no
    tensors of the same number of axes.

    Raises:
        TypeError: If there is none, or several could be meant.
    """
    found: object
    if callable(output):
        found = output(returned)
    elif output is not None:
        found = _named(returned, output)
    else:
        found = _guessed(returned)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"`model` must return a tensor of outputs, or one in an object, a mapping or a tuple; "
            f"got {type(returned).__name__}{_listed(returned)}. Say which with `output=`: a name, "
            f"an index, or a function of what the model returns."
        )
    return found


def _named(returned: Any, output: str | int) -> object:  # noqa: ANN401
    try:
        if isinstance(output, str) and not isinstance(returned, Mapping):
            return getattr(returned, output)
        return returned[output]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise TypeError(
            f"`output` is {output!r}, but the model returned {type(returned).__name__}"
            f"{_listed(returned)}, which has no such part."
        ) from error


def _guessed(returned: Any) -> object:  # noqa: ANN401
    if isinstance(returned, Tensor):
        return returned
    for name in NAMES:
        found = returned.get(name) if isinstance(returned, Mapping) else None
        found = getattr(returned, name, None) if found is None else found
        if isinstance(found, Tensor):
            return found
    if isinstance(returned, Mapping):
        tensors = [value for value in returned.values() if isinstance(value, Tensor)]
        return tensors[0] if len(tensors) == 1 else None
    if isinstance(returned, (tuple, list)) and returned:
        first, *rest = returned
        alike = [v for v in rest if isinstance(v, Tensor) and v.ndim == getattr(first, "ndim", 0)]
        return None if any(v.shape == first.shape for v in alike) and len(alike) > 1 else first
    return None


def _listed(returned: object) -> str:
    """What there is to choose from, as " of (...)"."""
    if isinstance(returned, Mapping):
        names = list(map(str, returned))
    elif isinstance(returned, (tuple, list)):
        names = [_kind(each) for each in returned]
    elif is_dataclass(returned):
        names = [field.name for field in fields(returned)]
    else:
        return ""
    return f" of ({', '.join(names)})"


def _kind(value: object) -> str:
    return f"Tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@dataclass(frozen=True)
class Layout:
    """Axes of a model's outputs.

    Attributes:
        positions: Lengths of the axes of positions; none for a classifier of whole examples.
        class_axis: Which axis holds the classes.
        num_classes: c.
    """

    positions: tuple[int, ...]
    class_axis: int
    num_classes: int

    @classmethod
    def of(cls, outputs: Tensor) -> "Layout":
        """Three axes are (n, positions, c), as of transformers; more are (n, c, *positions)."""
        shape = tuple(outputs.shape)
        if len(shape) <= 2:
            return cls((), 1, (*shape, 1)[1])
        if len(shape) == 3:
            return cls(shape[1:2], 2, shape[2])
        return cls(shape[2:], 1, shape[1])

    @property
    def num_positions(self) -> int:
        """P, 1 for a classifier of whole examples."""
        return int(torch.Size(self.positions).numel())

    def flat(self, outputs: Tensor) -> Tensor:
        """Outputs of every row, shape (n, P, c)."""
        last = outputs.movedim(self.class_axis, -1)
        return last.reshape(len(outputs), self.num_positions, last.shape[-1])

    def restored(self, rows: Tensor) -> Tensor:
        """Values of all rows, (n·P, c) or (n·P,), with the axes of outputs, or without classes."""
        if not self.positions:
            return rows
        found = rows.reshape(-1, *self.positions, *rows.shape[1:])
        return found.movedim(-1, self.class_axis) if rows.ndim == 2 else found

    def flat_targets(self, y: Tensor) -> Tensor:
        """Targets of every row: (n·P,) from (n, *positions), or (n·P, c) as outputs are.

        Raises:
            ValueError: If they have another shape.
        """
        if tuple(y.shape[1:]) == self.positions:
            return y.flatten()
        if y.ndim == len(self.positions) + 2:
            last = y.movedim(self.class_axis, -1)
            if tuple(last.shape[1:-1]) == self.positions:
                return last.flatten(0, -2)
        axes = ", ".join(map(str, self.positions))
        raise ValueError(
            f"Labels must have shape (n, {axes}), one for every position of the outputs, whose "
            f"axis {self.class_axis} was taken for the {self.num_classes} classes; got "
            f"{tuple(y.shape)}. If the classes are on another axis, move them with `output=`, for "
            f"example output=lambda out: out.movedim(1, -1)."
        )


def as_rows(outputs: Tensor, x: object) -> Tensor:
    """Outputs (m, c): those of the rows, or of the examples. One logit may lack its axis."""
    if isinstance(x, Rows):
        return Layout.of(outputs).flat(outputs)[x.example, x.position]
    return outputs.unsqueeze(-1) if outputs.ndim == 1 else outputs
