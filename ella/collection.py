"""Many inputs at once, which need not be of one length."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ella.inputs import Inputs, concatenate, example_shape, num_examples, slices, take


@dataclass(frozen=True)
class Collection:
    """Inputs in the batches that they came in, whose examples may differ in length.

    Attributes:
        parts: Batches; neighbours of one shape are joined.
    """

    parts: tuple[Inputs, ...]

    @classmethod
    def of(cls, batches: Iterable[Inputs]) -> "Collection":
        """Join what can be joined."""
        runs: list[list[Inputs]] = []
        for batch in batches:
            if not runs or example_shape(runs[-1][0]) != example_shape(batch):
                runs.append([])
            runs[-1].append(batch)
        return cls(tuple(concatenate(run) for run in runs))

    def __len__(self) -> int:
        """Number of inputs, n."""
        return sum(num_examples(part) for part in self.parts)

    def chunks(self, size: int) -> Iterator[Inputs]:
        """All of them in order, at most `size` at a time."""
        for part in self.parts:
            for some in slices(num_examples(part), size):
                yield take(part, some)

    def chosen(self, index: Tensor) -> Iterator[tuple[Tensor, Inputs]]:
        """Some of them, batch by batch.

        Args:
            index: Which, shape (m,).

        Yields:
            Where in `index` a batch's inputs are, and those inputs, in that order.
        """
        start = 0
        for part in self.parts:
            end = start + num_examples(part)
            where = ((index >= start) & (index < end)).nonzero().squeeze(1)
            if len(where):
                yield where, take(part, index[where] - start)
            start = end


def input_state(x: Inputs) -> tuple[list[str], dict[str, Tensor]]:
    """The form of a batch, "tensor", "tuple" or the keys of a mapping, and its tensors by name.

    Raises:
        TypeError: If it holds something else than tensors.
    """
    named: dict[str, Any] = {"0": x}
    form = ["tensor"]
    if isinstance(x, Mapping):
        form, named = ["mapping", *x], dict(x)
    elif isinstance(x, tuple):
        form, named = ["tuple"], {str(i): value for i, value in enumerate(x)}
    if bad := [type(v).__name__ for v in named.values() if not isinstance(v, Tensor)]:
        raise TypeError(f"Files hold inputs that are tensors; got {bad[0]}.")
    return form, {f"input.{name}": value for name, value in named.items()}


def restored_inputs(form: Sequence[str], tensors: Mapping[str, Tensor]) -> Inputs:
    """What `input_state` described.

    Raises:
        ValueError: If there is no such form, or a tensor is missing.
    """
    found = {k.removeprefix("input."): t for k, t in tensors.items() if k.startswith("input.")}
    match list(form):
        case ["tensor"] if list(found) == ["0"]:
            return found["0"]
        case ["tuple"] if found:
            return tuple(found[key] for key in sorted(found, key=int))
        case ["mapping", *keys] if set(keys) == found.keys():
            return {key: found[key] for key in keys}
    raise ValueError(f"inputs of the form {form!r} are not known")
