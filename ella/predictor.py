"""What is fitted to a trained model."""

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ella.batches import Batches, Loader, Split, View
from ella.evaluated import Evaluated
from ella.hints import hint_about_model, hint_about_shards
from ella.hyperparameters import Hyperparameters
from ella.inputs import Inputs, Rows, moved, num_examples
from ella.likelihoods import Likelihood, as_likelihood
from ella.linearize import DEFAULT_MEMORY_BUDGET
from ella.network import Network
from ella.outputs import Output
from ella.positions import SampledRows
from ella.predictions import Predictive
from ella.processes import Processes

if TYPE_CHECKING:
    from typing_extensions import Self


UNSPLIT = 64
"""Batches of this many examples are taken as they are: whoever made them has the memory."""
DRAWS = 256
"""Numbers that a prediction keeps of one output: 128 draws, and what is made of them."""


class ModelChangedError(RuntimeError):
    """The weights of the model are no longer those that a method was fitted to."""


class Predictor(Predictive):
    """A method that is fitted to a trained model: one way to use ELLA and every baseline.

    Args:
        model: Maps x to outputs (n, c), or to something that holds them; with outputs for every
            position, (n, positions, c) or (n, c, height, width), it is fitted to a sample of
            positions and predicts all of them.
        likelihood: "classification", "multilabel" or "binary", "regression", or a `Likelihood`.
        noise_variance: Shorthand for `likelihood=Normal(noise_variance)`.
        output: Where the outputs are in what the model returns: a name, an index or a function;
            None is the obvious guess (`find_logits`).
        split: `batch` ↦ `(x, y)`, for loaders whose batches are unusual; None is `split_batch`.
        seed: Seed of everything random.
        progress: Whether to show progress bars.

    Attributes:
        network: The private view of the user's model, which is never changed.
        memory_budget: Bytes of working memory; prediction takes a sixteenth of it at a time.
        positions: Of outputs for every position, the most rows of one example that are looked at
            in `fit` and `calibrate`.
        process_group: Whose processes share labelled data; None for all, if there are several.
    """

    memory_budget: int = DEFAULT_MEMORY_BUDGET
    positions: int = 64
    process_group: object = None

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood = "classification",
        noise_variance: float | None = None,
        output: Output = None,
        split: Split | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__(as_likelihood(likelihood, noise_variance), seed=seed, progress=progress)
        if not (split is None or callable(split)):
            raise TypeError(
                f"`split` must be a function from a batch to (x, y); got {type(split).__name__}."
            )
        self.network = Network(model, output=output)
        self.split = split
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
        with self._batches(loader).named() as batches:
            inputs = self._progress_over(batches.inputs(), "evaluate")
            parts = [self._evaluate(piece) for x in inputs for piece in self._pieces(x)]
        return Evaluated(self, type(parts[0]).joined(parts))

    @property
    def _device(self) -> torch.device:
        return self.network.device

    def _batches(self, loader: Loader, view: View | None = None) -> Batches:
        return Batches(
            loader,
            self._device,
            dtype=self.network.input_dtype,
            split=self.split,
            view=view,
            processes=Processes(self.process_group),
        )

    def _labelled_batches(self, loader: Loader) -> Batches:
        return self._batches(loader, self._sampled_rows())

    def _sampled_rows(self) -> SampledRows:
        return SampledRows(self.network, self.likelihood, self.positions, self.seed)

    def _admitted(self, x: object) -> Inputs:
        return moved(super()._admitted(x), self._device, self.network.input_dtype)

    def _rows(self, inputs: Inputs) -> Inputs:
        layout = self.network.layout(inputs)
        return Rows.all_of(inputs, layout.num_positions) if layout.positions else inputs

    def _laid_out(self, values: Tensor, inputs: Inputs) -> Tensor:
        return self.network.layout(inputs).restored(values)

    def _piece_size(self, rows: Inputs) -> int:
        n = num_examples(rows)
        if n <= UNSPLIT and not isinstance(rows, Rows):
            return n
        return max(1, self.memory_budget // 16 // self._bytes_of_one(rows))

    def _bytes_of_one(self, rows: Inputs) -> int:
        """What prediction needs for one row beyond the inputs: draws, and what the model makes."""
        c = self.network.layout(rows).num_classes
        own = 0 if isinstance(rows, Rows) else self.network.working_bytes(rows)
        return self.network.wide.itemsize * c * DRAWS + own

    def _check_first_batch(self, batches: Batches) -> None:
        """Fail on wrong labels before the long part, not after it."""
        for x, y in batches.labelled():
            self.likelihood.check(y, self.network(x).shape[1])
            batches.end()
            hint_about_model(self.network, x, self.likelihood)
            break
        hint_about_shards(batches)

    def _set_fitted(self, hyperparameters: Hyperparameters, **others: object) -> None:
        """The last step of `fit`: from here on the model must stay as it is."""
        to = (self.network.fingerprint(), self.network.device)
        found = {"hyperparameters": hyperparameters, "tuning": None, "link": None}
        self._set(**found, _fitted_to=to, **others)

    def _set(self, **attributes: object) -> None:
        """All at once, so that an interrupt leaves the old state or the new one."""
        vars(self).update(attributes)

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

    def _initial_scale(self, batches: Batches) -> float:
        """The likelihood's scale from residuals, by a pass over the data if it needs one."""
        if self.likelihood.scale != "noise_variance":
            return 1.0
        total: Tensor | None = None
        for x, y in batches.labelled():
            outputs = self.network(x)
            y = self.likelihood.check(y, outputs.shape[1])
            part = self.likelihood.statistics(outputs, y)
            total = part if total is None else total + part
        shape = batches.processes.agreed(None if total is None else total.shape)
        if total is None:
            total = torch.zeros(shape, dtype=torch.float64, device=self._device)
        return self.likelihood.initial_scale(batches.processes.sum(total))

    def _started(self, prior_precision: float, scale: float) -> Hyperparameters:
        """The hyperparameters of a fresh fit."""
        return replace(Hyperparameters(prior_precision), **{self.likelihood.scale: scale})
