"""What every method offers once it has a Gaussian over logits: calibrate, predict, score."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ella.calibrate import (
    ClassificationScore,
    RegressionScore,
    Score,
    Tuning,
    precision_grid,
    search,
)
from ella.inputs import (
    Inputs,
    NotFittedError,
    batches,
    check_choice,
    check_class_labels,
    check_inputs,
    check_real_targets,
)
from ella.predictive import LogitGaussian, Uncertainty, make_link, uncertainty

if TYPE_CHECKING:
    from typing_extensions import Self

LIKELIHOODS = ("classification", "regression")


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers that shape the predictive; set by the user, by `fit` or by `calibrate`.

    Attributes:
        prior_precision: δ = 1/σ₀², the precision of the Gaussian prior on every weight.
        temperature: T, multiplies the posterior covariance.
        logit_temperature: τ, divides the logits (classification).
        noise_variance: σ² of the Gaussian likelihood (regression).
    """

    prior_precision: float
    temperature: float = 1.0
    logit_temperature: float = 1.0
    noise_variance: float = 1.0


class Predictor(ABC):
    """A trained model with a Gaussian over its logits: one way to use ELLA and every baseline.

    A method supplies `_evaluate` (what it must compute of the inputs, once) and `_gaussian` (the
    Gaussian over logits at any prior precision, from that); the rest follows.

    Attributes:
        model: The user's model, never changed.
        hyperparameters: In use now; None before `fit`.
        tuning: What the last `calibrate` found; None before it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str = "classification",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        check_choice("likelihood", likelihood, LIKELIHOODS)
        self.model = model
        self.likelihood = likelihood
        self.seed = seed
        self.progress = progress
        self.hyperparameters: Hyperparameters | None = None
        self.tuning: Tuning | None = None

    @abstractmethod
    def fit(self, train_loader: Iterable[Any]) -> "Self":
        """Fit to the training data; calling it again starts again."""

    @abstractmethod
    def _evaluate(self, x: Inputs) -> tuple[Tensor | None, ...]:
        """What prediction needs of n inputs: logits (n, c) first; axis 0 is n throughout."""

    @abstractmethod
    def _gaussian(
        self, evaluation: tuple[Tensor | None, ...], prior_precision: float
    ) -> LogitGaussian:
        """The Gaussian over logits at prior precision δ, with T = τ = 1."""

    @property
    @abstractmethod
    def state_bytes(self) -> int:
        """Bytes that prediction needs beyond the model itself."""

    def calibrate(
        self, val_loader: Iterable[Any], *, link: str = "mc", n_samples: int = 64
    ) -> "Self":
        """Choose (δ, T, τ), or (δ, T, σ²) for regression, by validation NLL.

        The inputs are evaluated once; the search works on the cached result. MAP and temperature
        scaling are inside it, so on these data the result is never worse than either. A method
        that has nothing to choose, the MAP, stays as it is.

        Args:
            val_loader: Data that the classifier was **not** trained on; on training data it is
                over-confident and the search would learn that nothing is wrong. If none are left,
                randomly cropped training images are the published substitute.
            link: How logits become probabilities: "mc", "probit" or "bridge".
            n_samples: Draws for "mc".

        Raises:
            NotFittedError: Before `fit`.
            TypeError: If the loader or the labels have the wrong form.
            ValueError: If a batch or a label is bad.
        """
        fitted = self._require_fitted()
        if not self._tunable:
            return self
        evaluation, y = self._evaluate_loader(val_loader, labels=True)
        logits = cast(Tensor, evaluation[0])
        score: Score
        if self.likelihood == "classification":
            check_class_labels(y, logits.shape[1])
            score, initial = ClassificationScore(y, make_link(link, n_samples, self.seed)), 1.0
        else:
            score, initial = RegressionScore(check_real_targets(y, logits.shape[1])), 0.0
            initial = fitted.noise_variance
        tuning = search(
            lambda precision: self._gaussian(evaluation, precision),
            score,
            self._precisions(evaluation),
            initial_scale=initial,
        )
        if tuning.at_edge:
            warnings.warn(
                f"calibrate: the best prior precision, {tuning.prior_precision:.3g}, lies at the "
                f"edge of the searched range. More validation data than {tuning.num_examples} "
                f"examples may settle it.",
                stacklevel=2,
            )
        scale = "logit_temperature" if self.likelihood == "classification" else "noise_variance"
        self.hyperparameters = replace(
            fitted,
            prior_precision=tuning.prior_precision,
            temperature=tuning.temperature,
            **{scale: tuning.scale},
        )
        self.tuning = tuning
        return self

    def evaluated(self, loader: Iterable[Any]) -> "Evaluated":
        """Compute once what prediction needs of a data set, to tune and to score it many times.

        Args:
            loader: Yields (x, y, ...); the labels are not used.

        Returns:
            This method for inputs that are row numbers of the data set, tensors of integers.

        Raises:
            NotFittedError: Before `fit`.
        """
        self._require_fitted()
        return Evaluated(self, self._evaluate_loader(loader, labels=True)[0])

    def predict_proba(
        self, x: Inputs | Iterable[Any], *, n_samples: int = 128, link: str = "mc"
    ) -> Tensor:
        """Class probabilities, averaged over the posterior.

        Args:
            x: One batch (tensor, tuple or mapping of tensors) or a loader for a whole data set,
                whose labels, if any, are ignored.
            n_samples: Draws for "mc". They depend on the seed only, not on the batching.
            link: "mc" (exact in the limit), "probit" or "bridge" (both closed-form).

        Returns:
            Shape (n, c); rows sum to 1.

        Raises:
            NotFittedError: Before `fit`.
            ValueError: If the inputs are bad, or the likelihood is not classification.
        """
        if self.likelihood != "classification":
            raise ValueError(
                'predict_proba needs likelihood="classification". For regression use logits(x), '
                "the mean and covariance of the outputs, and hyperparameters.noise_variance."
            )
        to_probabilities = make_link(link, n_samples, self.seed)
        if self._require_fitted().temperature == 0:  # no posterior: links only approximate softmax
            return torch.cat([gaussian.mean.softmax(-1) for gaussian in self._gaussians(x)])
        return torch.cat([to_probabilities(gaussian) for gaussian in self._gaussians(x)])

    def predict(self, x: Inputs | Iterable[Any]) -> Tensor:
        """The most probable class, shape (n,); for regression the mean output, shape (n, c)."""
        if self.likelihood == "classification":
            return self.predict_proba(x).argmax(-1)
        return torch.cat([gaussian.mean for gaussian in self._gaussians(x)])

    def logits(self, x: Inputs | Iterable[Any]) -> tuple[Tensor, Tensor]:
        """Mean (n, c) and covariance (n, c, c) of the Gaussian over the logits (outputs)."""
        parts = list(self._gaussians(x))
        return torch.cat([g.mean for g in parts]), torch.cat([g.covariance() for g in parts])

    def sample_logits(self, x: Inputs | Iterable[Any], n_samples: int) -> Tensor:
        """Draws of the logits, shape (n_samples, n, c); each is one function over all inputs."""
        return torch.cat([g.sample(n_samples, self.seed) for g in self._gaussians(x)], dim=1)

    def uncertainty(self, x: Inputs | Iterable[Any], *, n_samples: int = 128) -> Uncertainty:
        """Uncertainty scores of shape (n,), higher meaning less certain (see `Uncertainty`)."""
        parts = [uncertainty(g, n_samples, self.seed) for g in self._gaussians(x)]
        names = [field.name for field in fields(Uncertainty)]
        return Uncertainty(*(torch.cat([getattr(p, name) for p in parts]) for name in names))

    @property
    def _tunable(self) -> bool:
        """Whether there is anything to choose."""
        return True

    def _precisions(self, evaluation: tuple[Tensor | None, ...]) -> list[float]:
        """The grid of prior precisions; as δ → ∞ the posterior variance is the prior's, κ/δ."""
        large = 1e12
        return precision_grid(
            self._gaussian(evaluation, large).variance().double().mean().item() * large
        )

    def _gaussians(self, x: Inputs | Iterable[Any]) -> Iterable[LogitGaussian]:
        """The final Gaussian over logits, batch by batch."""
        chosen = self._require_fitted()
        for inputs in self._input_batches(x):
            gaussian = self._gaussian(self._evaluate(inputs), chosen.prior_precision)
            yield gaussian.tempered(chosen.temperature, chosen.logit_temperature)

    def _input_batches(self, x: Inputs | Iterable[Any]) -> Iterable[Inputs]:
        if isinstance(x, (Tensor, tuple, Mapping)):
            check_inputs(x, self._device)
            yield x
        else:
            for inputs, _ in self._progress_over(
                batches(x, self._device, labels=False), "predict"
            ):
                yield inputs

    def _evaluate_loader(
        self, loader: Iterable[Any], *, labels: bool
    ) -> tuple[tuple[Tensor | None, ...], Tensor]:
        """Evaluations of a whole loader, concatenated, and its labels."""
        parts, targets = [], []
        for x, y in self._progress_over(batches(loader, self._device, labels=labels), "evaluate"):
            parts.append(self._evaluate(x))
            targets.append(cast(Tensor, y))
        columns = zip(*parts, strict=True)
        joined = tuple(None if col[0] is None else torch.cat(cast(Any, col)) for col in columns)
        return joined, torch.cat(targets)

    def _progress_over(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        return tqdm(items, desc=what, disable=not self.progress, leave=False)

    def _require_fitted(self) -> Hyperparameters:
        if self.hyperparameters is None:
            name = type(self).__name__
            raise NotFittedError(
                f"This {name} is not fitted. Call {name}.fit(train_loader) first."
            )
        return self.hyperparameters

    @property
    def _device(self) -> torch.device:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return tensors[0].device if tensors else torch.device("cpu")


class Evaluated(Predictor):
    """A fitted method on one data set, whose examples are named by their row numbers.

    It has hyperparameters of its own: `calibrate` does not change those of the method.

    Args:
        method: A fitted method.
        evaluation: What it computed of all inputs; see `Predictor.evaluated`.
    """

    def __init__(self, method: Predictor, evaluation: tuple[Tensor | None, ...]) -> None:
        super().__init__(
            method.model, likelihood=method.likelihood, seed=method.seed, progress=False
        )
        self.method = method
        self.hyperparameters = method.hyperparameters
        self._evaluation = evaluation

    def __len__(self) -> int:
        """Number of examples."""
        return len(cast(Tensor, self._evaluation[0]))

    def fit(self, train_loader: Iterable[Any]) -> "Self":
        """Refuse: it is fitted.

        Raises:
            TypeError: Always.
        """
        raise TypeError("An evaluated method is fitted. Fit the method that it was made from.")

    @property
    def state_bytes(self) -> int:
        """Those of the method."""
        return self.method.state_bytes

    def _evaluate(self, x: Inputs) -> tuple[Tensor | None, ...]:
        if not isinstance(x, Tensor) or x.is_floating_point():
            raise TypeError("`x` must be row numbers of the evaluated data: a tensor of integers.")
        return tuple(None if part is None else part[x] for part in self._evaluation)

    def _gaussian(
        self, evaluation: tuple[Tensor | None, ...], prior_precision: float
    ) -> LogitGaussian:
        return self.method._gaussian(evaluation, prior_precision)

    @property
    def _tunable(self) -> bool:
        return self.method._tunable

    def _precisions(self, evaluation: tuple[Tensor | None, ...]) -> list[float]:
        return self.method._precisions(evaluation)
