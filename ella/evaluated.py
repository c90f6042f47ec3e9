"""A method on one data set that it has gone through once."""

import torch
from torch import Tensor

from ella.inputs import Inputs
from ella.predictions import Predictive
from ella.predictive import Evaluation


class Evaluated(Predictive):
    """A fitted method on one data set, whose examples are named by their row numbers.

    It has hyperparameters of its own: `calibrate` does not change those of the method.

    Args:
        method: A fitted method.
        evaluation: What it computed of all inputs; see `Predictor.evaluated`.
    """

    def __init__(self, method: Predictive, evaluation: Evaluation) -> None:
        super().__init__(method.likelihood, seed=method.seed, progress=False)
        self.method = method
        self.evaluation = evaluation
        self.distance = method.distance
        self.hyperparameters = method.hyperparameters
        self.tuning, self.link = method.tuning, method.link

    def copied(self, like: "Predictive | None" = None) -> "Evaluated":
        """The same evaluation with its own hyperparameters, or with those of another method."""
        twin = Evaluated(self.method, self.evaluation)
        source = self.method if like is None else like
        twin.hyperparameters = source.hyperparameters
        twin.tuning, twin.link = source.tuning, source.link
        return twin

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.evaluation.logits)

    @property
    def state_bytes(self) -> int:
        """Those of the method."""
        return self.method.state_bytes

    def _evaluate(self, x: Inputs) -> Evaluation:
        if not isinstance(x, Tensor) or x.is_floating_point():
            raise TypeError("`x` must be row numbers of the evaluated data: a tensor of integers.")
        return self.evaluation.rows(x)

    @property
    def _device(self) -> torch.device:
        return self.evaluation.logits.device

    @property
    def _tunable(self) -> bool:
        return self.method._tunable

    def _precisions(self, evaluation: Evaluation, prior_variance: float) -> list[float]:
        return self.method._precisions(evaluation, prior_variance)
