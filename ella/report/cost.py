"""What a prediction costs, as a multiple of the plain forward pass."""

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def timed(function: Callable[[], T], device: torch.device | str | None = None) -> tuple[T, float]:
    """One call of `function`, as for a fit: its result and its seconds.

    Args:
        function: What to call.
        device: CUDA device to wait for; None waits for the current one if CUDA is in use.

    Returns:
        The result and the wall-clock seconds.
    """
    _synchronize(device)
    start = time.perf_counter()
    result = function()
    _synchronize(device)
    return result, time.perf_counter() - start


def forward_ratio(
    method_fn: Callable[[], object],
    map_fn: Callable[[], object],
    repeats: int = 15,
    device: torch.device | str | None = None,
) -> float:
    """How many times longer a prediction takes than the plain forward pass.

    The two are timed in turn, so that a machine that slows down or is shared slows both.

    Args:
        method_fn: The method's prediction.
        map_fn: The forward pass of the same inputs.
        repeats: Pairs of timed calls, after one pair that is not timed.
        device: As for `timed`.

    Returns:
        The median over pairs of the ratio of their times.
    """
    method_fn(), map_fn()
    ratios = []
    for _ in range(repeats):
        method_seconds = timed(method_fn, device)[1]
        ratios.append(method_seconds / timed(map_fn, device)[1])
    return statistics.median(ratios)


def _synchronize(device: torch.device | str | None) -> None:
    if device is None:
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    else:
        in_use = torch.device(device).type == "cuda"
    if in_use:
        torch.cuda.synchronize(device)
