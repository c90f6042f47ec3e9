"""Targets: what they may be, and the checks that every likelihood shares."""

import torch
from torch import Tensor

from ella.inputs import as_tensor, is_array


def as_labels(y: object) -> Tensor:
    """Labels as a tensor; integers of any width become int64.

    Raises:
        TypeError: If they are neither a tensor, an array nor a list of numbers.
    """
    if y is None:
        raise TypeError("Labels must be a tensor, an array or a list of numbers; got None.")
    if not (is_array(y) or isinstance(y, (list, tuple))):
        raise TypeError(
            f"Labels must be a tensor, an array or a list of numbers; got {type(y).__name__}."
        )
    found = as_tensor(y, "labels")
    if found.ndim == 0:
        raise TypeError("Labels must have an axis of examples; got a single number.")
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    return found.long() if whole else found


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
            f"outputs; got values from {low} to {high}. If one of them marks what does not count, "
            f"pass likelihood=Categorical(ignore_index=...)."
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
