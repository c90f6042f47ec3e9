"""What a user may pass in, and the one sentence said when it is something else."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
"""One batch of model inputs: `model(x)`, `model(*x)` or `model(**x)`; axis 0 is n examples."""

Loader = Iterable[object]
"""What a `DataLoader` is, or a list of batches: each is checked when it comes."""

LABEL_KEYS = ("labels", "label", "y", "target")
MASK_KEY = "attention_mask"
"""Where a mapping holds the mask (n, positions) of its sequences: 0 is padding."""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"`{name}` must be one of {expected}; got {value!r}.")


def check_positive(name: str, value: float) -> None:
    """Raise a `ValueError` unless `value` is a finite number above zero."""
    if not (isinstance(value, (int, float)) and 0 < value < float("inf")):
        raise ValueError(f"`{name}` must be a finite number above 0; got {value!r}.")


def input_tensors(x: Inputs) -> list[Tensor]:
    """The tensors of one batch, in a fixed order."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        return [value for value in x.values() if isinstance(value, Tensor)]
    return [value for value in x if isinstance(value, Tensor)]


def map_inputs(x: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply a tensor function to every tensor of a batch, keeping its structure."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, Mapping):
        return {k: function(v) if isinstance(v, Tensor) else v for k, v in x.items()}
    return tuple(function(v) if isinstance(v, Tensor) else v for v in x)


def num_examples(x: Inputs) -> int:
    """n, the length of the first axis of a batch."""
    return len(input_tensors(x)[0])


def take(x: Inputs, part: slice | Tensor) -> Inputs:
    """Some examples of a batch."""
    return map_inputs(x, lambda tensor: tensor[part])


def attention_mask(x: Inputs) -> Tensor | None:
    """The mask of padded sequences, shape (n, positions), if the inputs say which they are."""
    mask = x.get(MASK_KEY) if isinstance(x, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def concatenate(parts: Sequence[Inputs]) -> Inputs:
    """Join batches of one structure along the examples.

    Raises:
        ValueError: If examples differ in shape from one batch to the next.
    """
    first = parts[0]
    shapes = {tuple(tensor.shape[1:] for tensor in input_tensors(part)) for part in parts}
    if len(shapes) > 1:
        one, other = sorted(shapes)[:2]
        raise ValueError(
            f"Examples must have one shape in all batches; got {[tuple(s) for s in one]} and "
            f"{[tuple(s) for s in other]}. Pad all sequences to one length."
        )
    if isinstance(first, Tensor):
        return torch.cat(list(parts))  # type: ignore[arg-type]
    if isinstance(first, Mapping):
        return {key: torch.cat([part[key] for part in parts]) for key in first}  # type: ignore
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def input_state(x: Inputs) -> tuple[list[str], dict[str, Tensor]]:
    """The form of a batch, "tensor", "tuple" or the keys of a mapping, and its tensors by name."""
    if isinstance(x, Tensor):
        return ["tensor"], {"input.0": x}
    if isinstance(x, Mapping):
        return ["mapping", *x], {f"input.{key}": value for key, value in x.items()}
    return ["tuple"], {f"input.{i}": value for i, value in enumerate(x)}


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


def slices(n: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` that cover range(n)."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def check_inputs(x: Inputs, device: torch.device) -> int:
    """Check one batch of inputs and return its number of examples n.

    Raises:
        TypeError: If `x` holds no tensor.
        ValueError: If it is empty, its tensors disagree on n, hold NaN or infinity, or live
            on another device than the model.
    """
    if not isinstance(x, (Tensor, tuple, Mapping)):
        raise TypeError(
            f"`x` must be a tensor, a tuple of tensors or a mapping of tensors; got "
            f"{type(x).__name__}. Convert it first, for example with torch.as_tensor(x)."
        )
    tensors = input_tensors(x)
    if not tensors or any(tensor.ndim == 0 for tensor in tensors):
        raise TypeError("`x` must hold at least one tensor whose first axis is the examples.")
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1:
        raise ValueError(
            f"The tensors of `x` disagree on the number of examples: {sorted(sizes)}."
        )
    for tensor in tensors:
        if tensor.device != device:
            raise ValueError(
                f"`x` is on {tensor.device}, but the model is on {device}. "
                f"Move it with x.to({str(device)!r}), or pass a loader, whose batches are moved."
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError("`x` holds NaN or infinite values. Remove or impute them first.")
    if (n := sizes.pop()) == 0:
        raise ValueError("`x` is empty: expected at least one example.")
    return n


def split_batch(batch: object, *, labels: bool = True) -> tuple[Inputs, Tensor | None]:
    """Split what a loader yields into inputs and labels.

    Args:
        batch: `(x, y, ...)`, a mapping that holds one of the keys `LABEL_KEYS`, or, with
            `labels=False`, inputs alone.
        labels: Whether labels are required.

    Raises:
        TypeError: If the batch has another form, or has no labels though they are required.
    """
    if isinstance(batch, Mapping):
        keys = [key for key in LABEL_KEYS if key in batch]
        if labels and not keys:
            raise TypeError(
                f"A mapping batch must hold its labels under one of {LABEL_KEYS}; got the keys "
                f"{sorted(batch)}."
            )
        rest = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
        return rest, batch[keys[0]] if keys else None
    if isinstance(batch, Tensor) and not labels:
        return batch, None
    if isinstance(batch, (tuple, list)) and (len(batch) >= 2 or not labels):
        x = tuple(batch[0]) if isinstance(batch[0], list) else batch[0]
        return x, batch[1] if len(batch) >= 2 else None
    expected = "(x, y, ...) or a mapping with labels" if labels else "x, (x, ...) or a mapping"
    raise TypeError(f"The loader must yield {expected}; got {type(batch).__name__}.")


def labelled(loader: Loader, device: torch.device) -> Iterator[tuple[Inputs, Tensor]]:
    """Iterate over checked batches `(x, y)`, moved to the model's device.

    Raises:
        TypeError: If `loader` is a tensor or not iterable, or a batch has the wrong form.
        ValueError: If the loader yields nothing, or a batch is bad (`check_inputs`).
    """
    for batch in _batches(loader):
        x, y = split_batch(batch)
        x = _moved(x, device)
        n = check_inputs(x, device)
        if not isinstance(y, Tensor):
            raise TypeError(f"Labels must be a tensor; got {type(y).__name__}.")
        if len(y) != n:
            raise ValueError(f"A batch has {n} inputs but {len(y)} labels.")
        yield x, y.to(device)


def unlabelled(loader: Loader, device: torch.device) -> Iterator[Inputs]:
    """Iterate over checked inputs, moved to the model's device; labels, if any, are left out.

    Raises:
        TypeError: See `labelled`.
        ValueError: See `labelled`.
    """
    for batch in _batches(loader):
        x = _moved(split_batch(batch, labels=False)[0], device)
        check_inputs(x, device)
        yield x


def _batches(loader: Loader) -> Iterator[object]:
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(
            f"`loader` must be an iterable of batches, such as a DataLoader; got "
            f"{type(loader).__name__}. Wrap one batch as [(x, y)]."
        )
    empty = True
    for batch in loader:
        empty = False
        yield batch
    if empty:
        raise ValueError(
            "The loader is empty: expected at least one batch. An iterator can be used once only; "
            "pass a DataLoader or a list."
        )


def _moved(x: Inputs, device: torch.device) -> Inputs:
    if isinstance(x, (Tensor, tuple, Mapping)):
        return map_inputs(x, lambda tensor: tensor.to(device))
    return x  # `check_inputs` says what is wrong


def check_class_labels(y: Tensor, num_classes: int) -> None:
    """Check class indices of shape (n,) in [0, c).

    Raises:
        TypeError: If they are not integers.
        ValueError: If they have another shape, or are out of range.
    """
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise TypeError(
            f"Class labels must be integers of shape (n,); got dtype {y.dtype}. For real-valued "
            f'targets use likelihood="regression", for yes or no likelihood="binary".'
        )
    if y.ndim != 1:
        raise ValueError(f"Class labels must have shape (n,); got {tuple(y.shape)}.")
    if not y.numel():
        return
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"Class labels must lie in 0..{num_classes - 1}, as the model has {num_classes} "
            f"outputs; got values from {low} to {high}."
        )


def check_real_targets(y: Tensor, num_outputs: int) -> Tensor:
    """Check regression targets and return them with shape (n, c).

    Raises:
        TypeError: If they are not floating point.
        ValueError: If the shape does not fit or a value is not finite.
    """
    if not y.is_floating_point():
        raise TypeError(f"Regression targets must be floating point; got dtype {y.dtype}.")
    y = y.unsqueeze(-1) if y.ndim == 1 else y
    if y.ndim != 2 or y.shape[1] != num_outputs:
        raise ValueError(
            f"Regression targets must have shape (n, {num_outputs}), as the model has "
            f"{num_outputs} outputs; got {tuple(y.shape)}."
        )
    if not torch.isfinite(y).all():
        raise ValueError("Regression targets hold NaN or infinite values.")
    return y
