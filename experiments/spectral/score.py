"""Can eigenfunctions give the score ∇ log p of a distribution known by samples only?

    python experiments/spectral/score.py

Three densities in the plane, 2,000 samples of each: N(0, I), a mixture of three Gaussians and a
banana. SSGE expands the score in the J leading eigenfunctions of an RBF kernel, with coefficients
-E[∇ψ_j] that need samples only. Its eigenfunctions are Nyström's (all samples are landmarks) or
networks' (NestedLoRA, then Rayleigh-Ritz). The length scale, the same for both, is the share of
the median distance that is best in Hyvärinen's score on held-out samples: no truth is looked at.
The median itself, which its authors advise, is too wide for the mixture and the banana. The truth
is autograd's gradient of the log-density. Errors are E‖ŝ - s‖² / E‖s‖² over 2,000 new points.

Peers that use no eigenfunctions: the score of a kernel density estimate (scipy's `gaussian_kde`,
Silverman's bandwidth), and kernel score matching, whose Tikhonov parameter is the best one in
Hyvärinen's score on a fifth of the samples.

Reference: A Spectral Approach to Gradient Estimation for Implicit Distributions (Shi et al.,
2018), https://arxiv.org/abs/1806.02925
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _common import Headline, Scaled, arguments, cpu_timed, finish, mean_of, new_figure
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from ella.spectral import (
    RBF,
    NystromBasis,
    ParallelMLP,
    Samples,
    Training,
    learn_eigenbasis,
)

RANKS = (6, 12, 24)
JUDGED = 12
"""The J of the goal and of the figure."""
GOALS = {"Gaussian": 0.06, "mixture": 0.08}
TOP = 10.0
"""The kernel is scaled so that its leading eigenvalue is about this while networks train."""

Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Density:
    """A density in the plane with exact samples.

    Attributes:
        log_prob: log p, from points (n, 2) to (n,).
        transport: Maps (n, 2) standard normal and (n,) uniform numbers to n samples.
    """

    log_prob: Callable[[Tensor], Tensor]
    transport: Callable[[Tensor, Tensor], Tensor]

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Samples, shape (n, 2)."""
        normal = torch.randn(size, 2, generator=generator)
        return self.transport(normal, torch.rand(size, generator=generator))

    def score(self, x: Tensor) -> Tensor:
        """∇ log p at points (n, 2), by autograd."""
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.log_prob(x).sum(), x)
        return gradient


def gaussian() -> Density:
    """N(0, I)."""
    law = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    return Density(law.log_prob, lambda normal, uniform: normal)


def mixture() -> Density:
    """Three round Gaussians of deviation 0.7 in equal parts, their centres 2 from the origin."""
    angles = torch.tensor([90.0, 210.0, 330.0]).deg2rad()
    centres = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    parts = Independent(Normal(centres, 0.7), 1)
    law = MixtureSameFamily(Categorical(torch.ones(3)), parts)
    return Density(
        law.log_prob, lambda normal, uniform: centres[(3 * uniform).long()] + 0.7 * normal
    )


def banana() -> Density:
    """x₁ ~ N(0, 1) and x₂ ~ N(x₁² - 1, 0.5²)."""

    def log_prob(x: Tensor) -> Tensor:
        first = Normal(0.0, 1.0).log_prob(x[:, 0])
        return first + Normal(x[:, 0] ** 2 - 1, 0.5).log_prob(x[:, 1])

    def transport(normal: Tensor, uniform: Tensor) -> Tensor:
        first = normal[:, 0]
        return torch.stack([first, first**2 - 1 + 0.5 * normal[:, 1]], 1)

    return Density(log_prob, transport)


DENSITIES = {"Gaussian": gaussian(), "mixture": mixture(), "banana": banana()}


def median_distance(x: Tensor) -> float:
    """The median distance between two of the points (n, d)."""
    return torch.pdist(x).median().item()


@dataclass(frozen=True)
class SpectralScore:
    r"""SSGE: :math:`\hat s(x) = -\sum_{j≤J} E[∇ψ_j] ψ_j(x)`, by Stein's identity.

    Attributes:
        functions: The orthonormal eigenfunctions, from points (n, d) to values (n, k).
        means: E[∇ψ_j] over the samples, shape (k, d).
    """

    functions: Callable[[Tensor], Tensor]
    means: Tensor

    @classmethod
    def of(cls, functions: Callable[[Tensor], Tensor], samples: Tensor) -> "SpectralScore":
        """From samples (n, d); `functions` must be differentiable and treat rows apart.

        The mean gradient is the derivative of the mean value when all samples shift together.
        """

        def mean_value(shift: Tensor) -> Tensor:
            return functions(samples + shift).mean(0)

        return cls(functions, torch.func.jacrev(mean_value)(torch.zeros_like(samples[0])))

    def __call__(self, x: Tensor, rank: int) -> Tensor:
        """The score at points (n, d) from the first `rank` functions, shape (n, d)."""
        return -self.functions(x)[:, :rank] @ self.means[:rank]


