"""The pass that sums over data, which can stop and go on."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from ella.checkpoint import Checkpoint, batch_digest
from ella.distance import ActivationSums
from ella.fitted import Features, Sums
from ella.inputs import Inputs, slices, take
from ella.likelihoods import Likelihood
from ella.posterior import TrainingSums
from ella.saving import State
from ella.seen import Seen

KEPT_EVERY = 20
"""Batches between two parts of a checkpoint."""
NAME = "sums"


@dataclass(frozen=True)
class Summing:
    r"""Sums :math:`G = \sum_i φ(x_i)^\top Λ_i φ(x_i)`, and what goes with it, over data.

    The order of the data and the split into batches do not matter, but for rounding.

    Reference: Accelerated Linearized Laplace Approximation for Bayesian Deep Learning
    (Deng et al., 2022), eq. 13, https://arxiv.org/abs/2210.12642

    Attributes:
        features: What is summed.
        likelihood: Gives Λ.
        piece_size: How many rows may be computed at once.
        checkpoint: Where finished parts are kept.
    """

    features: Features
    likelihood: Likelihood
    piece_size: Callable[[Inputs], int]
    checkpoint: Checkpoint

    def over(self, pairs: Iterable[tuple[Inputs, Tensor]], seen: Seen) -> Sums | None:
        """The sums over all batches, of which some may have been summed before; None if none came.

        Args:
            pairs: Batches.
            seen: Is told of every example.

        Raises:
            ValueError: If a batch is bad, or those that were summed before were others.
        """
        total, done, expected = self._before()
        digest, number = "", 0
        for number, (x, y) in enumerate(pairs, start=1):
            seen.note(x, y)
            if self.checkpoint.folder is not None:
                digest = batch_digest(x, y, digest)
            if number < done:
                continue
            if number == done:
                self._check(digest == expected)
                continue
            for part in self._parts(x, y):
                total = part if total is None else total + part
            if number % KEPT_EVERY == 0 and total is not None:
                self._keep(total, number, digest)
        self._check(number >= done)
        return total

    @staticmethod
    def _check(same: bool) -> None:
        if not same:
            raise ValueError(
                "The batches are not those that the checkpoint has summed. Shuffle with a seeded "
                "generator, or not at all; or remove the folder to start again."
            )

    def _parts(self, x: Inputs, y: Tensor) -> Iterator[Sums]:
        for part in slices(len(y), self.piece_size(x)):
            prior, stages = self.features(take(x, part))
            checked = self.likelihood.check(y[part], prior.mean.shape[1])
            activations = None if stages is None else ActivationSums.of(stages)
            yield Sums(TrainingSums.of(prior, checked, self.likelihood), activations)

    def _before(self) -> tuple[Sums | None, int, str]:
        """What was summed before, over how many batches, and their digest."""
        state = self.checkpoint.kept(NAME)
        if state is None:
            return None, 0, ""
        training = TrainingSums.restore(state.part("training"))
        activations = None
        if self.features.stages is not None:
            activations = ActivationSums.restore(state.part("activations"))
        return Sums(training, activations), state.integer("batches"), state.text("digest")

    def _keep(self, total: Sums, batches: int, digest: str) -> None:
        parts = {"training": total.training.state()}
        if total.activations is not None:
            parts["activations"] = total.activations.state()
        self.checkpoint.keep(NAME, State.joined(parts, batches=batches, digest=digest))
