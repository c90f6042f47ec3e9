"""`ELLA`: the stages in order, from a trained model to calibrated predictions."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ella.curvature import (
    Curvature,
    Gaussian,
    Likelihood,
    Softmax,
    accumulate_curvature,
    noise_variance_of,
)
from ella.eigenfunctions import (
    EigenfunctionMethod,
    Eigenfunctions,
    Features,
    LastLayer,
    NeuralEF,
    Nystrom,
)
from ella.eigenfunctions.base import RESIDUALS
from ella.inputs import Inputs, batches, check_choice, check_positive
from ella.linearize import DEFAULT_MEMORY_BUDGET, Linearized
from ella.posterior import GaussianPosterior
from ella.predictive import LogitGaussian
from ella.predictor import Hyperparameters, Predictor

if TYPE_CHECKING:
    from typing_extensions import Self

FORMAT = 1
METHODS: dict[str, type[EigenfunctionMethod]] = {
    method.__name__: method for method in (NeuralEF, Nystrom, LastLayer)
}


@dataclass(frozen=True)
class _Fit:
    """Everything `fit` makes; replaced as a whole, so a failed call changes nothing."""

    eigenfunctions: Eigenfunctions
    curvature: Curvature
    posterior: GaussianPosterior


class ELLA(Predictor):
    r"""Accelerated linearized Laplace for any trained classifier or regressor.

    The posterior over the logits is N(f(x)/τ, S(x)/τ²) with

    .. math:: S = T [φ (G + δI)^{-1} φ^\top + R/δ], \qquad G = \sum_i φ(x_i)^\top Λ_i φ(x_i),

    φ(x) ∈ R^{c×k} being the leading eigenfunctions of the neural tangent kernel and R the prior
    variance outside their span. Without R ("none") the covariance under-reports that of the dense
    linearized Laplace approximation; with "exact" it is J(δI + VGVᵀ)⁻¹Jᵀ, never above the prior.

    Args:
        model: Trained `nn.Module` with outputs (n, c). It is not changed, and not copied.
        likelihood: "classification" or "regression".
        eigenfunctions: `NeuralEF`, `Nystrom` or `LastLayer`.
        prior_precision: δ. None lets `fit` choose it from the training data (`fit`).
        temperature: T, multiplies the posterior covariance.
        logit_temperature: τ, divides the logits.
        noise_variance: σ² for regression; None takes the training residuals' mean square.
        residual: "diag", "none" (the paper's), full c×c blocks as "exact" (Nystrom, LastLayer) or
            as a learned "factor" (NeuralEF).
        seed: Seed of everything random; the same seed gives the same result.
        progress: Whether to show progress bars.
        memory_budget: Bytes that one Jacobian product may take (`Linearized`).

    Raises:
        TypeError: If `model` is not an `nn.Module`.
        ValueError: If an argument is out of range, or the model has no trainable parameter.

    Reference: Accelerated Linearized Laplace Approximation for Bayesian Deep Learning
    (Deng et al., 2022), https://arxiv.org/abs/2210.12642
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str = "classification",
        eigenfunctions: EigenfunctionMethod | None = None,
        prior_precision: float | None = None,
        temperature: float = 1.0,
        logit_temperature: float = 1.0,
        noise_variance: float | None = None,
        residual: str = "diag",
        seed: int = 0,
        progress: bool = True,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
    ) -> None:
        super().__init__(model, likelihood=likelihood, seed=seed, progress=progress)
        check_choice("residual", residual, RESIDUALS)
        check_positive("temperature", temperature)
        check_positive("logit_temperature", logit_temperature)
        for name, value in (
            ("prior_precision", prior_precision),
            ("noise_variance", noise_variance),
        ):
            if value is not None:
                check_positive(name, value)
        self.eigenfunctions = NeuralEF() if eigenfunctions is None else eigenfunctions
        self.prior_precision = prior_precision
        self.temperature = temperature
        self.logit_temperature = logit_temperature
        self.noise_variance = noise_variance
        self.residual = residual
        self.linearized = Linearized(model, memory_budget=memory_budget)
        self._fit: _Fit | None = None

    def fit(self, train_loader: Iterable[Any]) -> "Self":
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
            ValueError: If a value is bad, or the data carry fewer than k directions.
        """
        self._check_first_batch(train_loader)
        fitted = self.eigenfunctions.fit(
            self.linearized,
            train_loader,
            residual=self.residual,
            seed=self.seed,
            progress=self.progress,
        )
        likelihood = self._likelihood(train_loader)
        curvature = self._curvature(fitted, train_loader, likelihood)
        posterior = GaussianPosterior.from_curvature(curvature.matrix)
        precision = self.prior_precision
        if precision is None:
            precision = curvature.prior_variance / curvature.num_examples
        self._fit = _Fit(fitted, curvature, posterior)
        self.hyperparameters = Hyperparameters(
            precision,
            self.temperature,
            self.logit_temperature,
            likelihood.noise_variance if isinstance(likelihood, Gaussian) else 1.0,
        )
        self.tuning = None
        return self

    def partial_fit(self, loader: Iterable[Any]) -> "Self":
        """Add more data to G; eigenfunctions and hyperparameters stay.

        Raises:
            NotFittedError: Before `fit`.
        """
        fit = self._fitted()
        likelihood = self._make_likelihood(self._require_fitted().noise_variance)
        curvature = fit.curvature + self._curvature(fit.eigenfunctions, loader, likelihood)
        posterior = GaussianPosterior.from_curvature(curvature.matrix)
        self._fit = _Fit(fit.eigenfunctions, curvature, posterior)
        return self

    def log_marginal_likelihood(self, prior_precision: float | None = None) -> float:
        """Laplace's estimate of log p(training data) at δ (default: the one in use), T = τ = 1.

        Raises:
            NotFittedError: Before `fit`.
        """
        fit = self._fitted()
        if prior_precision is None:
            prior_precision = self._require_fitted().prior_precision
        squared_norm = self.linearized.flat_parameters().double().square().sum().item()
        return fit.posterior.log_marginal_likelihood(
            fit.curvature.log_likelihood, squared_norm, prior_precision
        )

    def features(self, x: Inputs) -> Features:
        """Logits, φ(x) of shape (n, c, k) and the residual: the method's narrow waist.

        Raises:
            NotFittedError: Before `fit`.
        """
        return self._fitted().eigenfunctions(x)

    @property
    def curvature(self) -> Tensor:
        """G, shape (k, k), float64."""
        return self._fitted().curvature.matrix

    @property
    def state_bytes(self) -> int:
        """Bytes that prediction needs beyond the model: eigenfunctions and the k×k posterior."""
        fit = self._fitted()
        tensors = [fit.posterior.eigenvalues, fit.posterior.eigenvectors]
        tensors += fit.eigenfunctions.tensors().values()
        return sum(t.numel() * t.element_size() for t in tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file: eigenfunctions, G, settings and the model's fingerprint.

        The model itself is not in it.

        Raises:
            NotFittedError: Before `fit`.
        """
        fit = self._fitted()
        tensors = {f"eigenfunctions.{k}": v for k, v in fit.eigenfunctions.tensors().items()}
        tensors["curvature"] = fit.curvature.matrix
        settings = {
            "format": FORMAT,
            "fingerprint": fingerprint(self.model),
            "likelihood": self.likelihood,
            "residual": self.residual,
            "seed": self.seed,
            "method": type(self.eigenfunctions).__name__,
            "rank": getattr(self.eigenfunctions, "rank", None),
            "eigenfunctions": fit.eigenfunctions.settings(),
            "hyperparameters": asdict(self._require_fitted()),
            "sums": {
                "log_likelihood": fit.curvature.log_likelihood,
                "prior_variance": fit.curvature.prior_variance,
                "num_examples": fit.curvature.num_examples,
            },
        }
        contiguous = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
        save_file(contiguous, os.fspath(path), metadata={"ella": json.dumps(settings)})

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        *,
        eigenfunctions: EigenfunctionMethod | None = None,
        progress: bool = True,
    ) -> "ELLA":
        """Read what `save` wrote. Nothing in the file is executed.

        Args:
            path: The file.
            model: The same trained model as when it was saved.
            eigenfunctions: Needed only if a custom `network` was used.
            progress: Whether to show progress bars.

        Raises:
            ValueError: If the file is not from this library, or belongs to another model.
        """
        try:
            with safe_open(os.fspath(path), framework="pt") as file:
                metadata = (file.metadata() or {}).get("ella")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{os.fspath(path)!r} is no safetensors file: {error}.") from error
        settings = json.loads(metadata) if metadata else {}
        if settings.get("format") != FORMAT:
            raise ValueError(
                f"{os.fspath(path)!r} is no file that this version of ella can read "
                f"(format {settings.get('format')!r}, expected {FORMAT})."
            )
        if settings["fingerprint"] != fingerprint(model):
            raise ValueError(
                f"{os.fspath(path)!r} was saved for another model: names, shapes or values of its "
                f"weights differ. Load the weights it was fitted with first."
            )
        method = eigenfunctions or _default_method(settings)
        ella = cls(
            model,
            likelihood=settings["likelihood"],
            eigenfunctions=method,
            residual=settings["residual"],
            seed=settings["seed"],
            progress=progress,
        )
        device = ella.linearized.device
        prefix = "eigenfunctions."
        parts = {
            name.removeprefix(prefix): tensor.to(device)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        restored = method.restore(ella.linearized, parts, settings["eigenfunctions"])
        curvature = Curvature(tensors["curvature"].to(device), **settings["sums"])
        ella._fit = _Fit(restored, curvature, GaussianPosterior.from_curvature(curvature.matrix))
        ella.hyperparameters = Hyperparameters(**settings["hyperparameters"])
        return ella

    def _evaluate(self, x: Inputs) -> tuple[Tensor | None, ...]:
        return self._fitted().eigenfunctions(x)

    def _gaussian(
        self, evaluation: tuple[Tensor | None, ...], prior_precision: float
    ) -> LogitGaussian:
        logits, phi, residual = cast(Features, evaluation)
        return self._fitted().posterior.gaussian(logits, phi, residual, prior_precision)

    def _curvature(
        self, eigenfunctions: Eigenfunctions, loader: Iterable[Any], likelihood: Likelihood
    ) -> Curvature:
        pairs = self._progress_over(batches(loader, self._device), "curvature")
        return accumulate_curvature(
            ((eigenfunctions(x), cast(Tensor, y)) for x, y in pairs), likelihood
        )

    def _check_first_batch(self, loader: Iterable[Any]) -> None:
        """Fail on wrong labels before the long part, not after it."""
        x, y = next(batches(loader, self._device))
        num_outputs = self.linearized(x).shape[1]
        self._make_likelihood(1.0).check(cast(Tensor, y), num_outputs)

    def _make_likelihood(self, noise_variance: float) -> Likelihood:
        return Softmax() if self.likelihood == "classification" else Gaussian(noise_variance)

    def _likelihood(self, loader: Iterable[Any]) -> Likelihood:
        """The likelihood; for regression with σ² from the training residuals if not given."""
        if self.likelihood == "classification" or self.noise_variance is not None:
            return self._make_likelihood(self.noise_variance or 1.0)
        return Gaussian(noise_variance_of(self.linearized, loader, self._device))

    def _fitted(self) -> _Fit:
        self._require_fitted()
        return cast(_Fit, self._fit)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and values of the model's state."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def _default_method(settings: dict[str, Any]) -> EigenfunctionMethod:
    name, rank = settings["method"], settings["rank"]
    if name not in METHODS:
        raise ValueError(
            f"The file was made with eigenfunctions of type {name!r}, which is not ella's. Pass "
            f"`eigenfunctions=` with an object of that type."
        )
    method = METHODS[name]()
    return method if rank is None else replace(cast(Any, method), rank=rank)
