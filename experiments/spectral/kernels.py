"""Can networks learn the eigenfunctions of explicit kernels, and at what cost?

    python experiments/spectral/kernels.py --first-seed 1

1. The RBF kernel on N(0, I) in the plane, ten functions, against closed forms.
2. (x·y + 1.5)⁴ on a rectangle, ten functions, against its exact moment matrix.
3. Random two-layer ReLU networks as features, on two moons and on circles (1,000 points), three
   functions, against the eigenvectors of the infinite-width (arc-cosine) kernel.

Networks see new points in every batch (1, 2), or 10,000 random networks (3), and never form a
Gram matrix. Nyström is the peer, with 512 and 2,048 landmarks, in (3) with 100 of the points.
For an explicit kernel in the plane Nyström is exact and cheap; what the network saves is the cost
of an evaluation, which does not grow with the landmarks (`evaluate_seconds`, 100,000 points). The
scale of the kernel and the number of steps were chosen by the true error on seed 0 of (2).

Reference: NeuralEF: Deconstructing Kernels by Deep Neural Networks (Deng et al., 2022),
https://arxiv.org/abs/2205.00165; Operator SVD with Neural Networks via Nested Low-Rank
Approximation (Ryu et al., 2024), https://arxiv.org/abs/2402.03655
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _common import (
    Headline,
    Scaled,
    arguments,
    cpu_timed,
    finish,
    largest_angle,
    mean_of,
    new_figure,
)
from _truths import Truth, gaussian_rbf, uniform_polynomial
from matplotlib.figure import Figure
from torch import Tensor

from ella.spectral import (
    Eigenbasis,
    FeatureKernel,
    Kernel,
    NestedLoRA,
    NeuralEFObjective,
    NystromBasis,
    Objective,
    ParallelMLP,
    Population,
    Problem,
    Samples,
    Training,
    learn_eigenbasis,
)

TOP = 100.0
"""The kernel is scaled so that its leading eigenvalue is this while networks train: Adam's steps
have a size of their own, and functions whose eigenvalue is below it are not learned."""
LANDMARKS = 100
OBJECTIVES: dict[str, Objective] = {
    "NestedLoRA": NestedLoRA(),
    "NeuralEF": NeuralEFObjective(),
}


def normal(size: int, generator: torch.Generator) -> Tensor:
    """Points of N(0, I) in the plane."""
    return torch.randn(size, 2, generator=generator)


def rectangle(size: int, generator: torch.Generator) -> Tensor:
    """Points of U([-1, 1] × [-.8, .8])."""
    return (2 * torch.rand(size, 2, generator=generator) - 1) * torch.tensor([1.0, 0.8])


def learn(problem: Problem, rank: int, objective: Objective, steps: int, seed: int) -> Eigenbasis:
    """K separate sine networks, trained and mixed by Rayleigh-Ritz."""
    generator = torch.Generator().manual_seed(seed)
    network = ParallelMLP(2, rank, generator=generator)
    training = Training(
        steps=steps, batch_size=512, learning_rate=1e-2, weight_decay=0, patience=99
    )
    return learn_eigenbasis(
        network,
        problem,
        training,
        objective=objective,
        generator=generator,
        num_batches=24,
        batch_size=2048,
        progress=False,
    )


def explicit_rows(
    name: str,
    truth: Truth,
    draw: Callable[[int, torch.Generator], Tensor],
    seed: int,
    smoke: bool,
) -> list[dict[str, Any]]:
    """Networks and Nyström on a kernel whose eigenpairs are known."""
    rank = len(truth.eigenvalues)
    factor = TOP / truth.eigenvalues[0].item()
    many = draw(1000 if smoke else 100_000, torch.Generator().manual_seed(99))
    points = truth.points.float()
    rows = []

    def note(method: str, fitted: tuple[Any, float], scale: float) -> None:
        basis, seconds = fitted
        errors = truth.eigenvalue_errors(basis.eigenvalues[:rank] / scale)
        rows.append(
            {
                "method": f"{name}: {method}",
                "seed": seed,
                "eigenvalue_error": errors.mean().item(),
                "worst_eigenvalue_error": errors.max().item(),
                "angle": truth.angle(basis(points)[:, 0]),
                "seconds": seconds,
                "evaluate_seconds": cpu_timed(lambda: [basis(x) for x in many.split(5000)])[1],
            }
        )

    for method, objective in OBJECTIVES.items():
        scaled = Scaled(truth.kernel, factor)
        problem = Population(scaled, draw, generator=torch.Generator().manual_seed(seed + 1000))
        steps = 20 if smoke else 4000
        run = partial(learn, problem, rank, objective, steps, seed)
        note(method, cpu_timed(run), factor)
    for count in (64,) if smoke else (512, 2048):
        landmarks = draw(count, torch.Generator().manual_seed(seed))
        run = partial(NystromBasis.of, truth.kernel, landmarks, rank)
        note(f"Nyström, {count} landmarks", cpu_timed(run), 1.0)
    return rows


@dataclass(frozen=True)
class ArcCosine(Kernel):
    r"""E[relu(w·x) relu(w·y)] for w ~ N(0, I), inputs with a 1 appended: infinite width.

    Reference: Kernel Methods for Deep Learning (Cho & Saul, 2009).
    """

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Shape (n, m)."""
        left, right = (torch.cat([each, torch.ones(len(each), 1)], dim=1) for each in (x, y))
        sizes = left.norm(dim=1)[:, None] * right.norm(dim=1)
        cosine = (left @ right.T / sizes).clamp(-1, 1)
        angle = cosine.acos()
        return sizes * (angle.sin() + (math.pi - angle) * cosine) / (2 * math.pi)


