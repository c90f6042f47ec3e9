"""Sums over data, and the Gaussian posterior in the space of eigenfunctions that they make."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ella.likelihoods import Likelihood
from ella.predictive import Evaluation, LogitGaussian
from ella.processes import Processes
from ella.saving import State

if TYPE_CHECKING:
    from typing_extensions import Self


DISTANCE_POWER = 4
"""Of D(x) in the variance that it gives: see `Distance`."""
DOWNDATE_ROUNDING = 1e-6
"""Negative eigenvalues up to this share of the curvature are rounding of float32 features."""


@dataclass(frozen=True)
class TrainingSums:
    """Sums over data: plain sums, so batches, later data, and processes add up.

    They are those of unit dispersion: a noise variance is applied when they are used.

    Attributes:
        curvature: G = Σ φᵀΛφ, shape (k, k), float64.
        statistics: `Likelihood.statistics`, which give Σ log p(y | f), shape (s,), float64.
        prior_variance: Σ over examples of the mean over outputs of κ(x, x), the prior variance of
            an output at prior precision 1.
        num_examples: How many examples were seen.
    """

    curvature: Tensor
    statistics: Tensor
    prior_variance: float
    num_examples: int

    @classmethod
    def of(cls, prior: LogitGaussian, y: Tensor, likelihood: Likelihood) -> "TrainingSums":
        """The sums over one batch.

        Args:
            prior: Outputs f, φ and R of n examples.
            y: Targets that `Likelihood.check` has returned.
            likelihood: Gives Λ.
        """
        rows = likelihood.whitened(prior.mean, prior.factor.double())
        if (weights := likelihood.weights(y)) is not None:
            rows = rows * weights.sqrt()[:, None, None]
        rows = rows.flatten(0, 1)
        return cls(
            rows.T @ rows,
            likelihood.statistics(prior.mean, y),
            prior.variance().double().mean(-1).sum().item(),
            len(y),
        )

    def __add__(self, other: "TrainingSums") -> "TrainingSums":
        """The sums over both sets of data."""
        return TrainingSums(
            self.curvature + other.curvature,
            self.statistics + other.statistics,
            self.prior_variance + other.prior_variance,
            self.num_examples + other.num_examples,
        )

    def __sub__(self, other: "TrainingSums") -> "TrainingSums":
        """The sums without data that are in them.

        Raises:
            ValueError: If what is left is no sum over data.
        """
        left = self + other.scaled(-1)
        scale = self.curvature.diagonal().abs().max().item()
        lowest = torch.linalg.eigvalsh(left.curvature)[0].item() if len(left.curvature) else 0.0
        enough = left.num_examples > 0 and left.prior_variance > 0
        if not enough or lowest < -DOWNDATE_ROUNDING * scale:
            raise ValueError(
                f"Data to forget were never all in: without {other.num_examples} of "
                f"{self.num_examples} examples the smallest eigenvalue of the curvature is "
                f"{lowest:.3g}. At least one example has to stay; to start again, call `fit`."
            )
        return left

    @classmethod
    def over(
        cls, processes: Processes, own: "TrainingSums | None", device: torch.device
    ) -> "TrainingSums":
        """The sums over the data of all processes, of which this one may have none.

        Raises:
            ValueError: If no process has any.
        """
        shapes = processes.agreed(
            None if own is None else (own.curvature.shape, own.statistics.shape)
        )
        if own is None:
            empty, none = (torch.zeros(s, dtype=torch.float64, device=device) for s in shapes)
            own = cls(empty, none, 0.0, 0)
        counts = own.statistics.new_tensor([own.prior_variance, own.num_examples])
        prior_variance, num_examples = processes.sum(counts).tolist()
        curvature, statistics = processes.sum(own.curvature), processes.sum(own.statistics)
        return cls(curvature, statistics, prior_variance, round(num_examples))

    def scaled(self, factor: float) -> "TrainingSums":
        """The sums over `factor` times as many examples that are like these."""
        return TrainingSums(
            self.curvature * factor,
            self.statistics * factor,
            self.prior_variance * factor,
            round(self.num_examples * factor),
        )

    def unit_precision(self) -> float:
        """δ at which the prior standard deviation of an output is 1 on these data.

        Raises:
            ValueError: If there is none.
        """
        precision = self.prior_variance / self.num_examples
        if not 0 < precision < math.inf:
            raise ValueError(
                f"The variance that weights of unit variance give the outputs is {precision}, so "
                f"that no prior precision makes sense. Are the weights trained, and inputs scaled "
                f"as they were in training? Else pass `prior_precision`."
            )
        return precision

    def state(self) -> State:
        """What `restore` takes."""
        numbers = {"prior_variance": self.prior_variance, "num_examples": self.num_examples}
        return State({"curvature": self.curvature, "statistics": self.statistics}, numbers)

    @classmethod
    def restore(cls, state: State) -> "TrainingSums":
        """What `state` described.

        Raises:
            ValueError: If a part is missing, misshaped or not finite.
        """
        curvature = state.tensor("curvature", (None, None), torch.float64)
        if len(curvature) != curvature.shape[1]:
            raise ValueError(f"`curvature` must be square; got {tuple(curvature.shape)}.")
        check_semidefinite(curvature)
        statistics = state.tensor("statistics", (None,), torch.float64)
        variance = state.number("prior_variance")
        if not len(statistics) or variance < 0:
            raise ValueError("`statistics` must not be empty, nor `prior_variance` below 0.")
        return cls(curvature, statistics, variance, state.integer("num_examples"))


def check_semidefinite(curvature: Tensor) -> None:
    """Raise a `ValueError` unless a sum of φᵀΛφ can be such a matrix (k, k)."""
    rounding = DOWNDATE_ROUNDING * curvature.abs().max().item() if len(curvature) else 0.0
    if (curvature - curvature.T).abs().gt(rounding).any():
        raise ValueError("`curvature` must be symmetric")
    if len(curvature) and torch.linalg.eigvalsh(curvature)[0] < -rounding:
        raise ValueError("`curvature` must have no eigenvalue below 0")


@dataclass(frozen=True)
class GaussianPosterior:
    r"""The posterior of ELLA at any prior precision δ, from one eigendecomposition of G.

    With G = QΛQᵀ the covariance of the logits is

    .. math:: S(x) = φ(x) (G + δ I)^{-1} φ(x)^\top + R(x)/δ = ψ ψ^\top + R/δ,
              \qquad ψ = φ Q (Λ + δ)^{-1/2},

    where R is the prior variance outside the span of φ at δ = 1, as far as it is kept. Without R
    the covariance is at most (in the Loewner order) that of the dense linearized Laplace
    approximation: truncation under-reports the variance. With a dispersion s it is s·S at the
    precision s·δ.

    Attributes:
        eigenvalues: Λ, shape (k,), float64, not negative.
        eigenvectors: Q, shape (k, k), float64.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    _kept: dict[str, tuple[object, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_curvature(cls, matrix: Tensor) -> "GaussianPosterior":
        """Diagonalise G (k, k).

        Raises:
            ValueError: If G is not finite.
        """
        if not torch.isfinite(matrix).all():
            raise ValueError("The curvature matrix is not finite. Check the model's outputs.")
        values, vectors = torch.linalg.eigh(matrix.double())
        return cls(values.clamp_min(0), vectors)

    def condition(self, prior: LogitGaussian, prior_precision: float) -> LogitGaussian:
        """The Gaussian over the logits of n examples at δ, from the prior at δ = 1."""
        return prior.conditioned(self._whitening(prior_precision, prior.factor), prior_precision)

    def _whitening(self, prior_precision: float, like: Tensor) -> Tensor:
        """`whitening` in the dtype of a tensor; that of the last δ is kept: servers use one."""
        key = (prior_precision, like.dtype, like.device)
        kept = self._kept.get("whitening")
        if kept is None or kept[0] != key:
            kept = self._kept["whitening"] = (key, self.whitening(prior_precision).to(like))
        return kept[1]

    def whitening(self, prior_precision: float) -> Tensor:
        """Q(Λ + δ)^{-1/2}, shape (k, k), float64."""
        return self.eigenvectors / (self.eigenvalues + prior_precision).sqrt()

    def log_determinant_ratio(self, prior_precision: float) -> float:
        """Log det (G/δ + I): how much the data narrowed the posterior against the prior."""
        return torch.log1p(self.eigenvalues / prior_precision).sum().item()

    def log_marginal_likelihood(
        self,
        log_likelihood: float,
        squared_norm: float,
        prior_precision: float,
        dispersion: float = 1.0,
    ) -> float:
        r"""Laplace's estimate :math:`\log p(D|θ) - \frac{1}{2}(δ‖θ‖² + \log\det(G/sδ + I))`.

        Args:
            log_likelihood: Σ log p(y | f) over the training data.
            squared_norm: ‖θ‖² of the trained weights.
            prior_precision: δ.
            dispersion: s.
        """
        occam = self.log_determinant_ratio(prior_precision * dispersion)
        value = log_likelihood - 0.5 * (prior_precision * squared_norm + occam)
        return value if math.isfinite(value) else -math.inf


@dataclass(frozen=True)
class LaplaceEvaluation(Evaluation):
    """The prior at n inputs, and the posterior that conditions it.

    Attributes:
        prior: Outputs f, φ and R.
        posterior: See `GaussianPosterior`.
        distance: D(x) of the distance term, shape (n,); None without one.
        variances: Mean of diag κ(x, x), shape (n,), where `prior` holds no longer all outputs.
    """

    prior: LogitGaussian
    posterior: GaussianPosterior
    distance: Tensor | None = None
    variances: Tensor | None = None

    @property
    def logits(self) -> Tensor:  # type: ignore[override]
        """See `Evaluation`."""
        return self.prior.mean

    def rows(self, index: Tensor | slice) -> "Self":
        """See `Evaluation`."""
        parts = (self.distance, self.variances)
        of_rows = [None if part is None else part[index] for part in parts]
        return type(self)(self.prior.rows(index), self.posterior, *of_rows)

    @classmethod
    def joined(cls, parts: "Sequence[Self]") -> "Self":
        """See `Evaluation`."""
        priors = [part.prior for part in parts]
        distances = [part.distance for part in parts if part.distance is not None]
        variances = [part.variances for part in parts if part.variances is not None]
        return cls(
            type(priors[0]).joined(priors),
            parts[0].posterior,
            torch.cat(distances) if distances else None,
            torch.cat(variances) if variances else None,
        )

    def condensed(self, how: Callable[[LogitGaussian], LogitGaussian]) -> "LaplaceEvaluation":
        """See `Evaluation`: of the prior, which conditioning then leaves condensed."""
        found = how(self.prior)
        if found is self.prior:
            return self
        return replace(self, prior=found, variances=self.prior.variance().mean(-1))

    def prior_variance(self) -> float:
        """See `Evaluation`."""
        found = self.variances
        found = self.prior.variance() if found is None else found
        return found.double().mean().item()

    def gaussian(self, prior_precision: float) -> LogitGaussian:
        """See `Evaluation`."""
        found = self.posterior.condition(self.prior, prior_precision)
        if self.distance is None:
            return found
        return found.beside(self.distance**DISTANCE_POWER)
