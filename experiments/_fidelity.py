"""How close φφᵀ + R is to the exact tangent kernel on inputs that nothing was fitted to."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from _report import IN_COLOR, OUT_COLOR, new_figure
from torch import Tensor

from ella import Linearized, LogitGaussian


@dataclass(frozen=True)
class ExactKernel:
    """κ at all pairs of n inputs.

    Attributes:
        matrix: Shape (n·c, n·c), float64.
        blocks: κ(x, x), shape (n, c, c).
        eigenvalues: Of `matrix`, descending.
    """

    matrix: Tensor
    blocks: Tensor
    eigenvalues: Tensor

    @classmethod
    def of(cls, linearized: Linearized, x: Tensor) -> "ExactKernel":
        """Compute it; the Jacobian of all inputs, n·c·p numbers, is kept meanwhile."""
        n, c = len(x), linearized.num_outputs(x)
        rows = x.new_empty(n * c, linearized.num_parameters)
        for part, jacobian in linearized.jacobian_chunks(x):
            rows[part.start * c : part.stop * c] = jacobian.flatten(0, 1)
        matrix = (rows @ rows.T).double().cpu()
        del rows
        blocks = matrix.view(n, c, n, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return cls(matrix, blocks, torch.linalg.eigvalsh(matrix).flip(0))

    def traces(self) -> Tensor:
        """Traces of κ(x, x), shape (n,)."""
        return _traces(self.blocks)


def fidelity(kernel: ExactKernel, prior: LogitGaussian) -> dict[str, float]:
    """The four figures that `experiments/eigenfunctions.py` explains."""
    phi = prior.factor.double().flatten(0, 1)
    basis = torch.linalg.qr(phi).Q
    best = kernel.eigenvalues[: phi.shape[1]].sum()
    blocks = predicted_blocks(prior)
    errors = (blocks - kernel.blocks).flatten(1).norm(dim=1) / kernel.blocks.flatten(1).norm(dim=1)
    logs = torch.stack([_traces(blocks).log(), kernel.traces().log()])
    return {
        "energy": (((kernel.matrix @ basis) * basis).sum() / best).item(),
        "kernel_error": ((kernel.matrix - phi @ phi.T).norm() / kernel.matrix.norm()).item(),
        "block_error": errors.mean().item(),
        "log_trace": torch.corrcoef(logs)[0, 1].item(),
    }


def predicted_blocks(prior: LogitGaussian) -> Tensor:
    """φφᵀ + R, shape (n, c, c), float64."""
    blocks = prior.factor.double() @ prior.factor.double().mT
    if prior.residual is None:
        return blocks
    residual = prior.residual.double()
    return blocks + (residual if residual.ndim == 3 else torch.diag_embed(residual))


def plot_fidelity(kernel: ExactKernel, priors: Mapping[str, LogitGaussian], path: Path) -> None:
    """Spectrum, and predicted against exact variance of the logits.

    Args:
        kernel: The truth.
        priors: At the same inputs, by method; the last one is in the right panel.
        path: Where to write; the suffix decides the format.
    """
    figure = new_figure(8.4, 3.4)
    left, right = figure.subplots(1, 2)
    n = len(kernel.blocks)
    shown = 2 * max(each.factor.shape[2] for each in priors.values())
    left.loglog(kernel.eigenvalues[:shown] / n, color="black", label="exact")
    for name, each in priors.items():
        phi = each.factor.double().flatten(0, 1)
        left.loglog(torch.linalg.eigvalsh(phi.T @ phi).flip(0) / n, label=name)
    left.set_xlabel("index")
    left.set_ylabel("eigenvalue of the kernel")
    left.legend(frameon=False, fontsize=8)
    exact, predicted = kernel.traces(), _traces(predicted_blocks(each))
    right.loglog(exact, predicted, ".", color=IN_COLOR, markersize=3)
    line = [exact.min().item(), exact.max().item()]
    right.loglog(line, line, color=OUT_COLOR, linewidth=1)
    right.set_xlabel("exact tr κ(x, x)")
    right.set_ylabel(f"predicted: {name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _traces(blocks: Tensor) -> Tensor:
    return blocks.diagonal(dim1=1, dim2=2).sum(-1)
