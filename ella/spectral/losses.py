"""What the training loop minimises: an objective on an operator, or a distance to known values."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol

import torch
from torch import Tensor, nn

from ella.inputs import Inputs, num_examples, take
from ella.spectral.objectives import Objective
from ella.spectral.problems import Batch, Problem, divide, draw_from


class Loss(Protocol[Batch]):
    """What the training loop needs: where batches come from and how a network does on them."""

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """About `size` training examples, in the loss's own form."""

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """A scalar whose gradient in the weights is followed; its value is not read."""

    def held_out(self, network: nn.Module) -> float:
        """The value on examples that are never in a batch, by which weights are chosen."""


@dataclass(frozen=True)
class SpectralLoss(Generic[Batch]):
    r"""An objective of the leading eigenfunctions of an operator.

    Objectives are gradients g in (ψ, Tψ), as none needs a derivative through the operator. On a
    batch the scalar is the surrogate :math:`\langle ψ, g \rangle` with g held fixed: its gradient
    is the objective's, its value is not.

    Attributes:
        problem: The operator and its inputs.
        objective: Averaged over the problem's pairs of judged rows and sources.
    """

    problem: Problem[Batch]
    objective: Objective

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """See `Loss.batch`."""
        return self.problem.batch(size, generator)

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        """The surrogate; see the class."""
        psi, tpsi = self.problem.evaluate(network, batch)
        values, gradient = psi.detach(), torch.zeros_like(psi)
        pairs = self.problem.pairs(len(psi))
        for rows, sources in pairs:
            part = self.objective.gradient(values[rows], tpsi[rows], values[sources])
            gradient[rows] += part / len(pairs)
        return (psi * gradient).sum()

    @torch.no_grad()
    def held_out(self, network: nn.Module) -> float:
        """The mean objective over the pairs of the examples held out."""
        psi, tpsi = self.problem.evaluate(network, self.problem.held_out())
        losses = [
            self.objective.loss(psi[rows], tpsi[rows], psi[sources])
            for rows, sources in self.problem.pairs(len(psi))
        ]
        return sum(losses) / len(losses)


def least_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared distance, summed over outputs; its mean over examples."""
    return (outputs - targets).square().sum() / len(outputs)


class Regression:
    """A distance to known values at examples in memory, a share of which is held out.

    Args:
        inputs: All n examples, as the network reads them.
        *targets: What is known of each, n rows each.
        generator: Decides which are held out.
        criterion: `(outputs, *targets)` ↦ the mean error of a batch, differentiable.
        holdout: Share that is held out.

    Raises:
        ValueError: If fewer than two examples remain for training, or targets are not n rows.
    """

    def __init__(
        self,
        inputs: Inputs,
        *targets: Tensor,
        generator: torch.Generator,
        criterion: Callable[..., Tensor] = least_squares,
        holdout: float = 0.1,
    ) -> None:
        n = num_examples(inputs)
        if any(len(each) != n for each in targets):
            rows = ", ".join(str(len(each)) for each in targets)
            raise ValueError(f"`targets` must have a row for each of the {n} inputs; got {rows}.")
        self.inputs, self.targets, self.criterion = inputs, targets, criterion
        self.held, self.pool = divide(n, holdout, generator)

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Indices drawn with replacement."""
        return draw_from(self.pool, size, generator)

    def __call__(self, network: nn.Module, batch: Tensor) -> Tensor:
        """The criterion at some examples."""
        targets = (each[batch] for each in self.targets)
        return self.criterion(network(take(self.inputs, batch)), *targets)

    @torch.no_grad()
    def held_out(self, network: nn.Module) -> float:
        """The criterion at the examples held out."""
        return self(network, self.held).item()
