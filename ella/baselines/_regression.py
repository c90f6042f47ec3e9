"""What regression adds to the baselines: the noise variance."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from ella._checks import Inputs, batches, check_positive, check_real_targets


def noise_variance_of(
    outputs: Callable[[Inputs], Tensor], loader: Iterable[Any], device: torch.device
) -> float:
    """σ² of a Gaussian likelihood: the mean square of the residuals.

    Args:
        outputs: f, from inputs to (n, c).
        loader: Training data.
        device: Where the model is.

    Raises:
        TypeError: If a batch or the targets have the wrong form.
        ValueError: If a batch or a target is bad.
    """
    total, count = 0.0, 0
    for x, y in batches(loader, device):
        predicted = outputs(x).double()
        error = predicted - check_real_targets(cast(Tensor, y), predicted.shape[1])
        total += error.square().sum().item()
        count += error.numel()
    # A model that interpolates its data leaves nothing, but a density needs a width.
    return max(total / count, torch.finfo(torch.float32).eps)


def check_noise_variance(likelihood: str, value: float | None) -> None:
    """Raise a `ValueError` unless σ² is None, or above 0 and the likelihood is a Gaussian."""
    if value is None:
        return
    check_positive("noise_variance", value)
    if likelihood != "regression":
        raise ValueError('`noise_variance` is for likelihood="regression".')
