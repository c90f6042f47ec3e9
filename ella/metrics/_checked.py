"""What metrics may be given, as float64 and int64 tensors on the CPU."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ella.targets import check_class_labels


class SupportsArray(Protocol):
    """What NumPy turns into an array, such as a pandas Series or DataFrame."""

    def __array__(self) -> NDArray[np.generic]:
        """Itself as an array."""


Array = Tensor | NDArray[np.generic] | SupportsArray
"""Whatever may come out of a model or a scikit-learn pipeline."""
NUMBERS = "biuf"
"""Kinds of NumPy's dtypes that are numbers, or yes and no."""
ROW_SUM_TOLERANCE = 1e-2
"""How far a row of `probs` may be from 1, or a probability above it: half-precision softmax is off
by a few 1e-3."""


def as_tensor(name: str, values: Array) -> Tensor:
    """Values as they are, without a graph and on the CPU.

    Raises:
        TypeError: If they are neither a tensor nor an array of numbers. A list is refused, as it
            may well be one of batches.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if hasattr(values, "__array__"):
        # A copy: torch shares no memory with arrays that are read-only or run backwards.
        array = np.array(values, order="C")
        if array.dtype.kind not in NUMBERS:
            raise TypeError(
                f"`{name}` must hold numbers; got dtype {array.dtype}. Class names become indices "
                f"by numpy.searchsorted(classes, names), in the order of the columns of `probs`."
            )
        # Torch knows no foreign byte order, and hardly any of the unsigned integers.
        native = np.int64 if array.dtype.kind in "iu" else array.dtype.newbyteorder("=")
        return torch.as_tensor(array.astype(native))
    raise TypeError(
        f"`{name}` must be a tensor or a NumPy array; got {type(values).__name__}. Convert "
        f"numbers with torch.as_tensor, join batches with torch.cat."
    )


def finite(name: str, values: Array) -> Tensor:
    """Finite numbers of any shape as float64.

    Raises:
        TypeError: See `as_tensor`.
        ValueError: If one is NaN or infinite.
    """
    numbers = as_tensor(name, values).double()
    if not torch.isfinite(numbers).all():
        raise ValueError(f"`{name}` holds NaN or infinite values.")
    return numbers


def class_probabilities(name: str, probs: Array) -> Tensor:
    """Rows of probabilities, shape (n, c), as float64.

    Raises:
        TypeError: See `as_tensor`.
        ValueError: If they have another shape, or are no probabilities.
    """
    numbers = finite(name, probs)
    if numbers.ndim != 2 or numbers.shape[1] < 2 or len(numbers) == 0:
        raise ValueError(
            f"`{name}` must have shape (n, c) with n >= 1 and c >= 2; got "
            f"{tuple(numbers.shape)}. For two classes give both probabilities."
        )
    if (numbers < 0).any() or ((numbers.sum(1) - 1).abs() > ROW_SUM_TOLERANCE).any():
        raise ValueError(
            f"The rows of `{name}` must be probabilities; apply .softmax(-1) to logits."
        )
    return numbers


def probs_and_labels(probs: Array, labels: Array) -> tuple[Tensor, Tensor]:
    """Rows of probabilities, shape (n, c), as float64, and a class for each, shape (n,), as int64.

    Raises:
        TypeError: If the labels are not integers, or see `as_tensor`.
        ValueError: If shapes or values are bad.
    """
    rows, classes = class_probabilities("probs", probs), as_tensor("labels", labels)
    if classes.shape != rows.shape[:1]:
        raise ValueError(f"`labels` must have shape ({len(rows)},); got {tuple(classes.shape)}.")
    check_class_labels(classes, rows.shape[1])
    return rows, classes.long()


def probs_and_targets(probs: Array, targets: Array) -> tuple[Tensor, Tensor]:
    """Two sets of probabilities of one shape (n, c), as float64.

    Raises:
        TypeError: See `as_tensor`.
        ValueError: If shapes or values are bad.
    """
    rows, soft = class_probabilities("probs", probs), class_probabilities("targets", targets)
    check_one_shape(probs=rows, targets=soft)
    return rows, soft


def probs_and_bits(probs: Array, targets: Array) -> tuple[Tensor, Tensor]:
    """Probabilities as float64 and whether each event occurred as bool, both (n, c).

    Raises:
        TypeError: See `as_tensor`.
        ValueError: If shapes or values are bad.
    """
    yes, bits = columns("probs", probs), columns("targets", targets)
    check_one_shape(probs=yes, targets=bits)
    if (yes < 0).any() or (yes > 1 + ROW_SUM_TOLERANCE).any():
        raise ValueError("`probs` must lie between 0 and 1; apply .sigmoid() to logits.")
    if not ((bits == 0) | (bits == 1)).all():
        raise ValueError("`targets` must be 0 or 1: whether each label applies.")
    return yes.clamp_max(1), bits.bool()


def check_one_shape(**tensors: Tensor) -> None:
    """Raise a `ValueError` unless all of them have the same shape."""
    shapes = [tuple(tensor.shape) for tensor in tensors.values()]
    if len(set(shapes)) > 1:
        names = ", ".join(f"`{name}`" for name in tensors)
        raise ValueError(f"{names} must have one shape; got {', '.join(map(str, shapes))}.")


def scores_of_examples(name: str, scores: Array) -> Tensor:
    """One number an example, shape (n,), as float64.

    Raises:
        TypeError: See `as_tensor`.
        ValueError: If there is none, they have another shape, or one is not finite.
    """
    numbers = finite(name, scores)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise ValueError(f"`{name}` must have shape (n,) with n >= 1; got {tuple(numbers.shape)}.")
    return numbers


def columns(name: str, values: Array) -> Tensor:
    """Finite numbers of shape (n, c), or (n,) for c = 1, as (n, c) and float64.

    Raises:
        TypeError: See `as_tensor`.
        ValueError: If there is none, they have another shape, or one is not finite.
    """
    numbers = finite(name, values)
    if numbers.ndim not in (1, 2) or numbers.numel() == 0:
        raise ValueError(
            f"`{name}` must have shape (n, c) or (n,) with n >= 1 and c >= 1; got "
            f"{tuple(numbers.shape)}."
        )
    return numbers.unsqueeze(1) if numbers.ndim == 1 else numbers


def smallest(probs: Array) -> float:
    """The smallest normal number of the dtype that probabilities, checked already, came in."""
    dtype = probs.dtype if isinstance(probs, Tensor) else as_tensor("probs", probs).dtype
    return torch.finfo(dtype).tiny if dtype.is_floating_point else 0.0
