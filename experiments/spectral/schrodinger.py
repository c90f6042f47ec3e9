"""Do networks find bound states of the Schrödinger equation in a minute of CPU?

    python experiments/spectral/schrodinger.py
    python experiments/spectral/schrodinger.py --seeds 3 --methods NestedLoRA  # adds two seeds

H = -Δ + V, lowest states, one small network a state, never a grid. All energies and wave functions
are known in closed form, so that nothing is compared with another numerical method:

1. Infinite well on [0, 1]², ten states, E = π²(n_x² + n_y²) with n ≥ 1.
2. Oscillator V = r² in the plane, ten states, E = Σ(2n_i + 1); in six dimensions, seven states.
3. Hydrogen in the plane, V = -1/r, nine states, E_n = -1/(4(n + ½)²), 2n + 1 states each.

Compared are three objectives on the same networks, points and steps (NeuralEF, NestedLoRA and the
trace objective of SpIN without its moving averages), each followed by Rayleigh-Ritz over 50,000
points; and finite differences with `scipy.sparse.linalg.eigsh`, which need no training and win in
the plane. In six dimensions the plane's grids would have 200⁶ = 6.4e13 unknowns (512 TB for one
vector); the row there is a coarse grid that still fits in memory, 12⁶ = 3e6.

An energy's error is relative. Each level is compared by the largest principal angle between its
exact and learned functions in L², on 20,000 points that training never saw.

Reference: Spectral Inference Networks (Pfau et al., 2018), https://arxiv.org/abs/1806.02215;
NeuralEF: Deconstructing Kernels by Deep Neural Networks (Deng et al., 2022),
https://arxiv.org/abs/2205.00165; Operator SVD with Neural Networks via Nested Low-Rank
Approximation (Ryu et al., 2024), https://arxiv.org/abs/2402.03655; for hydrogen: Analytic Solution
of a Two-Dimensional Hydrogen Atom (Yang et al., 1991), Physical Review A 43.
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
    largest_angle,
    mean_of,
    new_figure,
)
from _settings import option
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from ella.spectral import (
    Eigenbasis,
    NestedLoRA,
    NeuralEFObjective,
    Objective,
    ParallelMLP,
    Schrodinger,
    TraceObjective,
    Training,
    learn_eigenbasis,
)

Pointwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A Hamiltonian -Δ + V with its lowest states, and how a network and a grid meet it.

    Attributes:
        name: What rows and panels call it.
        dim: d.
        potential: V, from points (n, d) to (n,).
        energies: Of the k lowest states, increasing; equal energies form a level.
        exact: Wave functions (n, k) at points (n, d), in the order of `energies`, unnormalised.
        draw: `(size, generator)` ↦ points (n, d).
        density: Of the draws.
        shift: λ_0 of the operator s (λ_0 - H) that networks are trained on, above all k energies.
        scale: s.
        features: What the networks read of a point.
        envelope: What they are multiplied by: boundary values or decay.
        nodes: Of the finite differences, one axis with both ends, where wave functions are 0.
        below: An energy below all, near which they look.
        window: Corners of the square that is drawn.
        tolerances: Largest relative error of an energy that passes, for each state.
    """

    name: str
    dim: int
    potential: Pointwise
    energies: tuple[float, ...]
    exact: Pointwise
    draw: Callable[[int, torch.Generator], Tensor]
    density: Pointwise
    shift: float
    scale: float
    features: Pointwise
    envelope: Pointwise
    nodes: Tensor
    below: float
    window: tuple[float, float]
    tolerances: tuple[float, ...]

    @property
    def levels(self) -> list[slice]:
        """States of equal energy."""
        starts = [i for i, e in enumerate(self.energies) if i == 0 or e > self.energies[i - 1]]
        return [
            slice(*ends) for ends in zip(starts, [*starts[1:], len(self.energies)], strict=True)
        ]

    def errors(self, energies: Tensor) -> Tensor:
        """Relative errors, shape (k,)."""
        known = torch.tensor(self.energies, dtype=torch.float64)
        return (energies.double() - known).abs() / known.abs()

    def angle(self, functions: Tensor, points: Tensor, weights: Tensor) -> float:
        """The largest angle of any level, in degrees, from values (m, k) at weighted points."""
        root = weights.sqrt().unsqueeze(1)
        left, right = root * functions.double(), root * self.exact(points.double())
        return max(largest_angle(left[:, level], right[:, level]) for level in self.levels)