def nystrom_score(samples: Tensor, length_scale: float) -> SpectralScore:
    """SSGE with all samples as landmarks: its authors' estimator."""
    basis = NystromBasis.of(RBF(length_scale), samples.double(), max(RANKS))
    return SpectralScore.of(lambda x: basis(x.double())[:, 0].to(x), samples)


def hyvarinen(score: Score, x: Tensor) -> float:
    """E[‖s‖²/2 + div s] over points (n, d): half the squared error less a constant."""
    x = x.detach().requires_grad_()
    values = score(x)
    divergence = torch.zeros(())
    for i in range(x.shape[1]):
        (slopes,) = torch.autograd.grad(values[:, i].sum(), x, retain_graph=True)
        divergence = divergence + slopes[:, i]
    return (0.5 * values.square().sum(1) + divergence).mean().item()


def best_length_scale(samples: Tensor) -> float:
    """The share of the median distance whose SSGE has the least loss on held-out samples."""
    some = samples[:800]
    held, scale = samples[800:1600] if len(samples) > 1000 else samples, median_distance(some)

    def loss(factor: float) -> float:
        score = nystrom_score(some, factor * scale)
        return hyvarinen(partial(score, rank=JUDGED), held)

    return scale * min((0.35, 0.5, 0.7, 1.0), key=loss)


def network_score(samples: Tensor, length_scale: float, steps: int, seed: int) -> SpectralScore:
    """SSGE with learned eigenfunctions, which cost the same however many samples there are."""
    generator = torch.Generator().manual_seed(seed)
    kernel = RBF(length_scale)
    few = samples[:200]
    # Only a scale, so a rough leading eigenvalue does.
    leading = torch.linalg.eigvalsh(kernel(few, few) / len(few))[-1].item()
    problem = Samples(Scaled(kernel, TOP / leading), samples, samples, generator=generator)
    network = ParallelMLP(2, max(RANKS), generator=generator)
    training = Training(
        steps=steps, batch_size=512, learning_rate=1e-2, weight_decay=0, patience=99
    )
    basis = learn_eigenbasis(network, problem, training, generator=generator, progress=False)
    mixing = basis.mixing.float()
    return SpectralScore.of(lambda x: network(x)[:, 0] @ mixing, samples)


def density_score(samples: Tensor) -> Score:
    """The score of scipy's kernel density estimate with Silverman's bandwidth, in closed form."""
    from scipy.stats import gaussian_kde

    estimate = gaussian_kde(samples.T.double().numpy(), bw_method="silverman")
    precision = torch.from_numpy(estimate.inv_cov).to(samples)
    root = torch.linalg.cholesky(precision)

    def score(x: Tensor) -> Tensor:
        weights = (-0.5 * torch.cdist(x @ root, samples @ root).square()).softmax(1)
        return (weights @ samples - x) @ precision

    return score


