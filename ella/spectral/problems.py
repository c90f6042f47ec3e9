"""Where an operator meets data: batches of inputs, and ψ and Tψ on them."""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from ella.inputs import Inputs, num_examples, take
from ella.spectral.laplacian import Jet
from ella.spectral.operators import Graph, KernelOperator

Batch = TypeVar("Batch")
"""Whatever form a problem or a loss gives its batches."""


class Pair(NamedTuple):
    """Which rows of a batch are judged, and which rows their Tψ was integrated over.

    Attributes:
        rows: Rows of ψ and Tψ.
        sources: Rows of ψ that give the inner products of the deflation.
    """

    rows: slice
    sources: slice


def halves(n: int) -> list[Pair]:
    """Either half of a batch, the other half being its source: independent, so unbiased."""
    first, second = slice(0, n // 2), slice(n // 2, n)
    return [Pair(first, second), Pair(second, first)]


def whole(n: int) -> list[Pair]:
    """The batch as its own source: right only where it is the whole space."""
    return [Pair(slice(0, n), slice(0, n))]


def divide(n: int, holdout: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Indices of the examples held out, a share of n but at least two, and of the others.

    Raises:
        ValueError: If fewer than two examples remain for training.
    """
    order = torch.randperm(n, generator=generator)
    num_held = max(2, int(holdout * n))
    if n - num_held < 2:
        raise ValueError(f"Training needs at least 4 examples; got {n}.")
    return order[:num_held], order[num_held:]


def draw_from(pool: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Entries of the pool, drawn with replacement."""
    return pool[torch.randint(len(pool), (size,), generator=generator)]


class Problem(Protocol[Batch]):
    """An operator T on a space of inputs, as far as `SpectralLoss` needs it."""

    def batch(self, size: int, generator: torch.Generator) -> Batch:
        """About `size` training inputs, in the problem's own form."""

    def held_out(self) -> Batch:
        """Inputs that are never in a batch (or a fixed draw, where there are always new ones)."""

    def evaluate(self, network: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """ψ with its graph and Tψ without, both (n, c, k); Tψ must be linear in ψ."""

    def pairs(self, n: int) -> list[Pair]:
        """How n rows divide into judged rows and their sources: `halves` or `whole`."""


class Samples:
    """A kernel operator on examples in memory, a share of which is held out.

    Args:
        kernel: See `KernelOperator`.
        network_inputs: All n examples, as the network reads them.
        kernel_inputs: The same examples, as the kernel reads them.
        generator: Decides which are held out.
        holdout: Share that is held out.

    Raises:
        ValueError: If fewer than two examples remain for training.
    """

    def __init__(
        self,
        kernel: KernelOperator,
        network_inputs: Inputs,
        kernel_inputs: Tensor,
        *,
        generator: torch.Generator,
        holdout: float = 0.1,
    ) -> None:
        self.kernel = kernel
        self.network_inputs, self.kernel_inputs = network_inputs, kernel_inputs
        self.held, self.pool = divide(num_examples(network_inputs), holdout, generator)

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Indices drawn with replacement."""
        return draw_from(self.pool, size, generator)

    def held_out(self) -> Tensor:
        """Indices of the examples held out."""
        return self.held

    def evaluate(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem.evaluate`; Tψ of either half is integrated over the other."""
        psi = network(take(self.network_inputs, batch))
        return psi, across(self.kernel, self.kernel_inputs[batch], psi.detach())

    def pairs(self, n: int) -> list[Pair]:
        """Two halves."""
        return halves(n)


class Population:
    """A kernel operator on a distribution: every batch is new.

    Args:
        kernel: See `KernelOperator`.
        draw: `(size, generator)` ↦ inputs.
        generator: Draws the held-out inputs.
        num_held: How many.
    """

    def __init__(
        self,
        kernel: KernelOperator,
        draw: Callable[[int, torch.Generator], Tensor],
        *,
        generator: torch.Generator,
        num_held: int = 2048,
    ) -> None:
        self.kernel, self.draw = kernel, draw
        self._held = draw(num_held, generator)

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """New inputs."""
        return self.draw(size, generator)

    def held_out(self) -> Tensor:
        """One fixed draw."""
        return self._held

    def evaluate(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem.evaluate`; Tψ of either half is integrated over the other."""
        psi = network(batch)
        return psi, across(self.kernel, batch, psi.detach())

    def pairs(self, n: int) -> list[Pair]:
        """Two halves."""
        return halves(n)


class Views:
    r"""Two random views of each of n examples: :math:`(Tψ)(x_1) = E[ψ(x_2) | x_1]`.

    The operator's kernel is that of contrastive learning, E_z[p(x|z) p(x'|z)] / (p(x) p(x')) over
    examples z and their views x. ψ at the other view is a draw of Tψ, so that only objectives
    linear in Tψ (`NestedLoRA`) stay unbiased. The constant is its top eigenfunction, at 1.

    Reference: Provable Guarantees for Self-Supervised Deep Learning with Spectral Contrastive Loss
    (HaoChen et al., 2021), https://arxiv.org/abs/2106.04156; Neural Eigenfunctions Are Structured
    Representation Learners (Deng et al., 2022), https://arxiv.org/abs/2210.12637

    Args:
        inputs: Shape (n, ...).
        augment: `(inputs, generator)` ↦ one view of each.
        generator: Divides the examples, and draws the held-out views.
        holdout: Share that is held out.
    """

    def __init__(
        self,
        inputs: Tensor,
        augment: Callable[[Tensor, torch.Generator], Tensor],
        *,
        generator: torch.Generator,
        holdout: float = 0.1,
    ) -> None:
        self.inputs, self.augment = inputs, augment
        held, self.pool = divide(len(inputs), holdout, generator)
        self._held = self._views(held, generator)

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Both views of size/2 examples, shape (2, size/2, ...)."""
        return self._views(draw_from(self.pool, size // 2, generator), generator)

    def held_out(self) -> Tensor:
        """Views of the examples held out."""
        return self._held

    def evaluate(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem.evaluate`; rows: both views of one half of the examples, then the rest."""
        n = batch.shape[1]
        parts = [part.flatten(0, 1) for part in batch.split([n // 2, n - n // 2], dim=1)]
        psi = network(torch.cat(parts))
        swapped = [
            half.roll(len(half) // 2, 0) for half in psi.detach().split([len(p) for p in parts])
        ]
        return psi, torch.cat(swapped)

    def pairs(self, n: int) -> list[Pair]:
        """The halves, cut between examples so that no source is the other view of its rows."""
        cut = 2 * (n // 2 // 2)
        first, second = slice(0, cut), slice(cut, n)
        return [Pair(first, second), Pair(second, first)]

    def _views(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        chosen = self.inputs[rows]
        return torch.stack([self.augment(chosen, generator) for _ in range(2)])


class WholeGraph:
    """All nodes of a graph in every step: Tψ is exact.

    Args:
        graph: See `Graph`.
        inputs: Features of the nodes, shape (n, ...).
    """

    def __init__(self, graph: Graph, inputs: Tensor) -> None:
        if len(inputs) != graph.num_nodes:
            raise ValueError(
                f"`inputs` must have a row for each of the {graph.num_nodes} nodes; got "
                f"{len(inputs)}."
            )
        self.graph, self.inputs = graph, inputs

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """All nodes."""
        return self.inputs

    def held_out(self) -> Tensor:
        """All nodes: the operator is known exactly, so nothing can be over-fitted."""
        return self.inputs

    def evaluate(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem.evaluate`."""
        psi = network(batch)
        product = torch.sparse.mm(self.graph.matrix, psi.detach().flatten(1))
        return psi, product.view_as(psi)

    def pairs(self, n: int) -> list[Pair]:
        """The whole."""
        return whole(n)


@runtime_checkable
class HasJet(Protocol):
    """A network that carries derivatives, such as `ParallelMLP`."""

    def jet(self, x: Tensor) -> Jet:
        """Value, gradient and Laplacian at x (n, d), with trailing axes (n, c, k)."""


class Schrodinger:
    r"""The Hamiltonian :math:`H = -Δ + V` from below: :math:`T = s (λ_0 - H)`.

    The leading eigenfunctions of T are the bound states of lowest energy :math:`E = λ_0 - μ/s`. ψ
    and Tψ are divided by √q at points drawn from q, so that batch means are integrals over space.
    Below the shift T is not positive: train with `NestedLoRA`, or with `NeuralEFObjective` if all
    k energies lie below it. Reads `network.jet` (see `HasJet`).

    Args:
        potential: V, from points (n, d) to (n,).
        draw: `(size, generator)` ↦ points (n, d).
        density: q of the draws, from points (n, d) to (n,).
        shift: λ_0, an energy above those that are sought.
        scale: s; choose it so that T's leading eigenvalue is 10 to 100.
        generator: Draws the held-out points.
        num_held: How many.

    Reference: Spectral Inference Networks (Pfau et al., 2018), https://arxiv.org/abs/1806.02215
    """

    def __init__(
        self,
        potential: Callable[[Tensor], Tensor],
        draw: Callable[[int, torch.Generator], Tensor],
        density: Callable[[Tensor], Tensor],
        *,
        shift: float,
        generator: torch.Generator,
        scale: float = 1.0,
        num_held: int = 4096,
    ) -> None:
        self.potential, self.draw, self.density = potential, draw, density
        self.shift, self.scale = shift, scale
        self._held = draw(num_held, generator)

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """New points."""
        return self.draw(size, generator)

    def held_out(self) -> Tensor:
        """One fixed draw."""
        return self._held

    def evaluate(self, network: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """See `Problem.evaluate`; Tψ is exact at each point.

        Raises:
            TypeError: If the network carries no derivatives.
        """
        if not isinstance(network, HasJet):
            raise TypeError(
                f"Schrodinger needs a network with a method `jet`, such as ParallelMLP; "
                f"{type(network).__name__} has none."
            )
        weight = self.density(batch).rsqrt()[:, None, None]
        with torch.no_grad():
            value, _, laplacian = network.jet(batch)
            energy = self.potential(batch)[:, None, None] * value - laplacian
            tpsi = self.scale * (self.shift * value - energy)
        return network(batch) * weight, tpsi * weight

    def pairs(self, n: int) -> list[Pair]:
        """Two halves, for independent inner products."""
        return halves(n)

    def energies(self, eigenvalues: Tensor) -> Tensor:
        """Eigenvalues of H from those of T."""
        return self.shift - eigenvalues / self.scale


def across(kernel: KernelOperator, inputs: Tensor, psi: Tensor) -> Tensor:
    """Tψ at a batch, each half integrated over the other."""
    return torch.cat(
        [
            kernel.apply(inputs[rows], inputs[sources], psi[sources])
            for rows, sources in halves(len(psi))
        ]
    )
