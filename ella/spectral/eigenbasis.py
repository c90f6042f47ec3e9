"""What the training leaves: ordered, orthonormal eigenfunctions with their eigenvalues."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ella.spectral.losses import SpectralLoss
from ella.spectral.networks import LinearHead, ParallelMLP
from ella.spectral.objectives import NestedLoRA, Objective
from ella.spectral.operators import KernelOperator
from ella.spectral.problems import Batch, Problem
from ella.spectral.ritz import Moments, rayleigh_ritz
from ella.spectral.train import Training, train


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenfunctions ψA of an operator, in the span of a trained network ψ.

    Attributes:
        network: ψ.
        mixing: A, shape (k, k'), float64 as it is found.
        eigenvalues: μ of shape (k',), decreasing, float64 as they are found.
    """

    network: nn.Module
    mixing: Tensor
    eigenvalues: Tensor

    @torch.no_grad()
    def __call__(self, x: object) -> Tensor:
        """Values (n, c, k') with the identity as their second moment."""
        psi = self.network(x)
        return psi @ self.mixing.to(psi)

    @torch.no_grad()
    def features(self, x: object) -> Tensor:
        """ψA√μ, so that products of two rows are the kernel; negative eigenvalues give 0."""
        return self.scaled(self.network(x))

    def scaled(self, psi: Tensor) -> Tensor:
        """`features` from values of the network that are known already, in one product."""
        return psi @ self.folded.to(psi)

    def to(self, like: Tensor) -> "Eigenbasis":
        """The same network with A and μ in the dtype, and on the device, of a tensor."""
        return Eigenbasis(self.network, self.mixing.to(like), self.eigenvalues.to(like))

    @cached_property
    def folded(self) -> Tensor:
        """A√μ, shape (k, k')."""
        return self.mixing * self.eigenvalues.clamp_min(0).sqrt()


def learn_eigenbasis(
    network: nn.Module,
    problem: Problem[Batch],
    training: Training,
    *,
    generator: torch.Generator,
    objective: Objective | None = None,
    num_batches: int = 32,
    batch_size: int = 2048,
    progress: bool = True,
) -> Eigenbasis:
    """Train a network, then find the best eigenpairs in its span.

    Args:
        network: Trained in place.
        problem: The operator and its inputs.
        training: See `Training`.
        generator: A CPU generator, for all batches.
        objective: What is minimised; `NestedLoRA` if None.
        num_batches: Batches of the Rayleigh-Ritz step, whose error falls with their number.
        batch_size: Inputs of each.
        progress: Whether to show a progress bar.

    Returns:
        The eigenfunctions, on the network's device.
    """
    loss = SpectralLoss(problem, NestedLoRA() if objective is None else objective)
    train(network, loss, training, generator=generator, progress=progress)
    network.requires_grad_(False)
    return ritz_basis(network, problem, generator, num_batches, batch_size)


@torch.no_grad()
def ritz_basis(
    network: nn.Module,
    problem: Problem[Batch],
    generator: torch.Generator,
    num_batches: int = 32,
    batch_size: int = 2048,
) -> Eigenbasis:
    """The best eigenpairs in the span of a network, from sums over batches in float64."""
    network.eval()
    moments: Moments | None = None
    for _ in range(num_batches):
        part = Moments.of(*problem.evaluate(network, problem.batch(batch_size, generator)))
        moments = part if moments is None else moments + part
    if moments is None:
        raise ValueError(f"`num_batches` must be at least 1; got {num_batches}.")
    values, mixing = rayleigh_ritz(moments)
    return Eigenbasis(network, mixing, values)


@torch.no_grad()
def ritz_head(
    body: ParallelMLP,
    kernel: KernelOperator,
    x: Tensor,
    rank: int,
    *,
    kernel_inputs: Tensor | None = None,
    tolerance: float = 1e-5,
) -> LinearHead:
    r"""A closed-form start: the leading eigenfunctions in the span of a network's hidden units.

    Rayleigh-Ritz over the units h at a sample gives W = A√μ, so that ψψᵀ ≈ κ for ψ = hW: near the
    minimum of `NestedLoRA`, where random weights of separate networks take thousands of steps to
    find the functions of small eigenvalue. T is integrated over the whole sample, not over
    halves: in the span of so many units the noise between two halves exceeds small eigenvalues.

    Args:
        body: Its weights may be random; `LinearHead` trains them further.
        kernel: See `KernelOperator`.
        x: The sample as the network reads it, shape (n, d), several times as many as units.
        rank: k.
        kernel_inputs: The sample as the kernel reads it; None: as the network does.
        tolerance: Of `rayleigh_ritz`. Small values give large weights, hard to train further.

    Returns:
        The network ψ.

    Raises:
        ValueError: If the units span fewer than k directions.
    """
    inputs = x if kernel_inputs is None else kernel_inputs
    units = body.hidden(x).unsqueeze(1)
    moments = Moments.of(units, kernel.apply(inputs, inputs, units))
    values, mixing = rayleigh_ritz(moments, tolerance=tolerance)
    if len(values) < rank:
        raise ValueError(
            f"`rank` is {rank}, but the hidden units span only {len(values)} directions. Lower "
            "`rank` or `tolerance`, or widen the network."
        )
    weight = mixing[:, :rank] * values[:rank].clamp_min(0).sqrt()
    return LinearHead(body, weight.to(units))
