"""What classification metrics may be given, as float64 and int64 tensors on the CPU."""

import torch
from torch import Tensor

from ella.inputs import check_class_labels

ROW_SUM_TOLERANCE = 1e-2
"""How far a row of `probs` may be from 1: half-precision softmax is off by a few 1e-3."""


def checked(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Checked probabilities as float64 and labels as int64, both on the CPU."""
    if not isinstance(probs, Tensor) or not isinstance(labels, Tensor):
        raise TypeError(
            f"`probs` and `labels` must be tensors; got {type(probs).__name__} and "
            f"{type(labels).__name__}. Convert them with torch.as_tensor."
        )
    if probs.ndim != 2 or probs.shape[1] < 2 or len(probs) == 0:
        raise ValueError(
            f"`probs` must have shape (n, c) with n >= 1 and c >= 2; got {tuple(probs.shape)}. "
            f"For two classes give both probabilities."
        )
    if labels.shape != probs.shape[:1]:
        raise ValueError(f"`labels` must have shape ({len(probs)},); got {tuple(labels.shape)}.")
    probs, labels = probs.detach().cpu().double(), labels.detach().cpu()
    if not torch.isfinite(probs).all():
        raise ValueError("`probs` holds NaN or infinite values.")
    if (probs < 0).any() or ((probs.sum(1) - 1).abs() > ROW_SUM_TOLERANCE).any():
        raise ValueError(
            "The rows of `probs` must be probabilities; apply .softmax(-1) to logits."
        )
    check_class_labels(labels, probs.shape[1])
    return probs, labels.long()


def checked_soft(probs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64 probabilities of one shape (n, c), on the CPU."""
    parts = [checked(part, part.argmax(1))[0] for part in (probs, targets)]
    if parts[0].shape != parts[1].shape:
        raise ValueError(
            f"`probs` and `targets` must have one shape; got {tuple(probs.shape)} and "
            f"{tuple(targets.shape)}."
        )
    return parts[0], parts[1]
