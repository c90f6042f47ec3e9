"""What is fitted to a trained model."""

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ella.evaluated import Evaluated
from ella.hyperparameters import Hyperparameters
from ella.inputs import Loader, labelled, unlabelled
from ella.likelihoods import Likelihood, as_likelihood
from ella.network import Network
from ella.predictions import Predictive

if TYPE_CHECKING:
    from typing_extensions import Self


class ModelChangedError(RuntimeError):
    """The weights of the model are no longer those that a method was fitted to."""


class Predictor(Predictive):
    """A method that is fitted to a trained model: one way to use ELLA and every baseline.

    Attributes:
        network: The private view of the user's model, which is never changed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood = "classification",
        noise_variance: float | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__(as_likelihood(likelihood, noise_variance), seed=seed, progress=progress)
        self.network = Network(model)
        self._fitted_to: tuple[str, torch.device] | None = None

    @abstractmethod
    def fit(self, train_loader: Loader) -> "Self":
        """Fit to the training data; calling it again starts again."""

    @property
    def model(self) -> nn.Module:
        """The user's model."""
        return self.network.model

    def evaluated(self, loader: Loader) -> Evaluated:
        """Compute once what prediction needs of a data set, to tune and to score it many times.

        Args:
            loader: Yields x or (x, y, ...); labels are not used.

        Returns:
            This method for inputs that are row numbers of the data set, tensors of integers.

        Raises:
            NotFittedError: Before `fit`.
            ModelChangedError: If the weights changed since.
        """
        self._require_fitted()
        inputs = self._progress_over(unlabelled(loader, self._device), "evaluate")
        parts = [self._evaluate(x) for x in inputs]
        return Evaluated(self, type(parts[0]).joined(parts))

    @property
    def _device(self) -> torch.device:
        return self.network.device

    def _check_first_batch(self, loader: Loader) -> None:
        """Fail on wrong labels before the long part, not after it."""
        x, y = next(iter(labelled(loader, self._device)))
        self.likelihood.check(y, self.network(x).shape[1])

    def _set_fitted(self, hyperparameters: Hyperparameters) -> None:
        """The last step of `fit`: from here on the model must stay as it is."""
        self.hyperparameters = hyperparameters
        self.tuning = self.link = None
        self._fitted_to = (self.network.fingerprint(), self.network.device)

    def _require_fitted(self) -> Hyperparameters:
        """The hyperparameters in use, if they still belong to the model.

        Raises:
            NotFittedError: Before `fit`.
            ModelChangedError: If the weights changed since, or moved to another device.
        """
        found = super()._require_fitted()
        name = type(self).__name__
        fingerprint, device = self.network.fingerprint(), self.network.device
        if self._fitted_to is not None and self._fitted_to[0] != fingerprint:
            raise ModelChangedError(
                f"The model's weights or modules changed after {name}.fit, so what was fitted no "
                f"longer describes it. Load the old weights, or call {name}.fit(train_loader)."
            )
        if self._fitted_to is not None and self._fitted_to[1] != device:
            raise ModelChangedError(
                f"The model moved from {self._fitted_to[1]} to {device} after {name}.fit. Move it "
                f"back, or call {name}.fit(train_loader) again."
            )
        return found

    def _initial_scale(self, loader: Loader) -> float:
        """The likelihood's scale from residuals, by a pass over the data if it needs one."""
        if self.likelihood.scale != "noise_variance":
            return 1.0
        total: Tensor | None = None
        for x, y in labelled(loader, self._device):
            outputs = self.network(x)
            y = self.likelihood.check(y, outputs.shape[1])
            part = self.likelihood.statistics(outputs, y)
            total = part if total is None else total + part
        return 1.0 if total is None else self.likelihood.initial_scale(total)

    def _started(self, prior_precision: float, scale: float) -> Hyperparameters:
        """The hyperparameters of a fresh fit."""
        return replace(Hyperparameters(prior_precision), **{self.likelihood.scale: scale})
