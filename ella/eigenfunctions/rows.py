"""Networks at some outputs of each example, for targets that are known there alone."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ella.inputs import slices
from ella.spectral import Regression, least_squares

AT_ONCE = 1024
"""Examples that networks are evaluated at together."""
ALL_OUTPUTS_AT_ONCE = 64
"""The same where all outputs have to be computed for some."""


@runtime_checkable
class AtRows(Protocol):
    """A network that can compute some outputs of each example without the others."""

    def at_rows(self, features: Tensor, rows: Tensor) -> Tensor:
        """Values (n, q, ...) at rows (n, q) of the c outputs of inputs (n, d)."""


def values_at(network: nn.Module, inputs: Tensor, rows: Tensor) -> Tensor:
    """What a network gives at rows (n, q): shape (n, q, ...)."""
    if isinstance(network, AtRows):
        return network.at_rows(inputs, rows)
    values: Tensor = network(inputs)
    return values[torch.arange(len(rows), device=rows.device).unsqueeze(1), rows]


@torch.no_grad()
def evaluate(network: nn.Module, inputs: Tensor, rows: Tensor | None = None) -> Tensor:
    """Network values (n, c, k) at all inputs, or (n, q, k) at sampled outputs, in batches."""
    network.eval().requires_grad_(False)
    if rows is None:
        return torch.cat([network(inputs[i]) for i in slices(len(inputs), AT_ONCE)])
    size = AT_ONCE if isinstance(network, AtRows) else ALL_OUTPUTS_AT_ONCE
    parts = slices(len(inputs), size)
    return torch.cat([values_at(network, inputs[i], rows[i]) for i in parts])


class RowRegression(Regression):
    """Least squares at some outputs of each example.

    Args:
        inputs: All n examples, as the network reads them.
        targets: What is known of each, shape (n, q, ...).
        rows: At which outputs, shape (n, q).
        generator: Decides which examples are held out.
    """

    def __init__(
        self, inputs: Tensor, targets: Tensor, rows: Tensor, *, generator: torch.Generator
    ) -> None:
        super().__init__(inputs, targets, rows, generator=generator)
        self.features = inputs

    def __call__(self, network: nn.Module, batch: Tensor) -> Tensor:
        """See `Regression`."""
        targets, rows = (each[batch] for each in self.targets)
        return least_squares(values_at(network, self.features[batch], rows), targets)


def regression(
    inputs: Tensor, targets: Tensor, *, rows: Tensor | None, generator: torch.Generator
) -> Regression:
    """Least squares at all outputs, or at those that were sampled of each input."""
    if rows is None:
        return Regression(inputs, targets, generator=generator)
    return RowRegression(inputs, targets, rows, generator=generator)