def radius(x: Tensor) -> Tensor:
    """Shape (n,)."""
    return x.square().sum(1).sqrt()


def well() -> Task:
    """Ten states of the infinite well on the unit square."""
    pairs = sorted(product(range(1, 5), repeat=2), key=lambda n: n[0] ** 2 + n[1] ** 2)[:10]

    def exact(x: Tensor) -> Tensor:
        waves = [(math.pi * n * x[:, 0]).sin() * (math.pi * m * x[:, 1]).sin() for n, m in pairs]
        return torch.stack(waves, 1)

    return Task(
        name="well",
        dim=2,
        potential=lambda x: torch.zeros_like(x[:, 0]),
        energies=tuple(math.pi**2 * (n * n + m * m) for n, m in pairs),
        exact=exact,
        draw=lambda size, generator: torch.rand(size, 2, generator=generator),
        density=lambda x: torch.ones_like(x[:, 0]),
        shift=20 * math.pi**2,
        scale=0.2,
        features=lambda x: 4 * x - 2,
        envelope=lambda x: (4 * x * (1 - x)).prod(1),
        nodes=torch.linspace(0, 1, 202, dtype=torch.float64),
        below=0.0,
        window=(0, 1),
        tolerances=(0.02,) * 10,
    )


def oscillator(dim: int, states: int, spread: float) -> Task:
    r"""V = r², points from :math:`N(0, \mathrm{spread}^2 I)`."""
    numbers = sorted(product(range(4), repeat=dim), key=sum)[:states]

    def exact(x: Tensor) -> Tensor:
        hermite = [torch.ones_like(x), 2 * x]
        hermite += [2 * x * hermite[1] - 2 * hermite[0]]
        hermite += [2 * x * hermite[2] - 4 * hermite[1]]
        factors = [[hermite[n][:, i] for i, n in enumerate(state)] for state in numbers]
        bell = (-x.square().sum(1) / 2).exp()
        return torch.stack([bell * torch.stack(each).prod(0) for each in factors], 1)

    norm = (2 * math.pi * spread**2) ** (-dim / 2)
    return Task(
        name=f"oscillator, {dim}-D",
        dim=dim,
        potential=lambda x: x.square().sum(1),
        energies=tuple(float(2 * sum(state) + dim) for state in numbers),
        exact=exact,
        draw=lambda size, generator: spread * torch.randn(size, dim, generator=generator),
        density=lambda x: norm * (-x.square().sum(1) / (2 * spread**2)).exp(),
        shift=12.0,
        scale=5.0,
        features=lambda x: x,
        envelope=lambda x: (-0.35 * x.square().sum(1)).exp(),
        nodes=torch.linspace(
            *((-6, 6, 202) if dim == 2 else (-3.5, 3.5, 14)), dtype=torch.float64
        ),
        below=0.0,
        window=(-4, 4),
        tolerances=(0.02,) * states,
    )


RADII = (0.5, 2.0, 4.0)
"""Length scales of the points for hydrogen, each of a third of them."""
CLOSEST = 1e-3
"""No point is nearer to the nucleus: V is -1000 there, and one in 10⁵ draws would be nearer."""