def random_networks(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """relu(w·x) of `count` random w as features S with κ = SSᵀ, shape (n, 1, count)."""
    wide = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    weights = torch.randn(3, count, generator=generator)
    return ((wide @ weights).relu() / count**0.5).unsqueeze(1)


def toy_points(name: str, seed: int) -> tuple[Tensor, Tensor]:
    """1,000 standardised points of scikit-learn's two moons or circles, and their classes."""
    from sklearn.datasets import make_circles, make_moons

    if name == "two moons":
        x, y = make_moons(1000, noise=0.04, random_state=seed)
    else:
        x, y = make_circles(1000, noise=0.04, factor=0.5, random_state=seed)
    points = torch.from_numpy(x).float()
    return (points - points.mean(0)) / points.std(0), torch.from_numpy(y)


def sampled_rows(name: str, seed: int, smoke: bool) -> tuple[list[dict[str, Any]], Any]:
    """Random networks as a kernel on two moons or circles; also the learned basis, to draw."""
    points, _ = toy_points(name, seed)
    gram = ArcCosine()(points, points).double()
    values, vectors = torch.linalg.eigh(gram / len(points))
    values, vectors = values.flip(0)[:3], vectors.flip(1)[:, :3]
    generator = torch.Generator().manual_seed(seed)
    features = random_networks(points, 200 if smoke else 10_000, generator)
    features *= (TOP / values[0].item()) ** 0.5
    problem = Samples(FeatureKernel(), points, features, generator=generator, holdout=0.05)
    problem.pool = torch.arange(len(points))  # the truth is the Gram matrix of all of them
    steps = 20 if smoke else 1000
    basis, seconds = cpu_timed(lambda: learn(problem, 3, NestedLoRA(), steps, seed))
    few, peer_seconds = cpu_timed(lambda: NystromBasis.of(ArcCosine(), points[:LANDMARKS], 3))
    rows = []
    for method, functions, took in (
        ("NestedLoRA", basis(points)[:, 0], seconds),
        (f"Nyström, {LANDMARKS} landmarks", few(points)[:, 0], peer_seconds),
    ):
        angle = largest_angle(functions, vectors)
        rows.append({"method": f"{name}: {method}", "seed": seed, "angle": angle, "seconds": took})
    return rows, basis


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    args = arguments(__doc__.splitlines()[0], argv)
    rows: list[dict[str, Any]] = []
    problems = (("RBF", gaussian_rbf(), normal), ("polynomial", uniform_polynomial(), rectangle))
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, truth, draw in problems:
            rows += explicit_rows(name, truth, draw, seed, args.smoke)
        drawn = {}
        for name in ("two moons", "circles"):
            found, drawn[name] = sampled_rows(name, seed, args.smoke)
            rows += found
    worst = mean_of(rows, "RBF: NestedLoRA", "worst_eigenvalue_error")
    angle = mean_of(rows, "RBF: NestedLoRA", "angle")
    polynomial = mean_of(rows, "polynomial: NestedLoRA", "angle")
    landmarks = 64 if args.smoke else 2048
    headline = Headline(
        question="Can networks learn the eigenfunctions of explicit kernels?",
        metric="largest angle of ten functions, degrees (RBF)",
        ours=angle,
        peer=f"Nyström, {landmarks} landmarks",
        theirs=mean_of(rows, f"RBF: Nyström, {landmarks} landmarks", "angle"),
        truth=0.0,
        goal="RBF: angle < 5°, eigenvalues within 3 %; polynomial: angle < 10°",
        reached=angle < 5 and worst < 0.03 and polynomial < 10,
        seconds=mean_of(rows, "RBF: NestedLoRA", "seconds"),
    )
    finish("kernels", args, rows, headline, figure(drawn, args.first_seed + args.seeds - 1))


def figure(bases: dict[str, Eigenbasis], seed: int) -> Figure:
    """The talk's pictures: the plane coloured by each function, with the points on it."""
    drawn = new_figure(8, 5)
    panels = drawn.subplots(2, 3)
    axis = torch.linspace(-2.5, 2.5, 80)
    grid = torch.cartesian_prod(axis, axis)
    for line, (name, basis) in zip(panels, bases.items(), strict=True):
        points, classes = toy_points(name, seed)
        values = basis(grid)[:, 0].view(80, 80, -1)
        for j, panel in enumerate(line):
            limit = values[..., j].abs().max().item()
            panel.contourf(axis, axis, values[..., j].T, 20, cmap="PuOr", vmin=-limit, vmax=limit)
            for label, marker in ((0, "."), (1, "x")):
                shown = points[classes == label][::4]
                panel.plot(shown[:, 0], shown[:, 1], f"k{marker}", markersize=3)
            panel.set(xticks=[], yticks=[], title=f"{name}, function {j + 1}")
    return drawn


if __name__ == "__main__":
    main()
