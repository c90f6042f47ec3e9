"""The model itself, and the model with one number tuned: no posterior at all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ella.batches import Loader
from ella.inputs import Inputs
from ella.predictive import Evaluation, LogitGaussian
from ella.predictor import Predictor

if TYPE_CHECKING:
    from typing_extensions import Self


class _Deterministic(Predictor):
    """A Gaussian over logits with no variance."""

    def fit(self, train_loader: Loader) -> "Self":
        """Check the first batch and the model's outputs for it; nothing is learned but σ².

        Raises:
            TypeError: If the loader, the labels or the model's outputs have the wrong form.
            ValueError: If the first batch is bad, or, for regression, any batch.
        """
        with self._labelled_batches(train_loader).named() as batches:
            self._check_first_batch(batches)
            scale = self._initial_scale(batches)
        self._set_fitted(self._started(1.0, scale))
        return self

    @property
    def state_bytes(self) -> int:
        """Bytes beyond the model: 0."""
        return 0

    def _evaluate(self, x: Inputs) -> "_Outputs":
        return _Outputs(self.network(x))


@dataclass(frozen=True)
class _Outputs(Evaluation):
    """Logits alone, shape (n, c)."""

    logits: Tensor

    def rows(self, index: Tensor | slice) -> "_Outputs":
        return _Outputs(self.logits[index])

    @classmethod
    def joined(cls, parts: "Sequence[_Outputs]") -> "_Outputs":
        return cls(torch.cat([part.logits for part in parts]))

    def prior_variance(self) -> float:
        return 0.0

    def gaussian(self, prior_precision: float) -> LogitGaussian:
        return LogitGaussian(self.logits, self.logits.new_zeros(*self.logits.shape, 0))


class MAP(_Deterministic):
    """The trained model as it is: softmax of its logits, or N(f(x), σ²) for regression.

    It has nothing to choose: `calibrate` does nothing, and does not read its data.

    Args:
        model: Maps x to logits (n, c).
        likelihood: "classification", "multilabel" or "binary", "regression", or a `Likelihood`.
        noise_variance: σ² for regression; None takes the training residuals' mean square.
        output: See `Predictor`.
        split: See `Predictor`.
        seed: Not used; every method has one.
        progress: Whether to show progress bars.
    """

    @property
    def _tunable(self) -> bool:
        return False


class TemperatureScaling(_Deterministic):
    """softmax(f(x) / τ), with τ chosen by `calibrate`; until then τ = 1, the MAP.

    For regression it is N(f(x), σ²) with σ² chosen by `calibrate`.

    Reference: On Calibration of Modern Neural Networks (Guo et al., 2017),
    https://arxiv.org/abs/1706.04599

    Args:
        model: Maps x to logits (n, c).
        likelihood: "classification", "multilabel" or "binary", "regression", or a `Likelihood`.
        noise_variance: σ² until `calibrate`; None takes the training residuals' mean square.
        output: See `Predictor`.
        split: See `Predictor`.
        seed: Not used; every method has one.
        progress: Whether to show progress bars.
    """
