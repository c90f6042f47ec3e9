"""What `ELLA.fit` makes, as one value."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ella.activations import FeatureTaps, restored_taps
from ella.distance import ActivationDistance, ActivationSums, Stages
from ella.eigenfunctions import EigenfunctionMethod, Eigenfunctions
from ella.eigenfunctions.neural_features import NeuralFeatures
from ella.inputs import Inputs
from ella.network import Network
from ella.posterior import GaussianPosterior, LaplaceEvaluation, TrainingSums
from ella.predictive import LogitGaussian
from ella.processes import Processes
from ella.saving import State


@dataclass(frozen=True)
class Features:
    """What forward passes give of n inputs.

    Attributes:
        eigenfunctions: φ and R.
        stages: Activations that distances are taken of; None for no distance.
    """

    eigenfunctions: Eigenfunctions
    stages: Stages | None = None

    def __call__(self, x: Inputs) -> tuple[LogitGaussian, list[Tensor] | None]:
        """The prior, and the numbers of each stage; in one pass where φ reads them anyway."""
        if self.stages is None:
            return self.eigenfunctions(x), None
        if self._in_one and isinstance(self.eigenfunctions, NeuralFeatures):
            prior, activations = self.eigenfunctions.read(x)
            return prior, self.stages.split(activations, self.eigenfunctions.taps.taps)
        return self.eigenfunctions(x), self.stages(x)

    @cached_property
    def _in_one(self) -> bool:
        found = self.eigenfunctions
        read = found.taps.taps if isinstance(found, NeuralFeatures) else []
        return self.stages is not None and self.stages.among(read)


@dataclass(frozen=True)
class Sums:
    """Everything that is summed over data.

    Attributes:
        training: G and what goes with it.
        activations: Of the stages; None for no distance.
    """

    training: TrainingSums
    activations: ActivationSums | None = None

    def __add__(self, other: "Sums") -> "Sums":
        """Over both sets of data."""
        return Sums(self.training + other.training, _added(self.activations, other.activations))

    def __sub__(self, other: "Sums") -> "Sums":
        """Without data that are in them; see `TrainingSums`."""
        gone = None if other.activations is None else other.activations.scaled(-1)
        return Sums(self.training - other.training, _added(self.activations, gone))

    def scaled(self, factor: float) -> "Sums":
        """Over `factor` times as many examples that are like these."""
        activations = self.activations
        scaled = None if activations is None else activations.scaled(factor)
        return Sums(self.training.scaled(factor), scaled)

    @classmethod
    def over(
        cls, processes: Processes, own: "Sums | None", stages: Stages | None, device: torch.device
    ) -> "Sums":
        """Over the data of all processes, of which this one may have none."""
        training = TrainingSums.over(processes, None if own is None else own.training, device)
        if stages is None:
            return cls(training)
        activations = None if own is None else own.activations
        return cls(training, ActivationSums.over(processes, activations, device))


def _added(one: ActivationSums | None, other: ActivationSums | None) -> ActivationSums | None:
    return None if one is None or other is None else one + other


@dataclass(frozen=True)
class Fit:
    """Everything `fit` makes; replaced as a whole, so a failed call changes nothing.

    Attributes:
        features: φ and R, and stages.
        all_sums: Over the training data.
        posterior: What G makes.
        distance: What sums over activations make; None for no distance.
        trainable: Names of the weights that were linearized.
    """

    features: Features
    all_sums: Sums
    posterior: GaussianPosterior
    distance: ActivationDistance | None
    trainable: tuple[str, ...]

    @classmethod
    def of(cls, features: Features, sums: Sums, trainable: tuple[str, ...]) -> "Fit":
        """With what follows from the sums."""
        posterior = GaussianPosterior.from_curvature(sums.training.curvature)
        stages, known, distance = features.stages, sums.activations, None
        if stages is not None and known is not None:
            distance = ActivationDistance(known, stages.ridge)
        return cls(features, sums, posterior, distance, trainable)

    def with_sums(self, sums: Sums) -> "Fit":
        """The same with other sums."""
        return Fit.of(self.features, sums, self.trainable)

    @property
    def eigenfunctions(self) -> Eigenfunctions:
        """Φ and R."""
        return self.features.eigenfunctions

    @property
    def sums(self) -> TrainingSums:
        """G and what goes with it."""
        return self.all_sums.training

    def evaluate(self, x: Inputs) -> LaplaceEvaluation:
        """What prediction needs of n inputs."""
        prior, stages = self.features(x)
        if self.distance is None or stages is None:
            return LaplaceEvaluation(prior, self.posterior)
        return LaplaceEvaluation(prior, self.posterior, self.distance(stages).to(prior.mean))

    def state(self) -> State:
        """The parts of a file; see `restore`."""
        parts = {"fitted": self.eigenfunctions.state(), "sums": self.sums.state()}
        stages, activations = self.features.stages, self.all_sums.activations
        if stages is not None and activations is not None:
            found = activations.state()
            taps = [asdict(tap) for tap in stages.taps.taps]
            parts["distance"] = replace(found, settings={**found.settings, "taps": taps})
        return State.joined(parts)

    @classmethod
    def restore(
        cls,
        network: Network,
        method: EigenfunctionMethod,
        state: State,
        *,
        ridge: float | None,
        memory_budget: int,
    ) -> "Fit":
        """From the parts "fitted", "sums" and, with a ridge, "distance" of a file.

        Raises:
            ValueError: If they do not fit the network, or each other.
        """
        trainable = network.named(str(name) for name in state.list("trainable"))
        own = network.trainable
        if own and set(own) != set(trainable):  # all frozen is how models are deployed
            raise ValueError(
                f"it was fitted with other trainable weights: {_difference(own, trainable)}. Set "
                f"requires_grad as it was"
            )
        found = method.restore(
            network, state.part("fitted"), trainable=trainable, memory_budget=memory_budget
        )
        sums = Sums(TrainingSums.restore(state.part("sums")))
        if len(sums.training.curvature) != found.rank:
            raise ValueError(
                f"its curvature is of rank {len(sums.training.curvature)}, its eigenfunctions "
                f"{found.rank}"
            )
        if ridge is None:
            return cls.of(Features(found), sums, trainable)
        part = state.part("distance")
        stages = Stages(FeatureTaps(network, restored_taps(part)), ridge)
        sums = replace(sums, activations=ActivationSums.restore(part))
        return cls.of(Features(found, stages), sums, trainable)


def _difference(own: Iterable[str], fitted: Iterable[str]) -> str:
    """Some of the names that are in one of the two alone."""
    names = sorted(set(own) ^ set(fitted))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
