"""Probabilities from logits by more numbers than one temperature, fitted to held-out labels."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Recalibration = Callable[[Tensor], Tensor]
"""From logits (n, c) to probabilities (n, c)."""


def temperature_scaling(logits: Tensor, labels: Tensor) -> Recalibration:
    """softmax(f/τ) with the τ of the highest likelihood.

    Reference: On Calibration of Modern Neural Networks (Guo et al., 2017),
    https://arxiv.org/abs/1706.04599
    """
    tau = best_temperature(logits, labels)
    return lambda f: (f.double() / tau).softmax(1)


def vector_scaling(logits: Tensor, labels: Tensor) -> Recalibration:
    """softmax(w ⊙ f + b) with the w and b of the highest likelihood; from the same paper."""
    f = logits.double()
    weight, bias = torch.ones_like(f[0]), torch.zeros_like(f[0])
    minimize(lambda: F.cross_entropy(weight * f + bias, labels), [weight, bias])
    return lambda f: (weight * f.double() + bias).softmax(1)


def ensemble_temperature_scaling(logits: Tensor, labels: Tensor) -> Recalibration:
    """w₁ softmax(f/τ) + w₂ softmax(f) + w₃/c, τ first, then w on the simplex, by likelihood.

    Reference: Mix-n-Match: Ensemble and Compositional Methods for Uncertainty Calibration in Deep
    Learning (Zhang et al., 2020), https://arxiv.org/abs/2003.07329
    """
    tau = best_temperature(logits, labels)
    raw = torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64)

    def mixed(f: Tensor) -> Tensor:
        weights, f = raw.softmax(0), f.double()
        parts = weights[0] * (f / tau).softmax(1) + weights[1] * f.softmax(1)
        return parts + weights[2] / f.shape[1]

    minimize(lambda: F.nll_loss(mixed(logits).log(), labels), [raw])
    return mixed


RECALIBRATIONS: dict[str, Callable[[Tensor, Tensor], Recalibration]] = {
    "temperature scaling, likelihood": temperature_scaling,
    "vector scaling": vector_scaling,
    "ensemble temperature scaling": ensemble_temperature_scaling,
}


def best_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """τ of the highest likelihood."""
    log_tau = torch.zeros((), dtype=torch.float64)
    minimize(lambda: F.cross_entropy(logits.double() / log_tau.exp(), labels), [log_tau])
    return log_tau.exp()


def minimize(loss: Callable[[], Tensor], parameters: list[Tensor]) -> None:
    """By L-BFGS, in place; what is left needs no gradient."""
    for each in parameters:
        each.requires_grad_(True)
    optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    for each in parameters:
        each.requires_grad_(False)
