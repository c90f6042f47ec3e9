"""`Score`: how losses on validation data become one number."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ella.likelihoods import Likelihood
from ella.processes import Processes


@dataclass(frozen=True)
class Score:
    """How losses become one number, over the validation data of all processes.

    Attributes:
        num_examples: Examples that count.
        share: Weight of this process's mean in that of all.
        processes: Who has the others.
    """

    num_examples: int
    share: float
    processes: Processes

    @classmethod
    def of(
        cls, likelihood: Likelihood, y: Tensor, processes: Processes, *, counts: bool
    ) -> "Score":
        """For this process's checked targets, which may be there only to compute along."""
        weights = likelihood.weights(y)
        weight = len(y) if weights is None else weights.sum().item()
        own = torch.tensor([likelihood.num_counted(y), weight], dtype=torch.float64) * counts
        num_examples, total = processes.sum(own.to(y.device)).tolist()
        return cls(round(num_examples), own[1].item() / total if total else 0.0, processes)

    def mean(self, losses: Tensor) -> float:
        """Of losses that are weighted so that their mean over a process is its score."""
        if self.processes.size == 1:
            return losses.mean().item()
        return self.processes.sum(losses.double().mean() * self.share).item()
