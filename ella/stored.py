"""`Stored`: an estimator as one file."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ella.arguments import check_path
from ella.batches import Batches, Split
from ella.checkpoint import Checkpoint, batch_digest
from ella.distance import Distance
from ella.eigenfunctions import EigenfunctionMethod
from ella.fitted import Fit
from ella.formats import KINDS, given_or_saved, upgraded
from ella.hyperparameters import Hyperparameters, Tuning
from ella.likelihoods import Likelihood
from ella.linearize import Linearized
from ella.links import Link
from ella.network import Network
from ella.outputs import Output
from ella.predictions import NotFittedError
from ella.predictor import Predictor
from ella.saving import DAMAGE, Json, State, describe, read, rebuild, write
from ella.wrappers import clean

if TYPE_CHECKING:
    from typing_extensions import Self


NETWORKS = ("fitted.network", "fitted.residual.network")
"""Parts of a file that are the weights of networks."""


class Stored(Predictor):
    """What of an estimator is in a file: everything but the model.

    Attributes:
        eigenfunctions: The method that finds them.
        prior_precision: δ as it was asked for; None lets `fit` choose it.
        temperature: T as it was asked for.
        logit_temperature: τ as it was asked for.
        distance: Settings of the distance term; None for none.
    """

    eigenfunctions: EigenfunctionMethod
    prior_precision: float | None
    temperature: float
    logit_temperature: float
    distance: Distance | None
    _fit: Fit | None = None

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
        """Write a safetensors file: every stage, all settings and the model's fingerprint.

        The model itself is not in it. On any failure an old file stays as it was.

        Args:
            path: The file.
            dtype: torch.bfloat16 or torch.float16 stores the weight matrices of NeuralEF's
                networks in half precision, which `load` widens again: half the size, and
                probabilities that differ by what rounding does. None keeps all digits.

        Raises:
            ValueError: If `dtype` is another, or there is no network, as without `NeuralEF`.
            NotFittedError: Before `fit`.
            ModelChangedError: If the weights changed since: new weights do not belong to old
                eigenfunctions.
            OSError: If the file cannot be written.
            TypeError: If `path` is none.
        """
        self.network.refreshed_fingerprint()
        state = self._state()
        write(path, state if dtype is None else state.narrowed(NETWORKS, dtype))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        eigenfunctions: EigenfunctionMethod | None = None,
        likelihood: Likelihood | None = None,
        link: Link | None = None,
        output: Output = None,
        split: Split | None = None,
        progress: bool = True,
    ) -> "Self":
        """Read what `save` wrote, in this version or before. Nothing in the file is executed.

        Args:
            path: The file.
            model: The same trained model as when it was saved.
            eigenfunctions: Needed only if a custom network, objective or augmentation was used.
            likelihood: Needed only if it, as `link` and `output`, is not one of ella's.
            link: See `likelihood`.
            output: See `likelihood`, and the constructor.
            split: Needed only for unusual loaders; no file holds it.
            progress: Whether to show progress bars.

        Raises:
            ValueError: If the file is not from this library, is damaged, or belongs to another
                model.
        """
        network = Network(model)
        where = os.fspath(path)
        format_found, state = read(path)
        try:
            state = upgraded(state, network) if format_found == 1 else state
            fingerprint = state.text("fingerprint")
        except DAMAGE as error:
            raise ValueError(f"{where!r} is damaged: {error}.") from error
        if fingerprint != network.fingerprint():
            raise ValueError(
                f"{where!r} was saved for another model: names, classes, shapes or values of its "
                f"modules and weights differ. Load the weights it was fitted with first."
            )
        try:
            given: dict[str, Any] = {"likelihood": likelihood, "eigenfunctions": eigenfunctions}
            given |= {"link": link, "output": output}
            parts = {name: given_or_saved(state, name, value) for name, value in given.items()}
            ella = cls._configured(state, model, parts, progress, split)
            ella._restore(state.to(network.device), parts["link"])
        except DAMAGE as error:
            raise ValueError(f"{where!r} cannot be loaded: {error}.") from error
        return ella

    @classmethod
    def _configured(
        cls,
        state: State,
        model: nn.Module,
        parts: Mapping[str, Any],
        progress: bool,
        split: Split | None,
    ) -> "Self":
        """An object with the settings of the one that was saved."""
        options = state.part("options")
        precision = options.settings.get("prior_precision")
        constructor: Any = cls  # takes what the class below does
        found: Self = constructor(
            model,
            likelihood=parts["likelihood"],
            eigenfunctions=parts["eigenfunctions"],
            output=parts["output"],
            split=split,
            positions=options.settings.get("positions", cls.positions),
            prior_precision=None if precision is None else options.number("prior_precision"),
            distance=rebuild(state.settings.get("distance_term"), KINDS),
            temperature=options.number("temperature"),
            logit_temperature=options.number("logit_temperature"),
            seed=options.integer("seed", 2**63),
            memory_budget=options.integer("memory_budget"),
            progress=progress,
        )
        return found

    def _restore(self, state: State, link: Link | None) -> None:
        """Everything that was fitted and tuned."""
        settings = state.settings
        fit = Fit.restore(
            self.network,
            self.eigenfunctions,
            state,
            ridge=None if self.distance is None else self.distance.ridge,
            memory_budget=self.memory_budget,
        )
        chosen = rebuild(settings["hyperparameters"], KINDS)
        tuning = rebuild(settings["tuning"], KINDS)
        for value, kind in ((chosen, Hyperparameters), (tuning, Tuning), (link, Link)):
            if not (isinstance(value, kind) or (value is None and kind is not Hyperparameters)):
                raise ValueError(f"{value!r} is no {kind.__name__}")
        scale = chosen.scale(self.likelihood)
        self.likelihood.log_likelihood(fit.sums.statistics, scale)  # whether they are its own
        self._fit = fit
        self._set_fitted(chosen)
        self.tuning, self.link = tuning, link

    def _state(self) -> State:
        fit = self._fitted()
        options: dict[str, Json] = {
            "prior_precision": self.prior_precision,
            "temperature": self.temperature,
            "logit_temperature": self.logit_temperature,
            "seed": self.seed,
            "memory_budget": self.memory_budget,
            "positions": self.positions,
        }
        found = fit.state()
        settings: dict[str, Any] = {
            "fingerprint": self.network.fingerprint(),
            "trainable": [clean(name) for name in fit.trainable],
            "likelihood": describe(self.likelihood),
            "eigenfunctions": describe(self.eigenfunctions),
            "output": describe(self.network.output),
            "options": options,
            "hyperparameters": describe(self._require_fitted()),
            "tuning": describe(self.tuning),
            "link": describe(self.link),
            "distance_term": describe(self.distance),
        }
        return State(found.tensors, {**found.settings, **settings})

    def _checkpoint(
        self, folder: str | os.PathLike[str] | None, linearized: Linearized, batches: Batches
    ) -> Checkpoint:
        """That of a fit: of this model, these settings, this process's data."""
        if folder is None:
            return Checkpoint()
        check_path("checkpoint", folder)
        first, processes = batches.first(), batches.processes
        about: dict[str, Json] = {
            "model": self.network.fingerprint(),
            "trainable": list(linearized.trainable),
            "eigenfunctions": describe(self.eigenfunctions),
            "likelihood": describe(self.likelihood),
            "distance": describe(self.distance),
            "seed": self.seed,
            "positions": self.positions,
            "memory_budget": self.memory_budget,
            "first batch": None if first is None else batch_digest(*first),
            "processes": [processes.rank, processes.size],
        }
        place = Path(folder)
        return Checkpoint(place / str(processes.rank) if processes.size > 1 else place, about)

    def _fitted(self) -> Fit:
        self._require_fitted()
        if self._fit is None:
            raise NotFittedError("This ELLA is not fitted. Call ELLA.fit(train_loader) first.")
        return self._fit
