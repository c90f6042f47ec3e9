"""The Gaussian posterior in the k-dimensional space of eigenfunctions."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ella.predictive import LogitGaussian


@dataclass(frozen=True)
class GaussianPosterior:
    r"""The posterior of ELLA at any prior precision δ, from one eigendecomposition of G.

    With G = QΛQᵀ the covariance of the logits is

    .. math:: S(x) = φ(x) (G + δ I)^{-1} φ(x)^\top + R(x)/δ = ψ ψ^\top + R/δ,
              \qquad ψ = φ Q (Λ + δ)^{-1/2},

    where R is the prior variance outside the span of φ at δ = 1, as far as it is kept. Without R
    the covariance is at most (in the Loewner order) that of the dense linearized Laplace
    approximation: truncation under-reports the variance.

    Attributes:
        eigenvalues: Λ, shape (k,), float64, not negative.
        eigenvectors: Q, shape (k, k), float64.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor

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

    def gaussian(
        self, logits: Tensor, phi: Tensor, residual: Tensor | None, prior_precision: float
    ) -> LogitGaussian:
        """The Gaussian over the logits of n examples.

        Args:
            logits: f, shape (n, c).
            phi: φ, shape (n, c, k).
            residual: R as variances (n, c), blocks (n, c, c) or None.
            prior_precision: δ.
        """
        # Rotated and scaled in float64, then one product in the model's dtype.
        whiten = self.eigenvectors / (self.eigenvalues + prior_precision).sqrt()
        outside = None if residual is None else residual / prior_precision
        return LogitGaussian(logits, phi @ whiten.to(phi), outside)

    def log_determinant_ratio(self, prior_precision: float) -> float:
        """Log det (G/δ + I): how much the data narrowed the posterior against the prior."""
        return torch.log1p(self.eigenvalues / prior_precision).sum().item()

    def log_marginal_likelihood(
        self, log_likelihood: float, squared_norm: float, prior_precision: float
    ) -> float:
        r"""Laplace's estimate :math:`\log p(D|θ) - \frac{1}{2}(δ‖θ‖² + \log\det(G/δ + I))`.

        Args:
            log_likelihood: Σ log p(y | f) over the training data.
            squared_norm: ‖θ‖² of the trained weights.
            prior_precision: δ.
        """
        penalty = prior_precision * squared_norm + self.log_determinant_ratio(prior_precision)
        value = log_likelihood - 0.5 * penalty
        return value if math.isfinite(value) else -math.inf
