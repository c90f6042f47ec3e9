"""What every method offers once it has a Gaussian over outputs: calibrate, predict, score."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella.arguments import SEED
from ella.batches import Batches, Loader
from ella.calibrate import Search, precision_grid
from ella.distance import Distance
from ella.hyperparameters import Hyperparameters, NotFittedError, Tuning
from ella.inputs import (
    Collated,
    Inputs,
    as_inputs,
    check_inputs,
    check_iterable,
    is_array,
    num_examples,
    slices,
    take,
)
from ella.likelihoods import Discrete, Likelihood
from ella.links import DRAWS, Link, MonteCarlo, make_link
from ella.predictive import Evaluation, LogitGaussian
from ella.scores import Uncertainty

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class Predictive(ABC):
    """A Gaussian over the outputs at any inputs: what predicts, and what `calibrate` tunes.

    A method supplies `_evaluate` (what it must compute of the inputs, once); the rest follows.

    Attributes:
        likelihood: p(y | f).
        hyperparameters: In use now; None before `fit`.
        tuning: What the last `calibrate` found; None before it.
        link: With what `calibrate` tuned, and what predicts unless told otherwise; None before.
        distance: The distance term, of a method that has one.
        seed: Seed of everything random.
        progress: Whether to show progress bars.
    """

    def __init__(self, likelihood: Likelihood, *, seed: int = 0, progress: bool = True) -> None:
        self.likelihood = likelihood
        self.seed = SEED("seed", seed)
        self.progress = progress
        self.hyperparameters: Hyperparameters | None = None
        self.tuning: Tuning | None = None
        self.link: Link | None = None
        self.distance: Distance | None = None

    @abstractmethod
    def _evaluate(self, x: Inputs) -> Evaluation:
        """What prediction needs of n inputs, at any prior precision."""

    def _evaluate_at(self, x: Inputs, prior_precision: float) -> Evaluation:
        """The same, for a method that saves work by knowing δ (at unit dispersion)."""
        return self._evaluate(x)

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes that prediction needs beyond the model itself."""

    @property
    @abstractmethod
    def _device(self) -> torch.device:
        """Where inputs must be."""

    def calibrate(
        self,
        val_loader: Loader,
        *,
        link: str | Link = "mc",
        n_samples: int = 64,
        shifted: Loader | None = None,
    ) -> "Self":
        """Choose (δ, T, τ), or (δ, T, σ²) for regression, by validation likelihood × hyperprior.

        The inputs are evaluated once; the search (see `Search`) works on the cached result. The
        MAP and temperature scaling are inside it. The MAP itself stays as it is. The link and the
        number of draws are remembered: what was tuned is what predicts. A warning says what the
        validation data do not determine.

        Args:
            val_loader: Data that the classifier was **not** trained on; on training data it is
                over-confident, as if nothing were wrong. If none are left, randomly cropped
                training images are the published substitute.
            link: How outputs become predictions: "mc", "probit", "bridge" or a `Link`.
            n_samples: Draws for "mc".
            shifted: The same data, or others, as they may come in use: turned, noisy, cut. With a
                distance term a share of their likelihood counts, too; without one they do not.

        Raises:
            NotFittedError: Before `fit`.
            TypeError: If the loader or the labels have the wrong form.
            ValueError: If a batch or a label is bad, or the link has no meaning here.
        """
        fitted = self._require_fitted()
        if not self._tunable:
            return self
        count = DRAWS("n_samples", n_samples)
        chosen = self.likelihood.check_link(make_link(link, count, self.seed))
        tuning = self._searched(val_loader, chosen, fitted.noise_variance, shifted)
        self.hyperparameters, self.tuning, self.link = tuning.hyperparameters, tuning, chosen
        if tuning.edges:
            warnings.warn(tuning.warning, stacklevel=2)
        return self

    def _searched(
        self, val_loader: Loader, link: Link, noise_variance: float, shifted: Loader | None
    ) -> Tuning:
        """Evaluate validation data once, and search on the result."""
        evaluation, search = self._search(val_loader, link, noise_variance)
        variance = torch.tensor(evaluation.prior_variance(), dtype=torch.float64)
        precisions = self._precisions(evaluation, search.score.mean(variance.to(search.y.device)))
        term, other = self.distance, None
        if shifted is not None:
            self._labelled_batches(shifted)  # says if it is no loader
            if term is not None:
                _, other = self._search(shifted, link, noise_variance)
        tuning = search.run(precisions)
        if term is None:
            return tuning
        return search.with_distance(tuning, precisions, term.share, term.exponents, other)

    def _search(
        self, loader: Loader, link: Link, noise_variance: float
    ) -> tuple[Evaluation, Search]:
        """On one set of labelled data, of which this process may have a part, or none."""
        with self._labelled_batches(loader).named() as batches:
            found = self._evaluate_loader(batches, link)
            processes = batches.processes
        # Without data of its own a process computes along with one example that does not count.
        if found is None or processes.size > 1:
            first = processes.agreed(
                None if found is None else (found[0].rows(slice(1)), found[1][:1])
            )
        evaluation, y = first if found is None else found
        noise = self.likelihood.scale == "noise_variance"
        search = Search(
            evaluation.gaussian,
            self.likelihood,
            y,
            link,
            initial_scale=noise_variance if noise else 1.0,
            processes=processes,
            counts=found is not None,
        )
        if search.num_examples == 0:
            raise ValueError("No label of the validation data counts: all are ignored.")
        return evaluation, search

    def predict_proba(
        self,
        x: Inputs | Loader,
        *,
        n_samples: int | None = None,
        link: str | Link | None = None,
    ) -> Tensor:
        """Class probabilities, averaged over the posterior.

        Args:
            x: One batch (tensor, tuple or mapping of tensors) or a loader for a whole data set,
                whose labels, if any, are ignored.
            n_samples: Draws for "mc", which depend on the seed only, not on the batching; None
                takes those of `calibrate`, or 128.
            link: "mc" (exact in the limit), "probit" or "bridge" (both closed-form) or a `Link`;
                None takes that of `calibrate`, or "mc".

        Returns:
            Shape (n, c); rows sum to 1 (for `Bernoulli`, each entry is a probability of its own).

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If the inputs are bad, or the likelihood has no probabilities.
        """
        if not isinstance(self.likelihood, Discrete):
            raise ValueError(
                'predict_proba needs likelihood="classification". For regression use logits(x), '
                "the mean and covariance of the outputs, and hyperparameters.noise_variance."
            )
        return self._averages(x, self._chosen_link(link, n_samples))

    def predict(self, x: Inputs | Loader) -> Tensor:
        """The most probable class, shape (n,); for regression the mean output, shape (n, c)."""
        return self._averages(x, self._chosen_link(), self.likelihood.decide)

    def gaussian(self, x: Inputs | Loader) -> LogitGaussian:
        """The Gaussian over the outputs, in factors: never (n, c, c) unless asked.

        Every score and every link is a function of it. Of a model with an output for every
        position, n counts positions, example by example.
        """
        return LogitGaussian.joined(list(self._gaussians(x)))

    def logits(self, x: Inputs | Loader) -> tuple[Tensor, Tensor]:
        """Mean (n, c) and covariance (n, c, c) of the Gaussian over the logits (outputs).

        Of a model with an output for every position, n counts positions, example by example.
        """
        gaussian = self.gaussian(x)
        return gaussian.mean, gaussian.covariance()

    def sample_logits(self, x: Inputs | Loader, n_samples: int) -> Tensor:
        """Draws of the logits, shape (n_samples, n, c); each is one function over all inputs."""
        count = DRAWS("n_samples", n_samples)
        return torch.cat([g.sample(count, self.seed) for g in self._gaussians(x)], dim=1)

    def uncertainty(
        self,
        x: Inputs | Loader,
        *,
        n_samples: int | None = None,
        link: str | Link | None = None,
    ) -> Uncertainty:
        """Uncertainty scores of shape (n,), higher meaning less certain (see `Uncertainty`).

        Where `calibrate` found that the probabilities need no posterior (T = 0), the mutual
        information and the logit variance are those of the best one with T > 0.

        Args:
            x: See `predict_proba`.
            n_samples: See `predict_proba`.
            link: See `predict_proba`.
        """
        chosen, epistemic = self._require_fitted(), self._epistemic()
        found_link, scale = self._chosen_link(link, n_samples), chosen.scale(self.likelihood)

        def scores(inputs: Inputs) -> Uncertainty:
            evaluation = self._evaluate_at(inputs, epistemic.unit_precision(self.likelihood))
            wide = epistemic.gaussian(evaluation.gaussian, self.likelihood)
            used = wide
            if epistemic is not chosen:  # T = 0: the mean alone
                plain = replace(epistemic, logit_temperature=chosen.logit_temperature)
                mean = plain.gaussian(evaluation.gaussian, self.likelihood).mean
                used = LogitGaussian(mean, mean.new_zeros(*mean.shape, 0), None, wide.outside)
            found = self.likelihood.uncertainty(used, wide, found_link, scale)
            return replace(found, distance=evaluation.distance)

        parts = []
        for inputs in self._input_batches(x):
            found = Uncertainty.joined([scores(piece) for piece in self._pieces(inputs)])
            parts.append(found.each(partial(self._laid_out, inputs=inputs)))
        return Uncertainty.joined(parts)

    @property
    def _tunable(self) -> bool:
        return True

    def _precisions(self, evaluation: Evaluation, prior_variance: float) -> list[float]:
        """The grid of prior precisions; empty for a method without a posterior."""
        return precision_grid(prior_variance) if prior_variance > 0 else []

    def _epistemic(self) -> Hyperparameters:
        """The numbers in use, or the best with T > 0 where those have T = 0."""
        chosen = self._require_fitted()
        if chosen.temperature > 0 or self.tuning is None or self.tuning.posterior is None:
            return chosen
        return self.tuning.posterior

    def _chosen_link(self, link: str | Link | None = None, n_samples: int | None = None) -> Link:
        """What the caller asks for, else what `calibrate` used, else 128 draws."""
        tuned = self.link or MonteCarlo(128, self.seed)
        draws = tuned.num_samples if isinstance(tuned, MonteCarlo) else 128
        if link is not None:
            count = draws if n_samples is None else DRAWS("n_samples", n_samples)
            return self.likelihood.check_link(make_link(link, count, self.seed))
        if n_samples is not None and isinstance(tuned, MonteCarlo):
            return replace(tuned, num_samples=DRAWS("n_samples", n_samples))
        return self.likelihood.check_link(tuned)

    def _averages(
        self, x: Inputs | Loader, link: Link, then: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The response averaged over the posterior, shape (n, c), or what follows from it."""
        chosen = self._require_fitted()
        # No posterior: links only approximate.
        certain = chosen.temperature == 0 and chosen.distance_scale == 0
        likelihood, seen = self.likelihood, None if certain else link

        def average(gaussian: LogitGaussian) -> Tensor:
            if certain:
                return likelihood.response(gaussian.mean, -1)
            return likelihood.predictive(gaussian, link)

        found = []
        for inputs in self._input_batches(x):
            rows = _cat([average(each) for each in self._gaussians_of(inputs, chosen, seen)])
            found.append(self._laid_out(then(rows) if then else rows, inputs))
        return _cat(found)

    def _gaussians(self, x: Inputs | Loader) -> Iterator[LogitGaussian]:
        """The final Gaussian over the outputs, piece by piece."""
        chosen = self._require_fitted()
        for inputs in self._input_batches(x):
            yield from self._gaussians_of(inputs, chosen)

    def _gaussians_of(
        self, inputs: Inputs, chosen: Hyperparameters, link: Link | None = None
    ) -> Iterator[LogitGaussian]:
        """In full, or as much as a link has to see."""
        for piece in self._pieces(inputs):
            evaluation = self._evaluate_at(piece, chosen.unit_precision(self.likelihood))
            at = evaluation.gaussian if link is None else self._condensed(evaluation, link)
            yield chosen.gaussian(at, self.likelihood)

    def _condensed(self, evaluation: Evaluation, link: Link) -> Callable[[float], LogitGaussian]:
        how = partial(self.likelihood.condensed, link=link)
        return lambda precision: how(evaluation.condensed(how).gaussian(precision))

    def _batches(self, loader: Loader) -> Batches:
        """The batches of a loader, checked and moved."""
        return Batches(loader, self._device)

    def _labelled_batches(self, loader: Loader) -> Batches:
        """Of labelled data, of which a sample of positions may do."""
        return self._batches(loader)

    def _input_batches(self, x: Inputs | Loader) -> Iterator[Inputs]:
        """The user's batches: one, or those of a loader."""
        if isinstance(x, (Tensor, tuple, Mapping, Collated)) or is_array(x):
            yield self._admitted(x)
            return
        check_iterable(x)
        with self._batches(x).named() as batches:  # type: ignore[arg-type] # checked
            yield from self._progress_over(batches.inputs(), "predict")

    def _admitted(self, x: object) -> Inputs:
        """One batch, checked."""
        inputs = as_inputs(x, self._device)
        check_inputs(inputs, self._device)
        return inputs

    def _pieces(self, inputs: Inputs) -> Iterator[Inputs]:
        """As many rows at a time as prediction has memory for."""
        return self._cut(self._rows(inputs))

    def _cut(self, rows: Inputs) -> Iterator[Inputs]:
        n, size = num_examples(rows), self._piece_size(rows)
        return (take(rows, part) for part in slices(n, size)) if size < n else iter([rows])

    def _rows(self, inputs: Inputs) -> Inputs:
        """The inputs, or all positions of a model that has an output for each."""
        return inputs

    def _laid_out(self, values: Tensor, inputs: Inputs) -> Tensor:
        """Values of all rows with the axes of the model's outputs."""
        return values

    def _piece_size(self, rows: Inputs) -> int:
        """How many rows may be computed at once."""
        return num_examples(rows)

    def _look_at_validation(self, x: Inputs, *, first: bool) -> None:  # noqa: B027
        """Say if the batch is no validation data."""

    def _evaluate_loader(self, batches: Batches, link: Link) -> tuple[Evaluation, Tensor] | None:
        """Evaluations of a whole loader, joined, and its checked labels; None if it is empty."""
        parts: list[Evaluation] = []
        targets: list[Tensor] = []
        for x, y in self._progress_over(batches.labelled(), "evaluate"):
            self._look_at_validation(x, first=not parts)
            start = 0
            for piece in self._cut(x):
                found = self._evaluate(piece)
                if start == 0:
                    targets.append(self.likelihood.check(y, found.logits.shape[1]))
                own = targets[-1][start : start + len(found.logits)]
                start += len(own)
                parts.append(found.condensed(partial(self.likelihood.condensed, link=link, y=own)))
        return (type(parts[0]).joined(parts), torch.cat(targets)) if parts else None

    def _progress_over(self, items: Iterable[T], what: str) -> Iterable[T]:
        return tqdm(items, desc=what, disable=not self.progress, leave=False)

    def _require_fitted(self) -> Hyperparameters:
        if self.hyperparameters is None:
            name = type(self).__name__
            raise NotFittedError(
                f"This {name} is not fitted. Call {name}.fit(train_loader) first."
            )
        return self.hyperparameters


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
