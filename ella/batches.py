"""What a loader yields: batches of inputs and labels, told apart, checked and moved."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ella.checkpoint import Checkpoint
from ella.inputs import Collated, Inputs, as_inputs, check_inputs, is_array, moved, take
from ella.network import Network
from ella.processes import Processes
from ella.targets import as_labels

Loader = Iterable[object]
"""What a `DataLoader` is, or a list of batches: each is checked when it comes."""

Split = Callable[[Any], tuple[Any, Any]]
"""What tells inputs and labels of an unusual batch apart: `batch` ↦ `(x, y)`; y may be None."""

View = Callable[[Inputs, Tensor, int], tuple[Inputs, Tensor]]

LABEL_KEYS = ("labels", "label", "y", "target", "targets")


class Batches:
    """Checked batches of a loader, on the model's device; as often as they are asked for.

    Args:
        loader: Any iterable that can be gone through more than once.
        device: Where the model is.
        dtype: Of its weights; real inputs are cast to it. None leaves them as they are.
        split: Tells inputs and labels apart; None is `split_batch`.
        view: `(x, y, number)` ↦ what is yielded of a labelled batch; None yields it as it is.
        processes: Those that share the data; None is this one alone. What a `DistributedSampler`
            repeats to give all of them as much is left out of labelled batches.

    Attributes:
        checkpoint: Where finished parts of a fit to these batches are kept.

    Raises:
        TypeError: If `loader` is a tensor, an iterator, or not iterable.
    """

    def __init__(
        self,
        loader: Loader,
        device: torch.device,
        *,
        dtype: torch.dtype | None = None,
        split: Split | None = None,
        view: View | None = None,
        processes: Processes | None = None,
    ) -> None:
        if isinstance(loader, (Tensor, str, Mapping)) or not isinstance(loader, Iterable):
            raise TypeError(
                f"`loader` must be an iterable of batches, such as a DataLoader; got "
                f"{type(loader).__name__}. Wrap one batch as [(x, y)]."
            )
        if isinstance(loader, Iterator):
            raise TypeError(
                f"`loader` is an iterator ({type(loader).__name__}), which can be used once only; "
                f"the data are gone through several times. Pass a DataLoader or a list."
            )
        self.loader, self.device, self.dtype = loader, device, dtype
        self.split, self.view = split, view
        self.processes = Processes() if processes is None else processes
        self.checkpoint = Checkpoint()
        self._number: int | None = None
        self._first: tuple[Inputs, Tensor] | None = None

    def labelled(self) -> Iterator[tuple[Inputs, Tensor]]:
        """Batches (x, y).

        Raises:
            TypeError: If a batch has the wrong form; the message begins with its number.
            ValueError: If the loader yields nothing, or a batch is bad (`check_inputs`).
        """
        left = unrepeated(self.loader)
        for batch in self._each():
            x, y = self._split(batch, labels=True)
            x, n = self._admitted(x)
            y = as_labels(y)
            if len(y) != n:
                raise ValueError(f"A batch has {n} inputs but {len(y)} labels.")
            y = y.to(self.device)
            if left < n:
                x, y = take(x, slice(int(left))), y[: int(left)]
            left = max(0, left - n)
            if not len(y):
                continue
            if self.view is not None:
                x, y = self.view(x, y, self._number or 0)
            if len(y):
                yield x, y

    def inputs(self) -> Iterator[Inputs]:
        """Inputs; labels, if any, are left out. See `labelled`."""
        for batch in self._each():
            yield self._admitted(self._split(batch, labels=False)[0])[0]

    def first(self) -> tuple[Inputs, Tensor] | None:
        """The first labelled batch, read once; None if other processes have all of the data."""
        if self._first is None:
            self._first = next(self.labelled(), None)
            self.end()
        return self._first

    def end(self) -> None:
        """Errors that follow are not about the batch that came last."""
        self._number = None

    @contextmanager
    def named(self) -> Iterator["Batches"]:
        """Put the number of the batch at hand before errors of data, also those of its users."""
        try:
            yield self
        except (RuntimeError, TypeError, ValueError) as error:
            number, text = self._number, str(error)
            of_data = type(error) in (TypeError, ValueError) or text.startswith("`model`")
            if number is None or not of_data:
                raise
            raise type(error)(f"Batch {number}: {text}") from error
        finally:
            self._number = None

    def _each(self) -> Iterator[object]:
        self._number = None
        empty = True
        for number, batch in enumerate(self.loader):
            empty, self._number = False, number
            yield batch
        self.end()
        if empty and self.processes.size == 1:
            raise ValueError("The loader is empty: expected at least one batch.")

    def _split(self, batch: object, *, labels: bool) -> tuple[object, object]:
        if self.split is None:
            return split_batch(batch, labels=labels)
        found = self.split(batch)
        if not isinstance(found, tuple) or len(found) != 2:
            raise TypeError(f"`split` must return a tuple (x, y); got {type(found).__name__}.")
        return found

    def _admitted(self, x: object) -> tuple[Inputs, int]:
        inputs = moved(as_inputs(x), self.device, self.dtype)
        return inputs, check_inputs(inputs, self.device)


def unrepeated(loader: object) -> float:
    """How many examples a `DistributedSampler` gives this process before it repeats some."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.drop_last:
        return math.inf
    return len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))  # type: ignore[arg-type]


