"""The Gaussian over the outputs of n inputs, and what methods compute to give it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

KEPT_NUMBERS = 2**17
"""Draws of up to this many numbers are kept for the next call: a server draws the same again."""

LEAST_NORM = 0.1
"""Norms of logits count from this share of the typical norm: nothing is divided by 0."""


@dataclass(frozen=True)
class LogitGaussian:
    r"""A Gaussian over the logits of n examples, :math:`N(m, F F^\top + D + v I)`, in factors.

    Sampling costs O(c·k) a draw and never forms the (c, c) covariance, so c = 1000 is no problem.
    Eigenfunctions give the *prior* at δ = 1 in this form: m = f(x), F = φ(x), D = R(x).

    Attributes:
        mean: m, shape (n, c).
        factor: F, shape (n, c, k). k may be 0.
        residual: D as variances, shape (n, c), as blocks, shape (n, c, c), or None for 0.
        outside: v, which no temperature scales, shape (n,), or None for 0.
    """

    mean: Tensor
    factor: Tensor
    residual: Tensor | None = None
    outside: Tensor | None = None

    def rows(self, index: Tensor | slice) -> "Self":
        """Some of the examples."""
        return self._each(lambda tensor: tensor[index])

    @classmethod
    def joined(cls, parts: Sequence["LogitGaussian"]) -> "LogitGaussian":
        """All examples of several Gaussians of one form."""
        residuals = [part.residual for part in parts if part.residual is not None]
        outside = [part.outside for part in parts if part.outside is not None]
        return cls(
            torch.cat([part.mean for part in parts]),
            torch.cat([part.factor for part in parts]),
            torch.cat(residuals) if residuals else None,
            torch.cat(outside) if outside else None,
        )

    def to(self, device: torch.device | str) -> "Self":
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, function: Callable[[Tensor], Tensor]) -> "Self":
        found = {name: None if t is None else function(t) for name, t in vars(self).items()}
        return replace(self, **found)  # type: ignore[arg-type] # None only where it may be

    def beside(self, outside: Tensor) -> "LogitGaussian":
        """With v, shape (n,)."""
        return replace(self, outside=outside)

    def widened(self, scale: float) -> "LogitGaussian":
        """With `outside` multiplied; 0 leaves it out."""
        if self.outside is None:
            return self
        return replace(self, outside=self.outside * scale if scale else None)

    def norm(self) -> Tensor:
        """Euclidean norm of the mean logits less their mean, shape (n,)."""
        return centred_norm(self.mean)

    def normalised(self, exponent: float, norm: float) -> "LogitGaussian":
        r"""`multiplied` by :math:`(r/‖m - \bar m‖)^a`: logits of a norm nearer to r.

        Args:
            exponent: a; 0 leaves everything as it is, 1 gives all examples one norm.
            norm: r. Below a tenth of it norms count as a tenth.
        """
        if exponent == 0:
            return self
        return self.multiplied((norm / self.norm().clamp_min(LEAST_NORM * norm)) ** exponent)

    def multiplied(self, gain: Tensor) -> "LogitGaussian":
        r"""The Gaussian :math:`N(g m, g^2 (F F^\top + D) + v I)`; g of shape (n,)."""
        gain = gain.unsqueeze(1)
        residual = self.residual
        if residual is not None:
            residual = residual * gain.square().view(-1, *[1] * (residual.ndim - 1))
        return replace(
            self,
            mean=self.mean * gain,
            factor=self.factor * gain.unsqueeze(2),
            residual=residual,
        )

    def settled(self) -> "LogitGaussian":
        """The same Gaussian with v as a part of D."""
        if self.outside is None:
            return self
        residual = self.outside.unsqueeze(1).expand_as(self.mean)
        if self.residual is not None and self.residual.ndim == 3:
            residual = self.residual + torch.diag_embed(residual)
        elif self.residual is not None:
            residual = self.residual + residual
        return LogitGaussian(self.mean, self.factor, residual)

    def variance(self) -> Tensor:
        """Marginal variances of the logits, shape (n, c)."""
        if self.outside is not None:
            return self.settled().variance()
        variance = self.factor.square().sum(-1)
        if self.residual is None:
            return variance
        full = self.residual.ndim == 3
        return variance + (self.residual.diagonal(dim1=1, dim2=2) if full else self.residual)

    def covariance(self) -> Tensor:
        """Covariances of the logits of each example, shape (n, c, c)."""
        if self.outside is not None:
            return self.settled().covariance()
        covariance = self.factor @ self.factor.mT
        if self.residual is None:
            return covariance
        if self.residual.ndim == 3:
            return covariance + self.residual
        covariance.diagonal(dim1=1, dim2=2).add_(self.residual)
        return covariance

    def conditioned(self, whitening: Tensor, prior_precision: float) -> "LogitGaussian":
        r"""The Gaussian :math:`N(m, F W W^\top F^\top + D/δ)`; W of shape (k, k)."""
        residual = None if self.residual is None else self.residual / prior_precision
        return LogitGaussian(self.mean, self.factor @ whitening, residual)

    def tempered(self, temperature: float, logit_temperature: float) -> "LogitGaussian":
        r"""The Gaussian :math:`N(m/τ, T (F F^\top + D)/τ^2 + v I)`, T and τ being arguments."""
        scale = math.sqrt(temperature) / logit_temperature
        residual = None if self.residual is None else self.residual * scale**2
        mean, factor = self.mean / logit_temperature, self.factor * scale
        return LogitGaussian(mean, factor, residual, self.outside)

    def compressed(self) -> "LogitGaussian":
        """The same Gaussian with a (c, c) factor and no residual, if that is smaller.

        What no temperature scales is left as it is.

        Draws in c dimensions instead of k + c can have exact second moments (`sample`), which
        makes averages over them far more accurate. For k ≤ c nothing is done, so that c = 1000
        never needs (c, c) matrices.
        """
        if self.outside is not None:
            return replace(replace(self, outside=None).compressed(), outside=self.outside)
        c, k = self.factor.shape[1:]
        if k < c or (k == c and self.residual is None):
            return self
        # Half precision has no Cholesky factorisation.
        wide = torch.promote_types(self.factor.dtype, torch.float32)
        covariance = self.covariance().to(wide)
        factor, info = torch.linalg.cholesky_ex(covariance)
        if info.any():
            diagonal = covariance.diagonal(dim1=1, dim2=2)
            tiny = torch.finfo(wide).tiny * 1e14
            diagonal += (1e-6 * diagonal.amax(-1, keepdim=True)).clamp_min_(tiny)
            factor, info = torch.linalg.cholesky_ex(covariance)
        if info.any():
            factor = _root(self.covariance().to(wide))
        return LogitGaussian(self.mean, factor.to(self.factor.dtype))

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draw logits, shape (num_samples, n, c).

        The standard normals are antithetic pairs (their mean is exactly 0), have the identity as
        their second moment if there are enough of them, and are shared by all examples: sample s
        is one posterior function evaluated at n inputs. They depend on `seed` alone, so the
        result does not change with how the data are batched.
        """
        return self.draws(num_samples, seed).transpose(1, 2)

    def draws(self, num_samples: int, seed: int = 0) -> Tensor:
        """See `sample`; shape (num_samples, c, n): with n last, responses are vectorised."""
        return self.deviations(num_samples, seed).add_(self.mean.T)

    def deviations(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draws minus their mean, shape (num_samples, c, n); see `sample`."""
        if self.outside is not None:
            return self.settled().compressed().deviations(num_samples, seed)
        n, c, k = self.factor.shape
        extra_dims = 0 if self.residual is None else c
        normals = standard_normals_like(self.factor, num_samples, k + extra_dims, seed)
        draws = (normals[:, :k] @ self.factor.permute(2, 1, 0).reshape(k, c * n)).view(-1, c, n)
        if self.residual is None:
            return draws
        root, extra = _root(self.residual), normals[:, k:]
        if root.ndim == 2:
            return draws.addcmul_(root.T, extra.unsqueeze(-1))
        return draws.add_(torch.einsum("ncd,sd->scn", root, extra))

    def drawn(self, num_samples: int, seed: int) -> Callable[[float, float], Tensor]:
        """(T, τ) ↦ draws (num_samples, c, n) of `tempered(T, τ)`, from the same normals.

        Those of T = τ = 1 are made once, then scaled, unless a part of the variance is not.
        """
        if self.outside is not None:
            return lambda t, scale: self.tempered(t, scale).draws(num_samples, seed)
        mean = self.mean.T
        deviations = self.compressed().deviations(num_samples, seed)
        return lambda t, scale: torch.add(mean / scale, deviations, alpha=math.sqrt(t) / scale)

    def spread(self, probs: Tensor) -> Tensor:
        """Probabilities of all classes from those of the logits; here they are the same."""
        return probs


def centred_norm(logits: Tensor) -> Tensor:
    """Euclidean norm of logits (n, c) less their mean, shape (n,)."""
    return torch.linalg.vector_norm(logits - logits.mean(-1, keepdim=True), dim=-1)


def standard_normals_like(like: Tensor, num_samples: int, dim: int, seed: int) -> Tensor:
    """Standard normals in the dtype and on the device of a tensor; not to be written into."""
    if num_samples * dim > KEPT_NUMBERS:
        return standard_normals(num_samples, dim, seed).to(like)
    return _kept_normals(num_samples, dim, seed, like.dtype, like.device)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _kept_normals(
    num_samples: int, dim: int, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    # In float64 on the CPU, so that one seed means the same draws on every device.
    return standard_normals(num_samples, dim, seed).to(device, dtype)


def standard_normals(num_samples: int, dim: int, seed: int) -> Tensor:
    """Antithetic pairs, whitened if there are more pairs than dimensions: (num_samples, dim)."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn((num_samples + 1) // 2, dim, generator=generator, dtype=torch.float64)
    if len(half) > dim > 0:
        cholesky = torch.linalg.cholesky(half.T @ half / len(half))
        half = torch.linalg.solve_triangular(cholesky, half.T, upper=False).T
    return torch.cat([half, -half])[:num_samples]


def _root(residual: Tensor) -> Tensor:
    """A matrix square root of the residual; clipped at 0, as rounding can leave it below."""
    if residual.ndim == 2:
        return residual.clamp_min(0).sqrt()
    values, vectors = torch.linalg.eigh(residual)
    return vectors * values.clamp_min(0).sqrt().unsqueeze(-2)


class Evaluation(ABC):
    """What a method computed of n inputs, once: it gives the posterior at any prior precision.

    Attributes:
        logits: f(x), shape (n, c).
    """

    logits: Tensor

    @abstractmethod
    def rows(self, index: Tensor | slice) -> "Self":
        """Some of the examples."""

    @classmethod
    @abstractmethod
    def joined(cls, parts: Sequence["Self"]) -> "Self":
        """All examples of several evaluations by the same method."""

    @abstractmethod
    def prior_variance(self) -> float:
        """Mean of diag κ(x, x), the prior variance of an output at δ = 1; 0 if there is none."""

    @property
    def distance(self) -> Tensor | None:
        """D(x) of the distance term, shape (n,); None without one."""
        return None

    def condensed(self, how: Callable[[LogitGaussian], LogitGaussian]) -> "Evaluation":
        """The same with less to keep, for those who pass its Gaussians through `how` anyway.

        Args:
            how: `Likelihood.condensed`, with its other arguments.
        """
        return self

    @abstractmethod
    def gaussian(self, prior_precision: float) -> LogitGaussian:
        """The Gaussian over the outputs at δ, with T = τ = 1 and unit dispersion."""
