"""`ELLA`: the stages in order, from a trained model to calibrated predictions."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ella.eigenfunctions import EigenfunctionMethod, Eigenfunctions, NeuralEF
from ella.formats import KINDS, upgraded
from ella.hyperparameters import Hyperparameters, Tuning
from ella.inputs import Inputs, Loader, check_positive, labelled
from ella.likelihoods import Likelihood
from ella.linearize import DEFAULT_MEMORY_BUDGET, Linearized
from ella.network import Network
from ella.posterior import GaussianPosterior, LaplaceEvaluation, TrainingSums, accumulate
from ella.predictions import NotFittedError
from ella.predictive import Link, LogitGaussian
from ella.predictor import Predictor
from ella.saving import DAMAGE, Json, State, custom_names, describe, read, rebuild, write

if TYPE_CHECKING:
    from typing_extensions import Self


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


class ELLA(Predictor):
    r"""Accelerated linearized Laplace for any trained classifier or regressor.

    The posterior over the logits is N(f(x)/τ, S(x)/τ²) with

    .. math:: S = T [φ (G + δI)^{-1} φ^\top + R/δ], \qquad G = \sum_i φ(x_i)^\top Λ_i φ(x_i),

    φ(x) ∈ R^{c×k} being the leading eigenfunctions of the neural tangent kernel and R the prior
    variance outside their span. Without R ("none") the covariance under-reports that of the dense
    linearized Laplace approximation; with "exact" it is J(δI + VGVᵀ)⁻¹Jᵀ, never above the prior.

    Args:
        model: Trained `nn.Module` with outputs (n, c). It is not changed, and its weights are not
            copied. If they change after `fit`, predictions are refused (`ModelChangedError`).
        likelihood: "classification", "multilabel" or "binary", "regression", or a `Likelihood`.
        eigenfunctions: `NeuralEF`, `Nystrom` or `LastLayer`.
        prior_precision: δ. None lets `fit` choose it from the training data (`fit`).
        temperature: T, multiplies the posterior covariance.
        logit_temperature: τ, divides the logits.
        noise_variance: Shorthand for `likelihood=Normal(noise_variance)`.
        residual: Shorthand for the `residual` of `eigenfunctions`.
        seed: Seed of everything random; the same seed gives the same result.
        progress: Whether to show progress bars.
        memory_budget: Bytes that one Jacobian product may take (`Linearized`).

    Raises:
        TypeError: If `model` is not an `nn.Module`.
        ValueError: If an argument is out of range.

    Reference: Accelerated Linearized Laplace Approximation for Bayesian Deep Learning
    (Deng et al., 2022), https://arxiv.org/abs/2210.12642
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood = "classification",
        eigenfunctions: EigenfunctionMethod | None = None,
        prior_precision: float | None = None,
        temperature: float = 1.0,
        logit_temperature: float = 1.0,
        noise_variance: float | None = None,
        residual: str | None = None,
        seed: int = 0,
        progress: bool = True,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> None:
        super().__init__(
            model,
            likelihood=likelihood,
            noise_variance=noise_variance,
            seed=seed,
            progress=progress,
        )
        for name, value in (
            ("temperature", temperature),
            ("logit_temperature", logit_temperature),
            ("prior_precision", prior_precision),
        ):
            if value is not None:
                check_positive(name, value)
        method: Any = NeuralEF() if eigenfunctions is None else eigenfunctions
        method = method if residual is None else replace(method, residual=residual)
        self.eigenfunctions: EigenfunctionMethod = method
        self.prior_precision = prior_precision
        self.temperature = temperature
        self.logit_temperature = logit_temperature
        self.memory_budget = memory_budget
        self._fit: Fit | None = None

    @property
    def linearized(self) -> Linearized:
        """The model and its Jacobian, in the weights that were fitted or require a gradient.

        Raises:
            ValueError: If no parameter requires a gradient.
        """
        trainable = None if self._fit is None else self._fit.trainable
        return Linearized(self.network, memory_budget=self.memory_budget, trainable=trainable)

    def fit(self, train_loader: Loader) -> "Self":
        """Learn the eigenfunctions, then sum G over the training data. Starts again each time.

        A loader that shuffles or augments is fine: both passes take whatever it yields.

        With `prior_precision=None`, δ is set so that the prior standard deviation of a logit is 1
        on the training data: the prior then says that a logit may well be off by one, whatever
        the scale of the network. Marginal likelihood is *not* used, as it is known to pick
        precisions that ruin the predictive; `log_marginal_likelihood` is there for those who want
        it. Prefer `calibrate` wherever held-out labels exist.

        Args:
            train_loader: Yields (x, y, ...) or mappings; x a tensor, tuple or mapping. It is
                iterated over more than once.

        Raises:
            TypeError: If the loader, a batch or the labels have the wrong form.
            ValueError: If a value is bad, no parameter requires a gradient, or the data carry
                fewer than k directions.
        """
        linearized = Linearized(self.network, memory_budget=self.memory_budget)
        self._check_first_batch(train_loader)
        found = self.eigenfunctions.fit(
            linearized, train_loader, seed=self.seed, progress=self.progress
        )
        sums = self._sums(found, train_loader)
        fit = Fit.of(found, sums, linearized.trainable)
        precision = self.prior_precision
        if precision is None:
            precision = sums.prior_variance / sums.num_examples
        start = self._started(precision, self.likelihood.initial_scale(sums.statistics))
        if self.likelihood.scale == "logit_temperature":
            start = replace(start, logit_temperature=self.logit_temperature)
        self._set_fitted(replace(start, temperature=self.temperature))
        self._fit = fit
        return self

    def partial_fit(self, loader: Loader) -> "Self":
        """Add more data to G; eigenfunctions and hyperparameters stay.

        Raises:
            NotFittedError: Before `fit`.
            ModelChangedError: If the weights changed since.
        """
        fit = self._fitted()
        sums = fit.sums + self._sums(fit.eigenfunctions, loader)
        self._fit = Fit.of(fit.eigenfunctions, sums, fit.trainable)
        return self

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> float:
        """Laplace's estimate of log p(training data) at δ (default: the one in use), T = τ = 1.

        Raises:
            NotFittedError: Before `fit`.
        """
        fit, chosen = self._fitted(), self._require_fitted()
        if prior_precision is None:
            prior_precision = chosen.prior_precision
        noise = chosen.noise_variance
        squared_norm = self.linearized.flat_parameters().double().square().sum().item()
        return fit.posterior.log_marginal_likelihood(
            self.likelihood.log_likelihood(fit.sums.statistics, noise),
            squared_norm,
            prior_precision,
            self.likelihood.dispersion(noise),
        )

    def features(self, x: Inputs) -> LogitGaussian:
        """The method's narrow waist: the prior at δ = 1, with f(x) as mean, φ(x) as factor and R.

        Raises:
            NotFittedError: Before `fit`.
        """
        return self._fitted().eigenfunctions(x)

    @property
    def curvature(self) -> Tensor:
        """G at the noise variance in use, shape (k, k), float64."""
        noise = self._require_fitted().noise_variance
        return self._fitted().sums.curvature / self.likelihood.dispersion(noise)

    @property
    def state_bytes(self) -> int:
        """Bytes that prediction needs beyond the model: eigenfunctions and the k×k posterior."""
        fit = self._fitted()
        tensors = [fit.posterior.eigenvalues, fit.posterior.eigenvectors]
        tensors += fit.eigenfunctions.state().tensors.values()
        return sum(t.numel() * t.element_size() for t in tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: every stage, all settings and the model's fingerprint.

        The model itself is not in it. On any failure an old file stays as it was.

        Raises:
            NotFittedError: Before `fit`.
            ModelChangedError: If the weights changed since: new weights do not belong to old
                eigenfunctions.
            OSError: If the file cannot be written.
        """
        self.network.refreshed_fingerprint()
        write(path, self._state())

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        eigenfunctions: EigenfunctionMethod | None = None,
        likelihood: Likelihood | None = None,
        link: Link | None = None,
        progress: bool = True,
    ) -> "ELLA":
        """Read what `save` wrote, in this version or before. Nothing in the file is executed.

        Args:
            path: The file.
            model: The same trained model as when it was saved.
            eigenfunctions: Needed only if a custom network, objective or augmentation was used.
            likelihood: Needed only if it is not one of ella's.
            link: Needed only if `calibrate` was given one that is not ella's.
            progress: Whether to show progress bars.

        Raises:
            ValueError: If the file is not from this library, is damaged, or belongs to another
                model.
        """
        network = Network(model)
        where = os.fspath(path)
        format_found, state = read(path)
        try:
            if format_found == 1:
                state = upgraded(state, network)
            fingerprint = state.text("fingerprint")
        except DAMAGE as error:
            raise ValueError(f"{where!r} is damaged: {error}.") from error
        if fingerprint != network.fingerprint():
            raise ValueError(
                f"{where!r} was saved for another model: names, classes, shapes or values of its "
                f"modules and weights differ. Load the weights it was fitted with first."
            )
        try:
            given = {"likelihood": likelihood, "eigenfunctions": eigenfunctions, "link": link}
            parts = {name: _part(state, name, value) for name, value in given.items()}
            ella = cls._configured(state, model, parts, progress)
            ella._restore(state.to(network.device), parts["link"])
        except DAMAGE as error:
            raise ValueError(f"{where!r} cannot be loaded: {error}.") from error
        return ella

    @classmethod
    def _configured(
        cls, state: State, model: nn.Module, parts: Mapping[str, Any], progress: bool
    ) -> "ELLA":
        """An object with the settings of the one that was saved."""
        options = state.part("options")
        precision = options.settings.get("prior_precision")
        return cls(
            model,
            likelihood=parts["likelihood"],
            eigenfunctions=parts["eigenfunctions"],
            prior_precision=None if precision is None else options.number("prior_precision"),
            temperature=options.number("temperature"),
            logit_temperature=options.number("logit_temperature"),
            seed=options.integer("seed", 2**63),
            memory_budget=options.integer("memory_budget"),
            progress=progress,
        )

    def _restore(self, state: State, link: Link | None) -> None:
        """Everything that was fitted and tuned."""
        settings = state.settings
        trainable = tuple(str(name) for name in state.list("trainable"))
        own = self.network.trainable
        if own and set(own) != set(trainable):  # all frozen is how models are deployed
            raise ValueError(
                f"it was fitted with other trainable weights: {_difference(own, trainable)}. Set "
                f"requires_grad as it was"
            )
        found = self.eigenfunctions.restore(
            self.network,
            state.part("fitted"),
            trainable=trainable,
            memory_budget=self.memory_budget,
        )
        sums = TrainingSums.restore(state.part("sums"))
        if len(sums.curvature) != found.rank:
            raise ValueError(
                f"its curvature is of rank {len(sums.curvature)}, its eigenfunctions {found.rank}"
            )
        chosen = rebuild(settings["hyperparameters"], KINDS)
        tuning = rebuild(settings["tuning"], KINDS)
        for value, kind in ((chosen, Hyperparameters), (tuning, Tuning), (link, Link)):
            if not (isinstance(value, kind) or (value is None and kind is not Hyperparameters)):
                raise ValueError(f"{value!r} is no {kind.__name__}")
        self._fit = Fit.of(found, sums, trainable)
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
        }
        return State.joined(
            {"fitted": fit.eigenfunctions.state(), "sums": fit.sums.state()},
            fingerprint=self.network.fingerprint(),
            trainable=list(fit.trainable),
            likelihood=describe(self.likelihood),
            eigenfunctions=describe(self.eigenfunctions),
            options=options,
            hyperparameters=describe(self._require_fitted()),
            tuning=describe(self.tuning),
            link=describe(self.link),
        )

    def _evaluate(self, x: Inputs) -> LaplaceEvaluation:
        fit = self._fitted()
        return LaplaceEvaluation(fit.eigenfunctions(x), fit.posterior)

    def _sums(self, eigenfunctions: Eigenfunctions, loader: Loader) -> TrainingSums:
        pairs = self._progress_over(labelled(loader, self._device), "curvature")
        return accumulate(((eigenfunctions(x), y) for x, y in pairs), self.likelihood)

    def _fitted(self) -> Fit:
        self._require_fitted()
        if self._fit is None:
            raise NotFittedError("This ELLA is not fitted. Call ELLA.fit(train_loader) first.")
        return self._fit


def _part(state: State, name: str, given: object) -> Any:  # noqa: ANN401 - checked by its user
    """What the caller gives, or what a file says.

    Raises:
        ValueError: If the file cannot say it, and the caller does not.
    """
    description = state.settings[name]
    if given is not None:
        return given
    if found := custom_names(description, name):
        raise ValueError(
            f"it was made with a custom {' and a custom '.join(found)}, which no file holds. Pass "
            f"`{name}=` with the same object"
        )
    return rebuild(description, KINDS)


def _difference(own: Iterable[str], fitted: Iterable[str]) -> str:
    """Some of the names that are in one of the two alone."""
    names = sorted(set(own) ^ set(fitted))
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
