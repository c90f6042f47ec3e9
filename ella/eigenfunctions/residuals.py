"""Learned residuals: the prior variance outside the span of φ, read off activations."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ella.spectral import Regression, ResidualMLP, Samples, Teacher, Training, train

FLOOR = 1e-3
"""Smallest share of κ(x, x) that the residual variance is taken to be."""
MAX_FACTORS = 10
"""Columns of the learned factor; more than the number of outputs would be redundant."""
LOG_TRACE_WEIGHT = 0.3
"""Weight of the squared error of log tr κ(x, x) beside the relative error of the block."""


class LearnedResidual(nn.Module):
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
        options: dict[str, Any],
    ) -> "DiagonalResidual":
        """Regress log(diag κ − diag φφᵀ) on the activations.

        Args:
            activations: Shape (n, d).
            phi: φ, shape (n, c, k).
            diagonal: diag κ(x, x), shape (n, c).
            training: Settings of the regression.
            width: Hidden units.
            options: The generator and progress of `train`.
        """
        c = diagonal.shape[1]
        outside = torch.maximum(diagonal - phi.square().sum(-1), FLOOR * diagonal)
        outside = outside.clamp_min(torch.finfo(outside.dtype).tiny)
        network = ResidualMLP(
            activations.shape[1], (c,), width=width, generator=options["generator"]
        )
        module = cls(network).to(outside)
        module.standardize(activations, outside)
        targets = ((outside.log() - module.location) / module.spread).unsqueeze(-1)
        column = nn.Sequential(network, nn.Unflatten(1, (c, 1)))
        problem = Samples(Teacher(), activations, targets, generator=options["generator"])
        train(column, problem, Regression(), training, **options)
        return module.eval()

    def forward(self, activations: Tensor) -> Tensor:
        """Variances, shape (n, c)."""
        value = self.network(activations) * self.spread + self.location
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
        options: dict[str, Any],
    ) -> "FactorResidual":
        """Fit φφᵀ + LLᵀ to κ(x, x), r being min(c, `MAX_FACTORS`).

        Args:
            activations: Shape (n, d).
            phi: φ, shape (n, c, k).
            blocks: κ(x, x), shape (n, c, c).
            training: Settings of the regression.
            width: Hidden units.
            options: The generator and progress of `train`.
        """
        c = blocks.shape[1]
        inside = phi @ phi.mT
        traces = _trace(blocks)
        network = ResidualMLP(
            activations.shape[1],
            (c, min(c, MAX_FACTORS) + 1),
            width=width,
            generator=options["generator"],
        )
        module = cls(network).to(blocks)
        outside = torch.maximum(traces - _trace(inside), FLOOR * traces)
        module.standardize(activations, outside.clamp_min(torch.finfo(outside.dtype).tiny))
        objective = BlockRegression(module)
        targets = torch.cat([inside, blocks], dim=-1)
        problem = Samples(Teacher(), activations, targets, generator=options["generator"])
        train(network, problem, objective, training, **options)
        return module.eval()

    def blocks(self, raw: Tensor) -> Tensor:
        """LLᵀ, shape (n, c, c), from the network's output (n, c, r + 1)."""
        factor, log_scale = raw[..., :-1], raw[..., -1].mean(-1)
        log_scale = (log_scale * self.spread + self.location).clamp_max(self.highest + 1)
        size = factor.shape[1:].numel()
        blocks = (log_scale.exp() / size)[:, None, None] * (factor @ factor.mT)
        excess = _trace(blocks) / (self.highest + 1).exp()
        return blocks / excess.clamp_min(1)[:, None, None]

    def forward(self, activations: Tensor) -> Tensor:
        """Covariances, shape (n, c, c)."""
        return self.blocks(self.network(activations))


@dataclass(frozen=True)
class BlockRegression:
    r"""Fits the raw output of a `FactorResidual` to known blocks κ(x, x).

    Minimises the mean over examples of :math:`‖H − κ‖^2/‖κ‖^2 + w (\log \mathrm{tr} H − \log
    \mathrm{tr} κ)^2` with H = φφᵀ + LLᵀ. The targets, which a `Teacher` gives, hold φφᵀ and κ side
    by side, shape (n, c, 2c).

    Attributes:
        residual: Turns raw outputs into LLᵀ.
    """

    residual: FactorResidual

    def normalize(self, psi: Tensor, tpsi: Tensor) -> tuple[Tensor, Tensor]:
        """Both as they are: there is no constraint."""
        return psi, tpsi

    def gradient(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> Tensor:
        """See `Objective.gradient`."""
        with torch.enable_grad():
            raw = psi.detach().requires_grad_()
            return torch.autograd.grad(self._mean_error(raw, tpsi), raw)[0]

    def loss(self, psi: Tensor, tpsi: Tensor, source: Tensor) -> float:
        """See `Objective.loss`."""
        return self._mean_error(psi, tpsi).item()

    def _mean_error(self, raw: Tensor, targets: Tensor) -> Tensor:
        inside, blocks = targets.chunk(2, dim=-1)
        found = inside + self.residual.blocks(raw)
        squared = (found - blocks).square().sum((1, 2)) / blocks.square().sum((1, 2))
        log_ratio = _trace(found).log() - _trace(blocks).log()
        return (squared + LOG_TRACE_WEIGHT * log_ratio.square()).mean()


def _trace(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=1, dim2=2).sum(-1)
