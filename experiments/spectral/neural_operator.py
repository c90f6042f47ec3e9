"""Does orthogonalising latent eigenfunctions help a neural operator on Darcy flow?

    python experiments/spectral/neural_operator.py

-∇·(a∇u) = 1 on the unit square, u = 0 on its boundary; a is 12 or 3, a thresholded Gaussian field.
Pairs (a, u) come from our own finite-volume solver on 81x81 nodes; every fourth node (21x21) is
for training, every second and all of them (41x41, 81x81) for zero-shot tests on finer grids. All
sizes are odd: the FNO package treats frequencies of odd and even grids differently (it undoes its
shift by another shift), and from 22 to 43 nodes its error would grow tenfold for that alone.

The orthogonal neural operator (ONO) writes the solution map as ψ diag(μ) ψᵀ with latent functions
ψ that are whitened in every layer. Compared are ONO, the same network without whitening, and the
Fourier neural operator of the `neuraloperator` package, with about as many parameters and equal
CPU time (`--budget`), at 100 and at 400 training pairs. Errors are E(‖û - u‖ / ‖u‖) on 50 new
pairs.

Needs `pip install 'ella-laplace[spectral]'`.

Reference: Improved Operator Learning by Orthogonal Attention (Xiao et al., 2023),
https://arxiv.org/abs/2310.12487; Fourier Neural Operator for Parametric Partial Differential
Equations (Li et al., 2020), https://arxiv.org/abs/2010.08895
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from _common import (
    Headline,
    Ledger,
    SpectralSettings,
    asked,
    cpu_timed,
    finish,
    mean_of,
    needed,
    new_figure,
)
from _settings import option
from matplotlib.figure import Figure
from scipy.fft import idctn
from scipy.sparse import diags_array, eye_array, kron
from scipy.sparse.linalg import spsolve
from torch import Tensor, nn
from torch.nn import functional as F

from ella.spectral import Regression, Training, train

NODES = 81
STRIDES = (4, 2, 1)
OURS, PLAIN, PEER = "ONO", "ONO without whitening", "FNO"


def coefficient(size: int, rng: np.random.Generator) -> np.ndarray:
    """Where a Gaussian field with covariance (-Δ + 9)⁻² is positive 12, else 3; (size, size)."""
    k = np.pi * np.arange(size)
    spectrum = (k[:, None] ** 2 + k**2 + 9.0) ** -1.0
    noise = rng.standard_normal((size, size)) * spectrum
    noise[0, 0] = 0.0
    return np.where(idctn(noise, norm="ortho") > 0, 12.0, 3.0)


def solve(a: np.ndarray) -> np.ndarray:
    """U at the nodes, by finite volumes with harmonic means of a on the faces."""
    size = len(a)
    h = 1 / (size - 1)
    across = 2 * a[1:, 1:-1] * a[:-1, 1:-1] / (a[1:, 1:-1] + a[:-1, 1:-1])
    along = 2 * a[1:-1, 1:] * a[1:-1, :-1] / (a[1:-1, 1:] + a[1:-1, :-1])
    m = size - 2
    difference = diags_array([np.ones(m), -np.ones(m)], offsets=[0, -1], shape=(m + 1, m))
    first = kron(difference, eye_array(m))
    second = kron(eye_array(m), difference)
    stiffness = first.T @ diags_array(across.ravel()) @ first
    stiffness = stiffness + second.T @ diags_array(along.ravel()) @ second
    u = np.zeros_like(a)
    u[1:-1, 1:-1] = spsolve((stiffness / h**2).tocsc(), np.ones(m * m)).reshape(m, m)
    return u


@dataclass(frozen=True)
class Pairs:
    """Coefficients and solutions on one grid.

    Attributes:
        inputs: a, scaled, and both coordinates, shape (n, 3, s, s).
        targets: u, scaled, shape (n, s², 1).
    """

    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, a: Tensor, u: Tensor, stride: int) -> "Pairs":
        """Every `stride`-th node of a and u, both (n, s, s), in units that no grid changes."""
        a, u = a[:, ::stride, ::stride], u[:, ::stride, ::stride]
        axis = torch.linspace(-1, 1, a.shape[1])
        places = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).expand(len(a), -1, -1, -1)
        inputs = torch.cat([((a - 7.5) / 4.5).unsqueeze(1), places], 1)
        return cls(inputs, (u * 100).flatten(1).unsqueeze(2))


def darcy(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` coefficients and solutions, shape (count, size, size)."""
    rng = np.random.default_rng(seed)
    fields = [coefficient(size, rng) for _ in range(count)]
    pairs = (fields, [solve(a) for a in fields])
    return tuple(torch.from_numpy(np.stack(each)).float() for each in pairs)  # type: ignore


