"""What `ELLA.fit` makes, as one value."""

from collections.abc import Iterable
from dataclasses import dataclass

from ella.eigenfunctions import EigenfunctionMethod, Eigenfunctions
from ella.network import Network
from ella.posterior import GaussianPosterior, TrainingSums
from ella.saving import State


@dataclass(frozen=True)
class Fit:
    """Everything `fit` makes; replaced as a whole, so a failed call changes nothing.

    Attributes:
        eigenfunctions: φ and R.
        sums: Over the training data.
        posterior: What `sums.curvature` makes.
        trainable: Names of the weights that were linearized.
    """

    eigenfunctions: Eigenfunctions
    sums: TrainingSums
    posterior: GaussianPosterior
    trainable: tuple[str, ...]

    @classmethod
    def of(
        cls, eigenfunctions: Eigenfunctions, sums: TrainingSums, trainable: tuple[str, ...]
    ) -> "Fit":
        """With the posterior that follows."""
        posterior = GaussianPosterior.from_curvature(sums.curvature)
        return cls(eigenfunctions, sums, posterior, trainable)

    @classmethod
    def restore(
        cls, network: Network, method: EigenfunctionMethod, state: State, memory_budget: int
    ) -> "Fit":
        """From the parts "fitted" and "sums" of a file.

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
        sums = TrainingSums.restore(state.part("sums"))
        if len(sums.curvature) != found.rank:
            raise ValueError(
                f"its curvature is of rank {len(sums.curvature)}, its eigenfunctions {found.rank}"
            )
        return cls.of(found, sums, trainable)


def _difference(own: Iterable[str], fitted: Iterable[str]) -> str:
    """Some of the names that are in one of the two alone."""
    names = sorted(set(own) ^ set(fitted))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