def hydrogen() -> Task:
    r"""Nine states of hydrogen in the plane.

    With κ = 1/(2n + 1) and :math:`|m| ≤ n` they are :math:`r^{|m|} e^{-κr} L_{n-|m|}^{2|m|}(2κr)`
    times cos mφ or sin mφ. The networks read r itself: its kink at 0 is what cancels 1/r. Radii
    have the density :math:`r e^{-r/s}/s^2` with s from `RADII`.
    """
    numbers = [(n, m) for n in range(3) for m in range(-n, n + 1)]

    def exact(x: Tensor) -> Tensor:
        r, angle = radius(x), torch.atan2(x[:, 1], x[:, 0])
        waves = []
        for n, m in numbers:
            rho, a = 2 * r / (2 * n + 1), 2 * abs(m)
            laguerre = [torch.ones_like(r), 1 + a - rho]
            laguerre += [((3 + a - rho) * laguerre[1] - (1 + a) * laguerre[0]) / 2]
            turn = (m * angle).cos() if m >= 0 else (m * angle).sin()
            waves.append(rho ** abs(m) * (-rho / 2).exp() * laguerre[n - abs(m)] * turn)
        return torch.stack(waves, 1)

    def draw(size: int, generator: torch.Generator) -> Tensor:
        scale = torch.tensor(RADII)[torch.randint(len(RADII), (size,), generator=generator)]
        r = -scale * torch.rand(size, 2, generator=generator).clamp_min(1e-30).log().sum(1)
        turn = 2 * math.pi * torch.rand(size, generator=generator)
        return r.clamp_min(CLOSEST).unsqueeze(1) * torch.stack([turn.cos(), turn.sin()], 1)

    def density(x: Tensor) -> Tensor:
        parts = [(-radius(x) / s).exp() / (2 * math.pi * s * s) for s in RADII]
        return torch.stack(parts).mean(0)

    def features(x: Tensor) -> Tensor:
        r = radius(x).unsqueeze(1)
        return torch.cat([x / 10, r.log1p() * x / r, r / 10, r.log1p()], 1)

    graded = torch.linspace(-1, 1, 202, dtype=torch.float64)
    return Task(
        name="hydrogen",
        dim=2,
        potential=lambda x: -1 / radius(x),
        energies=tuple(-1 / (2 * n + 1) ** 2 for n, _ in numbers),
        exact=exact,
        draw=draw,
        density=density,
        shift=0.0,
        scale=100.0,
        features=features,
        envelope=lambda x: (-0.22 * (1 + x.square().sum(1)).sqrt()).exp(),
        nodes=60 * (8 * graded).sinh() / math.sinh(8),  # fine at the nucleus, which is no node
        below=-2.0,
        window=(-20, 20),
        tolerances=(0.02,) * 4 + (0.05,) * 5,
    )


OBJECTIVES: dict[str, Objective] = {
    "NeuralEF": NeuralEFObjective(),
    "NestedLoRA": NestedLoRA(),
    "SpIN trace": TraceObjective(),
}


OURS, PEER = "NestedLoRA", "finite differences"


def learn(task: Task, objective: Objective, steps: int, seed: int) -> tuple[Tensor, Eigenbasis]:
    """Energies (k,) and wave functions: one network a state, trained and mixed."""
    generator = torch.Generator().manual_seed(seed)
    problem = Schrodinger(
        task.potential,
        task.draw,
        task.density,
        shift=task.shift,
        scale=task.scale,
        generator=generator,
    )
    network = ParallelMLP(
        task.dim,
        len(task.energies),
        width=48,
        activation=F.silu,
        features=task.features,
        envelope=task.envelope,
        generator=generator,
    )
    checks = 20 if steps > 100 else 1
    training = Training(steps, 512, 1e-2, weight_decay=0, checks=checks, patience=99)
    basis = learn_eigenbasis(
        network,
        problem,
        training,
        objective=objective,
        generator=generator,
        num_batches=24 if steps > 100 else 2,
        progress=False,
    )
    return problem.energies(basis.eigenvalues), basis