class Whitening(nn.Module):
    """Makes functions orthonormal: z L⁻ᵀ with LLᵀ = E[zᵀz], in eval mode from a moving average.

    Args:
        rank: k.
        momentum: Share of the old average that is kept.
    """

    second: Tensor

    def __init__(self, rank: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("second", torch.eye(rank))

    def forward(self, z: Tensor) -> Tensor:
        """Shape (n, points, k)."""
        second = self.second
        if self.training:
            flat = z.flatten(0, 1)
            second = flat.T @ flat / len(flat)
            self.second.lerp_(second.detach(), 1 - self.momentum)
        jitter = 1e-4 * second.diagonal().mean() * torch.eye(len(second))
        root = torch.linalg.cholesky(second + jitter)
        return torch.linalg.solve_triangular(root, z.mT, upper=False).mT


class Block(nn.Module):
    """One layer of both streams: points x attend to each other; functions f pass through ψ.

    Args:
        width: Of both streams.
        rank: k.
        whitening: Applied to ψ.
    """

    def __init__(self, width: int, rank: int, whitening: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix, self.project = nn.Linear(width, width), nn.Linear(width, rank)
        self.perceptrons = nn.ModuleList(_perceptron(width) for _ in range(2))
        self.whitening = whitening
        self.eigenvalues = nn.Parameter(torch.zeros(rank))

    def forward(self, x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
        """Both of shape (n, points, width). Sums over points are means: they fit every grid."""
        seen = self.norms[0](x)
        key, value = self.norms[1](self.key(seen)), self.norms[2](self.value(seen))
        x = x + self.mix(self.query(seen) @ (key.mT @ value / x.shape[1]))
        x = x + self.perceptrons[0](self.norms[3](x))
        psi = self.whitening(self.project(x))
        f = f + (psi * F.softplus(self.eigenvalues)) @ (psi.mT @ f / f.shape[1])
        return x, f + self.perceptrons[1](self.norms[4](f))


def _perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


class OrthogonalOperator(nn.Module):
    """ONO: inputs (n, 3, s, s) to solutions (n, s², 1).

    Args:
        make_whitening: Makes what is applied to the k functions of each layer.
        width: Of both streams.
        rank: k.
        depth: Blocks.
    """

    def __init__(
        self,
        make_whitening: Callable[[int], nn.Module],
        *,
        width: int = 48,
        rank: int = 16,
        depth: int = 3,
    ) -> None:
        super().__init__()
        self.lift_points, self.lift_functions = nn.Linear(3, width), nn.Linear(3, width)
        self.blocks = nn.ModuleList(Block(width, rank, make_whitening(rank)) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        points = inputs.flatten(2).mT
        x, f = self.lift_points(points), self.lift_functions(points)
        for block in self.blocks:
            x, f = block(x, f)
        return self.head(f)


class FourierOperator(nn.Module):
    """The package's FNO with about `num_parameters` parameters, in the shapes used here.

    Raises:
        ModuleNotFoundError: If the package is not installed.
    """

    def __init__(self, num_parameters: int, modes: int = 8) -> None:
        super().__init__()
        make_fno = needed("neuralop.models").FNO

        def make(width: int) -> nn.Module:
            return make_fno((modes, modes), 3, 1, hidden_channels=width, n_layers=4)

        sizes = {width: _num_parameters(make(width)) for width in range(6, 33, 2)}
        width = min(sizes, key=lambda width: abs(sizes[width] - num_parameters))
        self.network = make(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """See the class."""
        return self.network(inputs).flatten(1).unsqueeze(2)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Without what the package adds for its own loader, and this module's does not take."""
        found = super().state_dict(*args, **kwargs)
        found.pop("_metadata", None)
        return found


def _num_parameters(network: nn.Module) -> int:
    """Real numbers in the weights."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in network.parameters())


def relative_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """E(‖û - u‖ / ‖u‖)."""
    away, size = (outputs - targets).flatten(1), targets.flatten(1).norm(dim=1)
    return (away.norm(dim=1) / size).mean()


def make(method: str, seed: int) -> nn.Module:
    """A network with its first weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if method == PEER:
            return FourierOperator(_num_parameters(OrthogonalOperator(Whitening)))
        return OrthogonalOperator(Whitening if method == OURS else lambda rank: nn.Identity())


def fit(method: str, pairs: Pairs, budget: float, seed: int) -> tuple[nn.Module, int]:
    """Train for about `budget` CPU seconds; the network and its steps."""

    def run(network: nn.Module, steps: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        loss = Regression(
            pairs.inputs, pairs.targets, generator=generator, criterion=relative_error
        )
        training = Training(steps, 16, learning_rate=2e-3, weight_decay=1e-4, patience=99)
        train(network, loss, training, generator=generator, progress=False)

    trial = 8
    run(make(method, seed), 2)
    seconds = cpu_timed(lambda: run(make(method, seed), trial))[1] / trial
    steps = max(trial, math.ceil(budget / seconds))
    network = make(method, seed)
    run(network, steps)
    return network, steps


@torch.no_grad()
def errors(network: nn.Module, a: Tensor, u: Tensor) -> dict[str, float]:
    """Relative errors at each resolution."""
    found = {}
    for stride in STRIDES:
        pairs = Pairs.of(a, u, stride)
        size = pairs.inputs.shape[-1]
        predicted = torch.cat([network(part) for part in pairs.inputs.split(10)])
        found[f"error_{size}"] = relative_error(predicted, pairs.targets).item()
    return found


@dataclass(frozen=True)
class Settings(SpectralSettings):
    """What the script can be asked for.

    Attributes:
        budget: CPU seconds of each training.
    """

    seeds: int = option(1, "how many")
    budget: float = option(60.0, "CPU seconds of each training")


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write everything."""
    settings = asked(Settings, __doc__.splitlines()[0], argv)
    nodes, counts, tests = (NODES, (100, 400), 50) if not settings.smoke else (33, (16,), 4)
    budget = 0.1 if settings.smoke else settings.budget
    methods = (OURS, PLAIN) if settings.smoke else (OURS, PLAIN, PEER)
    ledger = Ledger("neural_operator", settings)
    a, u = darcy(max(counts) + tests, nodes, seed=0)
    new = a[-tests:], u[-tests:]
    networks: dict[str, nn.Module] = {}
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for count, method in product(counts, methods):
            title = f"{count} pairs: {method}"
            if (seed, title) in ledger:
                continue
            pairs = Pairs.of(a[:count], u[:count], STRIDES[0])
            run = partial(fit, method, pairs, budget, seed)
            (network, steps), seconds = cpu_timed(run)
            ledger.add(
                {
                    "method": title,
                    "seed": seed,
                    "parameters": _num_parameters(network),
                    "steps": steps,
                    "seconds": seconds,
                    **errors(network, *new),
                }
            )
            if count == max(counts):
                networks[method] = network
    rows = ledger.rows
    finest, coarse = f"error_{nodes}", f"error_{len(range(0, nodes, STRIDES[0]))}"
    most, peer = counts[-1], methods[-1]

    def error(method: str, key: str = coarse, count: int = most) -> float:
        return mean_of(rows, f"{count} pairs: {method}", key)

    growth = {name: error(name, finest) / error(name) for name in methods}
    few = counts[0]
    headline = Headline(
        question="Does orthogonalising latent functions help a neural operator on Darcy flow?",
        metric=f"relative error at the training resolution, {most} pairs",
        ours=error(OURS),
        peer=peer,
        theirs=error(peer),
        truth=0.0,
        goal="≤ 1.1 × FNO at the training resolution; smaller growth at 4× resolution; better "
        f"than without whitening at {few} pairs",
        reached=error(OURS) <= 1.1 * error(peer)
        and growth[OURS] < growth[peer]
        and error(OURS, count=few) < error(PLAIN, count=few),
        seconds=error(OURS, "seconds"),
    )
    drawn = figure(networks, *new) if set(methods) <= set(networks) else None
    finish("neural_operator", settings, rows, headline, drawn)


@torch.no_grad()
def figure(networks: dict[str, nn.Module], a: Tensor, u: Tensor) -> Figure:
    """One new pair at the finest grid: a, u, and the error of each method."""
    pairs = Pairs.of(a[:1], u[:1], 1)
    shape = a.shape[1:]
    truth = pairs.targets.view(shape)
    drawn = new_figure(2.6 * (2 + len(networks)), 2.8)
    panels = drawn.subplots(1, 2 + len(networks))
    panels[0].imshow(a[0], cmap="Greys")
    panels[1].imshow(truth, cmap="viridis")
    titles = ["a", "u"]
    limit = 0.2 * truth.abs().max().item()
    for panel, (name, network) in zip(panels[2:], networks.items(), strict=True):
        away = network(pairs.inputs).view(shape) - truth
        panel.imshow(away, cmap="PuOr", vmin=-limit, vmax=limit)
        titles.append(f"error of {name}")
    for panel, title in zip(panels, titles, strict=True):
        panel.set(xticks=[], yticks=[])
        panel.set_title(title, fontsize=8)
    return drawn


if __name__ == "__main__":
    main()