class ScoreMatching:
    r"""Kernel score matching: s = ∇f with :math:`f = \sum_m α_m κ(·, z_m)` for an RBF kernel κ.

    Minimises Hyvärinen's score :math:`E[\|∇f\|^2/2 + Δf]`, which needs samples only, plus
    :math:`λ α^\top K α / 2`.

    Reference: Efficient and principled score estimation with Nyström kernel exponential families
    (Sutherland et al., 2018), https://arxiv.org/abs/1705.08360

    Args:
        samples: Shape (n, d).
        landmarks: z, shape (m, d).
        length_scale: Of κ.
        penalty: λ.
    """

    def __init__(
        self, samples: Tensor, landmarks: Tensor, length_scale: float, penalty: float
    ) -> None:
        self.landmarks, self.length_scale = landmarks, length_scale
        slopes, curvatures = self._derivatives(samples)
        gram = RBF(length_scale)(landmarks, landmarks)
        second = torch.einsum("nmd,nkd->mk", slopes, slopes) / len(samples)
        jitter = 1e-9 * torch.eye(len(landmarks), dtype=samples.dtype)
        self.weights = -torch.linalg.solve(second + penalty * gram + jitter, curvatures.mean(0))

    def __call__(self, x: Tensor) -> Tensor:
        """The score at points (n, d), shape (n, d)."""
        return torch.einsum("nmd,m->nd", self._derivatives(x)[0], self.weights)

    def loss(self, x: Tensor) -> float:
        """Hyvärinen's score on points (n, d): half the squared error less a constant."""
        slopes, curvatures = self._derivatives(x)
        score = torch.einsum("nmd,m->nd", slopes, self.weights)
        return (0.5 * score.square().sum(1) + curvatures @ self.weights).mean().item()

    def _derivatives(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """∇κ(x, z_m), shape (n, m, d), and Δκ(x, z_m), shape (n, m)."""
        square = self.length_scale**2
        away = x.unsqueeze(1) - self.landmarks
        values = RBF(self.length_scale)(x, self.landmarks)
        laplacian = values * (away.square().sum(2) / square - x.shape[1]) / square
        return -away / square * values.unsqueeze(2), laplacian


def matching_score(samples: Tensor, num_landmarks: int) -> Score:
    """Kernel score matching, its penalty and length scale the best on a fifth of the samples."""
    points = samples.double()
    cut = len(points) * 4 // 5
    scale = median_distance(samples)
    tried = [
        ScoreMatching(points[:cut], points[:num_landmarks], factor * scale, 10.0**power)
        for factor in (0.5, 1.0)
        for power in range(-7, 0)
    ]
    best = min(tried, key=lambda each: each.loss(points[cut:]))
    return lambda x: best(x.double()).to(x)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """E‖ŝ - s‖² / E‖s‖² over points, both (n, d)."""
    return ((found - exact).square().sum() / exact.square().sum()).item()


def estimates(samples: Tensor, seed: int, smoke: bool) -> dict[str, tuple[Score, float]]:
    """All methods on one set of samples, and the CPU seconds of each fit."""
    steps = 20 if smoke else 3000
    scale = best_length_scale(samples)
    found: dict[str, tuple[Score, float]] = {}
    spectral = {
        "SSGE, Nyström": lambda: nystrom_score(samples, scale),
        "SSGE, NestedLoRA": lambda: network_score(samples, scale, steps, seed),
    }
    for name, fit in spectral.items():
        score, seconds = cpu_timed(fit)
        for rank in RANKS:
            found[f"{name}, J = {rank}"] = (partial(score, rank=rank), seconds)
    found["kernel density"] = cpu_timed(lambda: density_score(samples))
    found["score matching"] = cpu_timed(lambda: matching_score(samples, 20 if smoke else 200))
    return found


def rows_of(name: str, density: Density, seed: int, smoke: bool) -> list[dict[str, Any]]:
    """Every method on one density."""
    generator = torch.Generator().manual_seed(seed)
    samples = density.draw(200 if smoke else 2000, generator)
    new = density.draw(2000, generator)
    exact = density.score(new)
    return [
        {
            "method": f"{name}: {method}",
            "seed": seed,
            "error": relative_error(score(new), exact),
            "seconds": seconds,
        }
        for method, (score, seconds) in estimates(samples, seed, smoke).items()
    ]


def figure(seed: int, smoke: bool) -> Figure:
    """Fields of arrows on samples: exact, from learned functions, and from Nyström's."""
    drawn = new_figure(9, 6)
    panels = drawn.subplots(2, 3)
    for line, name in zip(panels, ("mixture", "banana"), strict=True):
        density = DENSITIES[name]
        generator = torch.Generator().manual_seed(seed)
        samples = density.draw(200 if smoke else 2000, generator)
        points = samples[:150]
        found = estimates(samples, seed, smoke)
        fields = {
            "exact": density.score(points),
            "learned functions": found[f"SSGE, NestedLoRA, J = {max(RANKS)}"][0](points),
            "Nyström's functions": found[f"SSGE, Nyström, J = {max(RANKS)}"][0](points),
        }
        for panel, (title, field) in zip(line, fields.items(), strict=True):
            panel.plot(*samples.T, ".", color="0.8", markersize=2)
            panel.quiver(*points.T, *field.T, angles="xy", scale=60, width=0.004)
            panel.set(title=f"{name}: {title}", xticks=[], yticks=[])
    return drawn


def main(argv: list[str] | None = None) -> None:
    """Run and write everything."""
    args = arguments(__doc__.splitlines()[0], argv)
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    rows = [
        row
        for seed in seeds
        for name, density in DENSITIES.items()
        for row in rows_of(name, density, seed, args.smoke)
    ]

    def error(name: str, method: str) -> float:
        return mean_of(rows, f"{name}: {method}, J = {JUDGED}", "error")

    ours = {name: error(name, "SSGE, NestedLoRA") for name in DENSITIES}
    headline = Headline(
        question="Can eigenfunctions give the score of a distribution known by samples?",
        metric=f"relative squared error of the score of a mixture, J = {JUDGED}",
        ours=ours["mixture"],
        peer="SSGE with Nyström",
        theirs=error("mixture", "SSGE, Nyström"),
        truth=0.0,
        goal="Gaussian < .06, mixture < .08",
        reached=all(ours[name] < goal for name, goal in GOALS.items()),
        seconds=mean_of(rows, f"mixture: SSGE, NestedLoRA, J = {JUDGED}", "seconds"),
    )
    finish("score", args, rows, headline, figure(args.first_seed, args.smoke))


if __name__ == "__main__":
    main()
