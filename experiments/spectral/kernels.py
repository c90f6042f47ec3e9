"""Can networks learn the eigenfunctions of explicit kernels, and at what cost?

    python experiments/spectral/kernels.py --first-seed 1

1. The RBF kernel on N(0, I) in the plane, ten functions, against closed forms.
2. (x·y + 1.5)⁴ on a rectangle, ten functions, against its exact moment matrix.
3. Random two-layer ReLU networks as features, on two moons and on circles (1,000 points), three
   functions, against the eigenvectors of the infinite-width (arc-cosine) kernel.

A network is ten sine perceptrons whose hidden units are all mixed by one linear head. The head
starts in closed form (Rayleigh-Ritz on one sample of 4,096 points; the hidden layers are random),
then all weights are trained on new points in every batch (1, 2), or on 10,000 random networks (3).
"start alone" is the network before training: the difference tells what training adds. "random
start" are ten separate networks, trained from random weights for as many steps. Nyström is the
peer, with 512 and 2,048 landmarks, in (3) with 100 of the points. For an explicit kernel in the
plane Nyström is exact and cheap; what the network saves is the cost of an evaluation, which does
not grow with the landmarks (`evaluate_seconds`, 20,000 points). Tolerance of the start, learning
rate, steps and scale of the kernel were chosen by the true error on seed 0.

Reference: NeuralEF: Deconstructing Kernels by Deep Neural Networks (Deng et al., 2022),
https://arxiv.org/abs/2205.00165; Operator SVD with Neural Networks via Nested Low-Rank
Approximation (Ryu et al., 2024), https://arxiv.org/abs/2402.03655
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from _common import (
    Headline,
    Ledger,
    Scaled,
    SpectralSettings,
    asked,
    cpu_timed,
    finish,
    largest_angle,
    mean_of,
    new_figure,
)
from _report import Row
from _settings import option
from _truths import Truth, gaussian_rbf, uniform_polynomial
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from ella.spectral import (
    Eigenbasis,
    FeatureKernel,
    Kernel,
    KernelOperator,
    LinearHead,
    NestedLoRA,
    NeuralEFObjective,
    NystromBasis,
    Objective,
    ParallelMLP,
    Population,
    Samples,
    SpectralLoss,
    Training,
    learn_eigenbasis,
    ritz_basis,
    ritz_head,
    train,
)

TOP = 100.0
"""The kernel is scaled so that its leading eigenvalue is this while networks train: Adam's steps
have a size of their own, and functions whose eigenvalue is below it are not learned."""
BLOCKS = 10
"""Perceptrons whose hidden units, 32 each, a network mixes."""
START_POINTS = 4096
LANDMARKS = 100
TOYS = ("two moons", "circles")
GOALS = {"RBF": 5.0, "polynomial": 10.0}
"""Largest angles, in degrees, that were to be reached."""
FROM_START = Training(
    steps=600, batch_size=512, learning_rate=3e-4, weight_decay=0, checks=10, patience=10
)
FROM_RANDOM = replace(FROM_START, learning_rate=1e-2)


def normal(size: int, generator: torch.Generator) -> Tensor:
    """Points of N(0, I) in the plane."""
    return torch.randn(size, 2, generator=generator)


def rectangle(size: int, generator: torch.Generator) -> Tensor:
    """Points of U([-1, 1] × [-.8, .8])."""
    return (2 * torch.rand(size, 2, generator=generator) - 1) * torch.tensor([1.0, 0.8])


def start(
    kernel: KernelOperator,
    points: Tensor,
    rank: int,
    seed: int,
    kernel_inputs: Tensor | None = None,
) -> LinearHead:
    """Random hidden layers and the best head for them; see `ritz_head`."""
    body = ParallelMLP(2, BLOCKS, generator=torch.Generator().manual_seed(seed))
    return ritz_head(body, kernel, points, rank, kernel_inputs=kernel_inputs)


def shortened(training: Training, smoke: bool) -> Training:
    """The training, or hardly any."""
    return replace(training, steps=5) if smoke else training


@dataclass(frozen=True)
class Explicit:
    """A kernel on a distribution, both in closed form.

    Attributes:
        name: Of the kernel.
        truth: Its eigenpairs.
        draw: `(size, generator)` ↦ points.
    """

    name: str
    truth: Truth
    draw: Callable[[int, torch.Generator], Tensor]

    @property
    def rank(self) -> int:
        """Number of functions that are sought."""
        return len(self.truth.eigenvalues)

    @property
    def scaled(self) -> Scaled:
        """The kernel with leading eigenvalue `TOP`."""
        return Scaled(self.truth.kernel, TOP / self.truth.eigenvalues[0].item())

    def learn(
        self, network: nn.Module, objective: Objective, training: Training | None, seed: int
    ) -> Eigenbasis:
        """The network, trained on new points or not, mixed by Rayleigh-Ritz on 49,152 others."""
        generator = torch.Generator().manual_seed(seed)
        held = torch.Generator().manual_seed(seed + 1000)
        problem = Population(self.scaled, self.draw, generator=held)
        if training is not None:
            loss = SpectralLoss(problem, objective)
            train(network, loss, training, generator=generator, progress=False)
        basis = ritz_basis(network.requires_grad_(False), problem, generator, num_batches=24)
        return replace(basis, eigenvalues=basis.eigenvalues / self.scaled.factor)

    def nystrom(self, count: int, seed: int) -> NystromBasis:
        """The peer, on so many landmarks."""
        points = self.draw(count, torch.Generator().manual_seed(seed))
        return NystromBasis.of(self.truth.kernel, points, self.rank)

    def fits(self, seed: int, smoke: bool) -> dict[str, Callable[[], Eigenbasis | NystromBasis]]:
        """All methods."""

        def ready() -> LinearHead:
            points = self.draw(START_POINTS, torch.Generator().manual_seed(seed + 2000))
            return start(self.scaled, points, self.rank, seed)

        def separate() -> ParallelMLP:
            generator = torch.Generator().manual_seed(seed)
            return ParallelMLP(2, self.rank, generator=generator)

        training, from_random = (shortened(each, smoke) for each in (FROM_START, FROM_RANDOM))
        lora, neuralef = NestedLoRA(), NeuralEFObjective()
        landmarks = (64,) if smoke else (2048, 512)
        return {
            "start alone": lambda: self.learn(ready(), lora, None, seed),
            "NestedLoRA": lambda: self.learn(ready(), lora, training, seed),
            **{f"Nyström, {n} landmarks": partial(self.nystrom, n, seed) for n in landmarks},
            "NeuralEF": lambda: self.learn(ready(), neuralef, training, seed),
            "random start, NestedLoRA": lambda: self.learn(separate(), lora, from_random, seed),
        }

    def row(self, method: str, seed: int, smoke: bool) -> dict[str, Any]:
        """Errors and costs of one method."""
        basis, seconds = cpu_timed(self.fits(seed, smoke)[method])
        many = self.draw(1000 if smoke else 20_000, torch.Generator().manual_seed(99))
        errors = self.truth.eigenvalue_errors(basis.eigenvalues[: self.rank])
        return {
            "method": f"{self.name}: {method}",
            "seed": seed,
            "eigenvalue_error": errors.mean().item(),
            "worst_eigenvalue_error": errors.max().item(),
            "angle": self.truth.angle(basis(self.truth.points.float())[:, 0]),
            "seconds": seconds,
            "evaluate_seconds": cpu_timed(lambda: [basis(x) for x in many.split(5000)])[1],
        }


EXPLICIT = (
    Explicit("RBF", gaussian_rbf(), normal),
    Explicit("polynomial", uniform_polynomial(), rectangle),
)


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


def learn_toy(name: str, seed: int, smoke: bool) -> Eigenbasis:
    """Three functions of the kernel of sampled random networks on two moons or circles."""
    points, _ = toy_points(name, seed)
    generator = torch.Generator().manual_seed(seed)
    features = random_networks(points, 200 if smoke else 10_000, generator)
    # The largest eigenvalue is most of the mean of κ(x, x), as for any kernel of one sign.
    features *= (TOP / features.square().sum(2).mean().item()) ** 0.5
    network = start(FeatureKernel(), points, 3, seed, kernel_inputs=features)
    problem = Samples(FeatureKernel(), points, features, generator=generator, holdout=0.05)
    problem.pool = torch.arange(len(points))  # the truth is the Gram matrix of all of them
    training = shortened(replace(FROM_START, steps=200), smoke)
    return learn_eigenbasis(
        network, problem, training, generator=generator, num_batches=4, progress=False
    )


def toy_rows(name: str, seed: int, smoke: bool) -> list[dict[str, Any]]:
    """Random networks as a kernel against the infinite width, on all the points."""
    points, _ = toy_points(name, seed)
    gram = ArcCosine()(points, points).double()
    vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :3]
    rows = []
    for method, fit in (
        ("NestedLoRA", lambda: learn_toy(name, seed, smoke)),
        (f"Nyström, {LANDMARKS} landmarks", lambda: few_landmarks(points)),
    ):
        basis, seconds = cpu_timed(fit)
        angle = largest_angle(basis(points)[:, 0], vectors)
        rows.append(
            {"method": f"{name}: {method}", "seed": seed, "angle": angle, "seconds": seconds}
        )
    return rows


def few_landmarks(points: Tensor) -> NystromBasis:
    """The peer on the toy data."""
    return NystromBasis.of(ArcCosine(), points[:LANDMARKS], 3)


def headline(rows: Sequence[Row], landmarks: int) -> Headline:
    """The RBF kernel; the goal takes in the polynomial as well."""
    worst = mean_of(rows, "RBF: NestedLoRA", "worst_eigenvalue_error")
    angle = mean_of(rows, "RBF: NestedLoRA", "angle")
    polynomial = mean_of(rows, "polynomial: NestedLoRA", "angle")
    return Headline(
        question="Can networks learn the eigenfunctions of explicit kernels?",
        metric="largest angle of ten functions, degrees (RBF)",
        ours=angle,
        peer=f"Nyström, {landmarks} landmarks",
        theirs=mean_of(rows, f"RBF: Nyström, {landmarks} landmarks", "angle"),
        truth=0.0,
        goal="RBF: angle < 5°, eigenvalues within 3 %; polynomial: angle < 10°",
        reached=angle < GOALS["RBF"] and worst < 0.03 and polynomial < GOALS["polynomial"],
        seconds=mean_of(rows, "RBF: NestedLoRA", "seconds"),
    )


@dataclass(frozen=True)
class Settings(SpectralSettings):
    """What the script can be asked for."""

    seeds: int = option(5, "how many")


def main(argv: list[str] | None = None) -> None:
    """Run what is not in the result file yet, and write everything."""
    settings = asked(Settings, __doc__.splitlines()[0], argv)
    ledger = Ledger("kernels", settings)
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    for method in EXPLICIT[0].fits(0, settings.smoke):
        for kernel, seed in product(EXPLICIT, seeds):
            if (seed, f"{kernel.name}: {method}") not in ledger:
                ledger.add(kernel.row(method, seed, settings.smoke))
    for name, seed in product(TOYS, seeds):
        if (seed, name) not in ledger:
            ledger.add(*toy_rows(name, seed, settings.smoke))
    drawn = {name: learn_toy(name, settings.first_seed, settings.smoke) for name in TOYS}
    rows, landmarks = ledger.rows, 64 if settings.smoke else 2048
    finish(
        "kernels",
        settings,
        rows,
        headline(rows, landmarks),
        figure(drawn, rows, settings.first_seed),
    )


def figure(bases: dict[str, Eigenbasis], rows: Sequence[Row], seed: int) -> Figure:
    """Angles of all methods, and the plane coloured by each learned function of the toy data."""
    drawn = new_figure(11, 5)
    left, right = drawn.subfigures(1, 2, width_ratios=[2, 3])
    panels = left.subplots(2, 1)
    for panel, kernel in zip(panels, EXPLICIT, strict=True):
        _bars(panel, kernel.name, GOALS[kernel.name], rows)
    axis = torch.linspace(-2.5, 2.5, 80)
    grid = torch.cartesian_prod(axis, axis)
    for line, (name, basis) in zip(right.subplots(2, 3), bases.items(), strict=True):
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


def _bars(panel: Axes, name: str, goal: float, rows: Sequence[Row]) -> None:
    """Mean angle of each method on one kernel, with every seed as a dot, the best on top."""
    found: dict[str, list[float]] = {}
    for row in rows:
        kernel, method = row["method"].split(": ")
        if kernel == name:
            found.setdefault(method, []).append(row["angle"])
    ordered = sorted(found.items(), key=lambda item: sum(item[1]) / len(item[1]))
    for place, (_, angles) in enumerate(ordered):
        panel.plot(sum(angles) / len(angles), place, "|", color="#EE6677", markersize=14)
        panel.plot(angles, [place] * len(angles), "o", color="#4477AA", markersize=4, alpha=0.7)
    panel.axvline(goal, color="black", linewidth=0.8, linestyle="--")
    panel.set_yticks(range(len(ordered)), [method for method, _ in ordered], fontsize=8)
    panel.set(xscale="log", xlim=(0.8, 100))
    panel.set_title(f"{name}: angle to the truth, degrees (dashed: goal)", fontsize=9)
    panel.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    panel.tick_params(axis="x", which="minor", length=0)
    panel.invert_yaxis()
    panel.grid(axis="x", alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