def axis_operator(nodes: Tensor) -> tuple[Tensor, Tensor]:
    r"""-d²/dx² between two walls on nodes of any spacing, and the length around each node.

    :math:`W^{-1/2} K W^{-1/2}`, with K the stiffness matrix of linear elements and W the lengths:
    symmetric, of order two. Its eigenvectors are :math:`W^{1/2}` times functions at the nodes.

    Args:
        nodes: Shape (m + 2,), increasing, with both walls.

    Returns:
        Shapes (m, m) and (m,).
    """
    gaps = nodes.diff()
    lengths = (gaps[:-1] + gaps[1:]) / 2
    off = torch.diag(1 / gaps[1:-1], 1)
    stiffness = torch.diag(1 / gaps[:-1] + 1 / gaps[1:]) - off - off.T
    root = lengths.sqrt()
    return stiffness / root / root.unsqueeze(1), lengths


def finite_differences(task: Task, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The lowest states on a grid with the same nodes along each axis.

    In the plane the sparse matrix is factored (shift-invert below all energies); in more
    dimensions its factors do not fit in memory, so products with it are all that is used.

    Returns:
        Energies (k,), wave functions (m^d, k), points (m^d, d), weights (m^d,).
    """
    from scipy import sparse
    from scipy.sparse.linalg import LinearOperator, eigsh

    matrix, lengths = (each.numpy() for each in axis_operator(nodes))
    points = torch.cartesian_prod(*[nodes[1:-1]] * task.dim)
    weights = torch.from_numpy(lengths)
    weights = torch.cartesian_prod(*[weights] * task.dim).prod(1)
    potential, rank = task.potential(points).numpy(), len(task.energies)
    if task.dim == 2:
        axis = sparse.csr_array(matrix)
        hamiltonian = sparse.kronsum(axis, axis) + sparse.diags_array(potential)
        values, vectors = eigsh(hamiltonian.tocsc(), rank, sigma=task.below)
    else:
        shape = (len(matrix),) * task.dim

        def apply(vector: np.ndarray) -> np.ndarray:
            grid = vector.reshape(shape)
            out = (potential * vector.ravel()).reshape(shape)
            for i in range(task.dim):
                out += np.moveaxis(np.tensordot(matrix, grid, (1, i)), 0, i)
            return out.ravel()

        operator = LinearOperator((len(points),) * 2, matvec=apply, dtype=np.float64)
        rng = np.random.default_rng(0)
        start = rng.standard_normal(len(points))
        values, vectors = eigsh(operator, rank, which="SA", tol=1e-4, v0=start)
    order = np.argsort(values)
    functions = torch.from_numpy(vectors[:, order]) / weights.sqrt().unsqueeze(1)
    return torch.from_numpy(values[order]), functions, points, weights


def row(
    task: Task, method: str, seed: int, errors: Tensor, angle: float, seconds: float
) -> dict[str, Any]:
    """One row of the results."""
    allowed = torch.tensor(task.tolerances, dtype=torch.float64)
    return {
        "method": f"{task.name}: {method}",
        "seed": seed,
        "worst_energy_error": errors.max().item(),
        "mean_energy_error": errors.mean().item(),
        "level_angle": angle,
        "passed": bool((errors <= allowed).all()) and angle < 10,
        "seconds": seconds,
    }


def tasks(smoke: bool) -> list[Task]:
    """The four systems; a test leaves out the one whose grid is large."""
    found = [well(), oscillator(2, 10, 1.3), hydrogen()]
    return found if smoke else [*found, oscillator(6, 7, 0.9)]


def check_points(task: Task, count: int) -> tuple[Tensor, Tensor]:
    """Points that training never saw, and the weights that make their sums integrals."""
    points = task.draw(count, torch.Generator().manual_seed(10**6))
    return points, 1 / task.density(points.double())


def peer_row(task: Task, smoke: bool) -> dict[str, Any]:
    """Finite differences; nothing in them is random."""
    nodes = task.nodes[:: len(task.nodes) // 30] if smoke else task.nodes
    found, seconds = cpu_timed(lambda: finite_differences(task, nodes))
    energies, functions, points, weights = found
    angle = task.angle(functions, points, weights)
    return row(task, PEER, 0, task.errors(energies), angle, seconds)


def figure(learned: dict[str, tuple[Task, Eigenbasis]]) -> Figure:
    """Wave functions in the plane: learned above, exact below, each fitted to its exact level."""
    chosen = {name: each for name, each in learned.items() if each[0].dim == 2}
    drawn = new_figure(7.6, 9)
    panels = drawn.subplots(2 * len(chosen), 5)
    for i, (name, (task, basis)) in enumerate(chosen.items()):
        low, high = task.window
        axis = torch.linspace(low, high, 90)
        grid = torch.cartesian_prod(axis, axis)
        grid = torch.where(grid.norm(dim=1, keepdim=True) < 1e-3, 1e-3, grid)
        values, exact = basis(grid)[:, 0].double(), task.exact(grid.double())
        for level in task.levels:  # any rotation within a level is as good
            values[:, level] = (
                values[:, level] @ torch.linalg.lstsq(values[:, level], exact[:, level]).solution
            )
        for j, state in enumerate((0, 1, 3, 5, len(task.energies) - 1)):
            for line, field in ((2 * i, values), (2 * i + 1, exact)):
                panel, picture = panels[line, j], field[:, state].view(90, 90).T
                limit = exact[:, state].abs().max().item()
                panel.imshow(picture, cmap="PuOr", vmin=-limit, vmax=limit, origin="lower")
                panel.set(xticks=[], yticks=[])
            panels[2 * i, j].set_title(f"E = {task.energies[state]:.3g}", fontsize=8)
        panels[2 * i, 0].set_ylabel(f"{name}\nlearned", fontsize=8)
        panels[2 * i + 1, 0].set_ylabel("exact", fontsize=8)
    return drawn


@dataclass(frozen=True)
class Settings(SpectralSettings):
    """What the script can be asked for.

    Attributes:
        methods: Objectives.
    """

    seeds: int = option(1, "how many")
    methods: tuple[str, ...] = option(tuple(OBJECTIVES), "objectives", choices=tuple(OBJECTIVES))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing and write everything."""
    settings = asked(Settings, __doc__.splitlines()[0], argv)
    ledger = Ledger("schrodinger", settings)
    learned: dict[str, tuple[Task, Eigenbasis]] = {}
    steps = 20 if settings.smoke else 3000
    for task in tasks(settings.smoke):
        if (0, f"{task.name}: {PEER}") not in ledger:
            ledger.add(peer_row(task, settings.smoke))
        points, weights = check_points(task, 500 if settings.smoke else 20_000)
        for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
            for method in settings.methods:
                if (seed, f"{task.name}: {method}") in ledger:
                    continue
                run = partial(learn, task, OBJECTIVES[method], steps, seed)
                (energies, basis), seconds = cpu_timed(run)
                angle = task.angle(basis(points)[:, 0], points, weights)
                ledger.add(row(task, method, seed, task.errors(energies), angle, seconds))
                if method == OURS:
                    learned[task.name] = task, basis
    rows = ledger.rows
    names = [task.name for task in tasks(settings.smoke)]
    ours = {name: mean_of(rows, f"{name}: {OURS}", "worst_energy_error") for name in names}
    hardest = names[-1]
    headline = Headline(
        question="Do networks find bound states of the Schrödinger equation?",
        metric=f"largest relative error of an energy ({hardest})",
        ours=ours[hardest],
        peer=PEER,
        theirs=mean_of(rows, f"{hardest}: {PEER}", "worst_energy_error"),
        truth=0.0,
        goal="every energy within 2 % (hydrogen n = 2: 5 %), angles of levels < 10°",
        reached=all(mean_of(rows, f"{name}: {OURS}", "passed") == 1 for name in names),
        seconds=mean_of(rows, f"{hardest}: {OURS}", "seconds"),
    )
    plane = {task.name for task in tasks(settings.smoke) if task.dim == 2}
    finish(
        "schrodinger", settings, rows, headline, figure(learned) if plane <= set(learned) else None
    )


if __name__ == "__main__":
    main()
