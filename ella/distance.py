"""How far activations are from those of the training data: the variance that no kernel has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ella.activations import FeatureTaps, Tap
from ella.arguments import POSITIVE, SHARE, settle
from ella.inputs import Inputs
from ella.processes import Processes
from ella.saving import State
from ella.sketches import folded, random_signs

HIGHEST = 1e3
"""Distances count up to this: activations of nonsense may be of any size."""
WIDEST = 1024
"""Numbers of a stage; more are folded to as many by random signs."""


@dataclass(frozen=True)
class Distance:
    r"""Settings of the distance term: variance s·D(x)⁴ of each output, beside that of the weights.

    The tangent kernel is small on grey pictures and stops growing under strong noise: functions
    outside the tangent space have a prior, too. D is the mean over stages l of the Mahalanobis
    distance of activations to those of the training data,

    .. math:: D(x) = \mathrm{mean}_l (z_l − μ_l)^\top (C_l + ε I)^{-1} (z_l − μ_l) / \dim_l,

    z_l being what taps read at the end of a stage and before the last layer, in units of its
    standard deviations over the training data, C_l its correlations. D is 1 on average there, or
    less where activations span fewer dimensions. Its fourth power grows along rays away from the
    data, as the variance of the cubic residuals of Kristiadi et al. does, and what predicts stays
    a Gaussian over outputs. `calibrate` sets s by rule, as choosing it by clean validation data
    gives 0: s·D⁴ is `share` of the variance that the weights give, on average over validation
    data; 0 if their negative log-likelihood rises by more than its standard error.

    Where distance speaks of inputs that are far, the norm of the logits need not: with three
    classes or more, mean and covariance are divided by :math:`(‖f - \bar f‖/r)^a` and its square,
    r being the mean norm over validation data and a the one of `exponents` that gives them the
    best likelihood. Directions of logits rank errors better than their norms, which grow with
    whatever the network likes to see.

    Attributes:
        share: ρ.
        ridge: ε.
        exponents: Candidates of a; (0,) leaves the norms as they are.

    Raises:
        ValueError: If a number is not above 0, or an exponent not within 0 and 1.

    References: A Simple Unified Framework for Detecting Out-of-Distribution Samples (Lee et al.,
    2018), https://arxiv.org/abs/1807.03888; An Infinite-Feature Extension for Bayesian ReLU Nets
    That Fixes Their Asymptotic Overconfidence (Kristiadi et al., 2021),
    https://arxiv.org/abs/2010.02709; How to Fix a Broken Confidence Estimator (Cattelan & Silva,
    2024), https://arxiv.org/abs/2305.15508
    """

    share: float = 0.1
    ridge: float = 0.01
    exponents: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)

    def __post_init__(self) -> None:
        settle(self, share=POSITIVE, ridge=POSITIVE)
        given = self.exponents
        if not isinstance(given, (tuple, list)) or not given:
            raise ValueError(f"`exponents` must be some numbers from 0 to 1; got {given!r}.")
        object.__setattr__(self, "exponents", tuple(SHARE("exponents", each) for each in given))


@dataclass(frozen=True)
class ActivationSums:
    """Sums over data of the numbers of each stage; they add up as those of `TrainingSums` do.

    Attributes:
        count: n.
        totals: Of each stage Σz, shape (d,), float64.
        seconds: Of each stage Σzzᵀ, shape (d, d), float64.
    """

    count: float
    totals: tuple[Tensor, ...]
    seconds: tuple[Tensor, ...]

    @classmethod
    def of(cls, stages: Sequence[Tensor]) -> "ActivationSums":
        """Of one batch, each stage (n, d)."""
        wide = [stage.double() for stage in stages]
        totals, seconds = tuple(z.sum(0) for z in wide), tuple(z.T @ z for z in wide)
        return cls(len(stages[0]), totals, seconds)

    @property
    def numbers(self) -> int:
        """How many they are, and the means and matrices that are made of them."""
        return sum(total.numel() * (total.numel() + 1) for total in self.totals)

    def __add__(self, other: "ActivationSums") -> "ActivationSums":
        """Over both sets of data."""
        return ActivationSums(
            self.count + other.count,
            tuple(a + b for a, b in zip(self.totals, other.totals, strict=True)),
            tuple(a + b for a, b in zip(self.seconds, other.seconds, strict=True)),
        )

    def scaled(self, factor: float) -> "ActivationSums":
        """Over `factor` times as many examples that are like these."""
        return ActivationSums(
            self.count * factor,
            tuple(factor * total for total in self.totals),
            tuple(factor * second for second in self.seconds),
        )

    @classmethod
    def over(
        cls, processes: Processes, own: "ActivationSums | None", device: torch.device
    ) -> "ActivationSums":
        """Over the data of all processes, of which this one may have none."""
        widths = processes.agreed(None if own is None else [len(total) for total in own.totals])
        if own is None:
            zeros = [torch.zeros(d, dtype=torch.float64, device=device) for d in widths]
            own = cls(0, tuple(zeros), tuple(torch.outer(z, z) for z in zeros))
        count = processes.sum(torch.tensor(float(own.count), device=device).double())
        return cls(
            count.item(),
            tuple(map(processes.sum, own.totals)),
            tuple(map(processes.sum, own.seconds)),
        )

    def state(self) -> State:
        """What `restore` takes."""
        named = {f"total.{i}": total for i, total in enumerate(self.totals)}
        named |= {f"second.{i}": second for i, second in enumerate(self.seconds)}
        return State(named, {"count": self.count, "stages": len(self.totals)})

    @classmethod
    def restore(cls, state: State) -> "ActivationSums":
        """What `state` described.

        Raises:
            ValueError: If a part is missing, misshaped or not finite.
        """
        totals = tuple(
            state.tensor(f"total.{i}", (None,), torch.float64)
            for i in range(state.integer("stages", 1000))
        )
        seconds = tuple(
            state.tensor(f"second.{i}", (len(total), len(total)), torch.float64)
            for i, total in enumerate(totals)
        )
        return cls(state.number("count"), totals, seconds)


@dataclass(frozen=True)
class Stages:
    """Reads the numbers of each stage.

    Attributes:
        taps: Read the ends of stages, from a forward pass of their own.
        ridge: ε of the distance that is taken of them.
    """

    taps: FeatureTaps
    ridge: float
    _signs: dict[torch.device, Mapping[int, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __call__(self, x: Inputs) -> list[Tensor]:
        """Numbers of each stage at n inputs, (n, d)."""
        return self.split(self.taps(x)[1], self.taps.taps)

    def split(
        self,
        activations: Tensor,
        read: Sequence[Tap],
        signs: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """The same from activations (n, d) that were read by these taps, or more of them."""
        signs = self.signs(activations.device) if signs is None else signs
        place, end = {}, 0
        for tap in read:
            start, end = end, end + (tap.width or 0)
            place[tap] = slice(start, end)
        stages = (activations[:, place[tap]] for tap in self.taps.taps)
        return [
            z if z.shape[1] <= WIDEST else folded(z, signs[z.shape[1]], WIDEST) for z in stages
        ]

    def signs(self, device: torch.device) -> Mapping[int, Tensor]:
        """By the width of stages that are folded, the signs of their numbers."""
        if device not in self._signs:
            wide = {tap.width for tap in self.taps.taps if tap.width and tap.width > WIDEST}
            self._signs[device] = {d: random_signs(d, d, device) for d in wide}
        return self._signs[device]

    def among(self, read: Sequence[Tap]) -> bool:
        """Whether these taps read all of it."""
        return set(self.taps.taps) <= set(read) and all(tap.width for tap in read)


@dataclass(frozen=True)
class ActivationDistance:
    """D(x); see `Distance`.

    Attributes:
        sums: Over the training data.
        ridge: ε.
    """

    sums: ActivationSums
    ridge: float
    _kept: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = field(
        default_factory=dict, init=False, repr=False
    )

    @cached_property
    def roots(self) -> list[tuple[Tensor, Tensor]]:
        """Mean μ (d,) and W (d, d) with D = ‖(z − μ)W‖², of each stage, float64."""
        found = []
        for total, second in zip(self.sums.totals, self.sums.seconds, strict=True):
            mean = total / self.sums.count
            covariance = second / self.sums.count - torch.outer(mean, mean)
            variance = covariance.diagonal().clamp_min(0)
            # What never moved has no unit of its own: that of the others.
            fixed = variance <= 1e-12 * (mean.square() + variance.mean())
            usual = variance[~fixed].median() if (~fixed).any() else variance.new_ones(())
            units = torch.where(fixed, usual, variance).sqrt()
            correlation = covariance / torch.outer(units, units)
            correlation.diagonal()[fixed] = 1
            values, vectors = torch.linalg.eigh(correlation)
            root = vectors * (values.clamp_min(0) + self.ridge).rsqrt()
            found.append((mean, root / units.unsqueeze(1) / len(mean) ** 0.5))
        return found

    def __call__(self, stages: Sequence[Tensor]) -> Tensor:
        """D at n inputs from the numbers of each stage, shape (n,)."""
        like = stages[0]
        key = (like.dtype, like.device)
        if key not in self._kept:
            self._kept[key] = [(mean.to(like), root.to(like)) for mean, root in self.roots]
        return combined(stages, self._kept[key])


def combined(stages: Sequence[Tensor], roots: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """D from the numbers of each stage, and μ and W of each (`ActivationDistance.roots`)."""
    squares = [
        ((z - mean) @ root).square().sum(-1) for z, (mean, root) in zip(stages, roots, strict=True)
    ]
    return torch.stack(squares).mean(0).clamp_max(HIGHEST)
