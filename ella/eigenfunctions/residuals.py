"""Learned residuals: the prior variance outside the span of φ, read off activations."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ella.eigenfunctions.rows import regression
from ella.spectral import Regression, ResidualMLP, Training, train

FLOOR = 1e-3
"""Smallest share of κ(x, x) that the residual variance is taken to be."""
MAX_FACTORS = 10
"""Columns of the learned factor; more than the number of outputs would be redundant."""
LOG_TRACE_WEIGHT = 0.3
"""Weight of the squared error of log tr κ(x, x) beside the relative error of the block."""


class LearnedResidual(nn.Module, ABC):
    """R(x) from activations, its size learned on the scale of logs.

    Sizes never exceed e times the largest one seen in training.

    Args:
        network: From activations (n, d) to what the class makes of them.
    """

    location: Tensor
    spread: Tensor
    highest: Tensor

    def __init__(self, network: ResidualMLP) -> None:
        super().__init__()
        self.network = network
        for name in ("location", "spread", "highest"):
            self.register_buffer(name, torch.zeros(()))

    def standardize(self, activations: Tensor, sizes: Tensor) -> None:
        """Set all statistics from training values: activations (n, d) and positive sizes."""
        logs = sizes.log()
        self.network.standardize(activations)
        self.location.copy_(logs.mean())
        self.spread.copy_(logs.std().clamp_min(1e-6))
        self.highest.copy_(logs.max())

    @abstractmethod
    def variances(self, raw: Tensor) -> Tensor:
        """R, as variances (n, c) or blocks (n, c, c), from what the network gave."""

    def forward(self, activations: Tensor) -> Tensor:
        """R(x) from activations, shape (n, d)."""
        return self.variances(self.network(activations))

    def rescale(self, factor: float) -> None:
        """Multiply R by a factor."""
        offset = torch.log(torch.tensor(factor))
        self.location += offset
        self.highest += offset


class DiagonalResidual(LearnedResidual):
    """The diagonal of R as exp(network), shape (n, c).

    Args:
        network: From activations (n, d) to standardised log variances (n, c).
    """

    @classmethod
    def fitted(
        cls,
        activations: Tensor,
        phi: Tensor,
        diagonal: Tensor,
        training: Training,
        width: int,
        *,
        rows: Tensor | None = None,
        num_outputs: int | None = None,
        generator: torch.Generator,
        progress: bool,
    ) -> "DiagonalResidual":
        """Regress log(diag κ − diag φφᵀ) on the activations.

        Args:
            activations: Shape (n, d).
            phi: φ, shape (n, q, k), q being c or the number of sampled outputs.
            diagonal: diag κ(x, x), shape (n, q).
            training: Settings of the regression.
            width: Hidden units.
            rows: Which outputs were sampled, shape (n, q); None for all.
            num_outputs: c, if some were sampled.
            generator: A CPU generator, for the first weights and the batches.
            progress: Whether to show a progress bar.
        """
        outside = torch.maximum(diagonal - phi.square().sum(-1), FLOOR * diagonal)
        outside = outside.clamp_min(torch.finfo(outside.dtype).tiny)
        shape = (num_outputs or diagonal.shape[1],)
        network = ResidualMLP(activations.shape[1], shape, width=width, generator=generator)
        module = cls(network).to(outside)
        module.standardize(activations, outside)
        targets = (outside.log() - module.location) / module.spread
        loss = regression(activations, targets, rows=rows, generator=generator)
        train(network, loss, training, generator=generator, progress=progress)
        return module.eval()

    def variances(self, raw: Tensor) -> Tensor:
        """Variances (n, c) from standardised log variances (n, c)."""
        value = raw * self.spread + self.location
        return torch.minimum(value, self.highest + 1).exp()


class FactorResidual(LearnedResidual):
    r"""R(x) = L(x) L(x)ᵀ with a factor of shape (c, r), as blocks (n, c, c).

    The network gives L up to a scale, and the log of that scale.

    Args:
        network: From activations (n, d) to (n, c, r + 1); the mean of the last column over the
            outputs is the standardised log scale.
    """

    @classmethod
    def fitted(
        cls,
        activations: Tensor,
        phi: Tensor,
        blocks: Tensor,
        training: Training,
        width: int,
        *,
        generator: torch.Generator,
        progress: bool,
    ) -> "FactorResidual":
        """Fit φφᵀ + LLᵀ to κ(x, x), r being min(c, `MAX_FACTORS`).

        Args:
            activations: Shape (n, d).
            phi: φ, shape (n, c, k).
            blocks: κ(x, x), shape (n, c, c).
            training: Settings of the regression.
            width: Hidden units.
            generator: A CPU generator, for the first weights and the batches.
            progress: Whether to show a progress bar.
        """
        c = blocks.shape[1]
        inside = phi @ phi.mT
        traces = _trace(blocks)
        shape = (c, min(c, MAX_FACTORS) + 1)
        network = ResidualMLP(activations.shape[1], shape, width=width, generator=generator)
        module = cls(network).to(blocks)
        outside = torch.maximum(traces - _trace(inside), FLOOR * traces)
        module.standardize(activations, outside.clamp_min(torch.finfo(outside.dtype).tiny))
        loss = Regression(
            activations, inside, blocks, generator=generator, criterion=module.block_error
        )
        train(network, loss, training, generator=generator, progress=progress)
        return module.eval()

    def variances(self, raw: Tensor) -> Tensor:
        """LLᵀ, shape (n, c, c), from the network's output (n, c, r + 1)."""
        factor, log_scale = raw[..., :-1], raw[..., -1].mean(-1)
        log_scale = (log_scale * self.spread + self.location).clamp_max(self.highest + 1)
        size = factor.shape[1:].numel()
        blocks = (log_scale.exp() / size)[:, None, None] * (factor @ factor.mT)
        excess = _trace(blocks) / (self.highest + 1).exp()
        return blocks / excess.clamp_min(1)[:, None, None]

    def block_error(self, raw: Tensor, inside: Tensor, blocks: Tensor) -> Tensor:
        r"""How far H = φφᵀ + LLᵀ is from κ(x, x), as a mean over examples.

        :math:`‖H − κ‖^2/‖κ‖^2 + w (\log \mathrm{tr} H − \log \mathrm{tr} κ)^2`.

        Args:
            raw: The network's output, shape (n, c, r + 1).
            inside: φφᵀ, shape (n, c, c).
            blocks: κ(x, x), shape (n, c, c).
        """
        found = inside + self.variances(raw)
        squared = (found - blocks).square().sum((1, 2)) / blocks.square().sum((1, 2))
        log_ratio = _trace(found).log() - _trace(blocks).log()
        return (squared + LOG_TRACE_WEIGHT * log_ratio.square()).mean()


def _trace(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=1, dim2=2).sum(-1)