def split_batch(batch: object, *, labels: bool = True) -> tuple[object, object]:
    """Split what a loader yields into inputs and labels.

    Args:
        batch: A pair `(x, y)`, a mapping or named tuple that holds one of `LABEL_KEYS`, an object
            with labels `.y` (`Collated`), or, with `labels=False`, inputs alone.
        labels: Whether labels are required.

    Raises:
        TypeError: If the batch has another form, or has no labels though they are required.
    """
    if isinstance(batch, tuple) and hasattr(batch, "_asdict"):
        return _split_named(batch, labels)
    if isinstance(batch, Mapping):
        return _split_mapping(batch, labels)
    if isinstance(batch, Collated):
        if labels and not isinstance(getattr(batch, "y", None), Tensor):
            raise TypeError(f"A {type(batch).__name__} must hold its labels as `.y`.")
        return batch, getattr(batch, "y", None)
    if not labels and (isinstance(batch, Tensor) or is_array(batch)):
        return batch, None
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2:
            return _as_tuple(batch[0]), batch[1]
        if len(batch) == 1 and not labels:
            return _as_tuple(batch[0]), None
        if len(batch) > 2:
            raise TypeError(
                f"A batch has {len(batch)} elements ({_kinds(batch)}): which are inputs and which "
                f"are labels cannot be told. Pass `split=`, for example "
                f"split=lambda batch: (batch[0], batch[1])."
            )
    expected = "(x, y) or a mapping with labels" if labels else "x, (x, y) or a mapping"
    raise TypeError(
        f"The loader must yield {expected}; got {type(batch).__name__}. For batches of another "
        f"form pass `split=`."
    )


def _split_mapping(batch: Mapping[str, object], labels: bool) -> tuple[object, object]:
    keys = [key for key in LABEL_KEYS if key in batch]
    if labels and not keys:
        raise TypeError(
            f"A mapping batch must hold its labels under one of {LABEL_KEYS}; got the keys "
            f"{sorted(map(str, batch))}. Rename them, or pass `split=`."
        )
    rest = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
    return rest, batch[keys[0]] if keys else None


def _split_named(batch: Any, labels: bool) -> tuple[object, object]:  # noqa: ANN401
    """A named tuple: by its names if one of them is that of labels, else as a tuple."""
    fields = batch._asdict()
    if not any(key in fields for key in LABEL_KEYS):
        return split_batch(tuple(batch), labels=labels)
    rest, y = _split_mapping(fields, labels)
    values = tuple(rest.values()) if isinstance(rest, dict) else ()
    return _as_tuple(values[0]) if len(values) == 1 else values, y


def _as_tuple(x: object) -> object:
    return tuple(x) if isinstance(x, list) and any(map(is_array, x)) else x


def _kinds(batch: Iterable[object]) -> str:
    described = []
    for each in batch:
        shape = getattr(each, "shape", None)
        described.append(type(each).__name__ + ("" if shape is None else f" {tuple(shape)}"))
    return ", ".join(described)


def as_batches(loader: "Loader | Batches", network: Network) -> Batches:
    """Checked batches of a loader for a network, unless it is that already."""
    if isinstance(loader, Batches):
        return loader
    return Batches(loader, network.device, dtype=network.input_dtype)
