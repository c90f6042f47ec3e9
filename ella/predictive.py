"""From a Gaussian over logits to probabilities and uncertainty scores."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class LogitGaussian:
    r"""A Gaussian over the logits of n examples, :math:`N(m, F F^\top + D)`, kept in factors.

    Sampling costs O(c·k) a draw and never forms the (c, c) covariance, so c = 1000 is no problem.

    Attributes:
        mean: m, shape (n, c).
        factor: F, shape (n, c, k). k may be 0.
        residual: D as variances, shape (n, c), as blocks, shape (n, c, c), or None for 0.
    """

    mean: Tensor
    factor: Tensor
    residual: Tensor | None = None

    def variance(self) -> Tensor:
        """Marginal variances of the logits, shape (n, c)."""
        variance = self.factor.square().sum(-1)
        if self.residual is None:
            return variance
        full = self.residual.ndim == 3
        return variance + (self.residual.diagonal(dim1=1, dim2=2) if full else self.residual)

    def covariance(self) -> Tensor:
        """Covariances of the logits of each example, shape (n, c, c)."""
        covariance = self.factor @ self.factor.mT
        if self.residual is None:
            return covariance
        return covariance + (
            self.residual if self.residual.ndim == 3 else torch.diag_embed(self.residual)
        )

    def tempered(self, temperature: float, logit_temperature: float) -> "LogitGaussian":
        r"""The Gaussian :math:`N(m/τ, T (F F^\top + D)/τ^2)`, T and τ being the arguments."""
        scale = math.sqrt(temperature) / logit_temperature
        residual = None if self.residual is None else self.residual * scale**2
        return replace(
            self, mean=self.mean / logit_temperature, factor=self.factor * scale, residual=residual
        )

    def compressed(self) -> "LogitGaussian":
        """The same Gaussian with a (c, c) factor and no residual, if that is smaller.

        Draws in c dimensions instead of k + c can have exact second moments (`sample`), which
        makes averages over them far more accurate. For k ≤ c nothing is done, so that c = 1000
        never needs (c, c) matrices.
        """
        c, k = self.factor.shape[1:]
        if k < c or (k == c and self.residual is None):
            return self
        # Half precision has no Cholesky factorisation.
        wide = torch.promote_types(self.factor.dtype, torch.float32)
        covariance = self.covariance().to(wide)
        scale = covariance.diagonal(dim1=1, dim2=2).amax(-1)[:, None, None]
        jitter = 1e-6 * scale.clamp_min(torch.finfo(scale.dtype).tiny * 1e8)
        eye = torch.eye(c, dtype=scale.dtype, device=scale.device)
        factor, info = torch.linalg.cholesky_ex(covariance + jitter * eye)
        if info.any():
            factor = _root(covariance)
        return LogitGaussian(self.mean, factor.to(self.factor.dtype))

    def sample(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draw logits, shape (num_samples, n, c).

        The standard normals are antithetic pairs (their mean is exactly 0), have the identity as
        their second moment if there are enough of them, and are shared by all examples: sample s
        is one posterior function evaluated at n inputs. They depend on `seed` alone, so the
        result does not change with how the data are batched.
        """
        return self._draws(num_samples, seed).transpose(1, 2)

    def probabilities(self, num_samples: int, seed: int = 0) -> Tensor:
        """Softmax of draws, shape (num_samples, c, n): with n last, the softmax is vectorised."""
        return self._draws(num_samples, seed).softmax(1)

    def _draws(self, num_samples: int, seed: int) -> Tensor:
        """See `sample`; shape (num_samples, c, n)."""
        return self.deviations(num_samples, seed).add_(self.mean.T)

    def deviations(self, num_samples: int, seed: int = 0) -> Tensor:
        """Draws minus their mean, shape (num_samples, c, n); see `sample`."""
        n, c, k = self.factor.shape
        # In float64 on the CPU, so that one seed means the same draws on every device.
        extra_dims = 0 if self.residual is None else c
        normals = _standard_normals(num_samples, k + extra_dims, seed).to(self.factor)
        draws = (normals[:, :k] @ self.factor.permute(2, 1, 0).reshape(k, c * n)).view(-1, c, n)
        if self.residual is None:
            return draws
        root, extra = _root(self.residual), normals[:, k:]
        if root.ndim == 2:
            return draws.addcmul_(root.T, extra.unsqueeze(-1))
        return draws.add_(torch.einsum("ncd,sd->scn", root, extra))


def _standard_normals(num_samples: int, dim: int, seed: int) -> Tensor:
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


class Link(Protocol):
    """Turns a Gaussian over logits into class probabilities (n, c)."""

    def __call__(self, gaussian: LogitGaussian) -> Tensor:
        """Probabilities of shape (n, c); rows sum to 1."""

    def tempered(self, gaussian: LogitGaussian) -> Callable[[float, float], Tensor]:
        """(T, τ) ↦ probabilities of `gaussian.tempered(T, τ)`, to be tried at many of them."""
        return lambda temperature, scale: self(gaussian.tempered(temperature, scale))


@dataclass(frozen=True)
class MonteCarlo(Link):
    r"""E[softmax(f)] by averaging over draws of f, exact as `num_samples` grows.

    Attributes:
        num_samples: Number of draws (antithetic pairs).
        seed: Seed of the draws; the same seed gives the same probabilities.
    """

    num_samples: int = 128
    seed: int = 0

    def __call__(self, gaussian: LogitGaussian) -> Tensor:
        """Probabilities of shape (n, c)."""
        draws = gaussian.compressed().probabilities(self.num_samples, self.seed)
        return draws.mean(0).T.contiguous()

    def tempered(self, gaussian: LogitGaussian) -> Callable[[float, float], Tensor]:
        """See `Link.tempered`: the draws of T = τ = 1 are made once, then scaled."""
        mean = gaussian.mean.T
        deviations = gaussian.compressed().deviations(self.num_samples, self.seed)

        def probabilities(temperature: float, scale: float) -> Tensor:
            draws = torch.add(mean / scale, deviations, alpha=math.sqrt(temperature) / scale)
            return draws.softmax(1).mean(0).T.contiguous()

        return probabilities


@dataclass(frozen=True)
class Probit(Link):
    r"""The probit (mean-field) approximation :math:`softmax(m_c / \sqrt{1 + π/8 · S_{cc}})`.

    Reference: Evidence for the generalized linear model: MacKay, The Evidence Framework Applied
    to Classification Networks (1992); multi-class form as in Laplace Redux (Daxberger et al.,
    2021), https://arxiv.org/abs/2106.14806
    """

    def __call__(self, gaussian: LogitGaussian) -> Tensor:
        """Probabilities of shape (n, c)."""
        return (gaussian.mean / (1 + math.pi / 8 * gaussian.variance()).sqrt()).softmax(-1)


@dataclass(frozen=True)
class LaplaceBridge(Link):
    r"""The Laplace bridge: the mean of the Dirichlet matched to the Gaussian in softmax basis.

    :math:`α_j = \frac{1}{S_{jj}} (1 - \frac{2}{c} + \frac{e^{m_j}}{c^2} \sum_l e^{-m_l})`, with
    mean and covariance first projected onto the logits that sum to zero.

    Reference: Fast Predictive Uncertainty for Classification with Bayesian Deep Networks
    (Hobbhahn et al., 2022), https://arxiv.org/abs/2003.01227
    """

    def __call__(self, gaussian: LogitGaussian) -> Tensor:
        """Probabilities of shape (n, c)."""
        mean, covariance = gaussian.mean.double(), gaussian.covariance().double()
        c = mean.shape[-1]
        row_sum = covariance.sum(-1)
        total = row_sum.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        mean = mean - row_sum * mean.sum(-1, keepdim=True) / total
        variance = covariance.diagonal(dim1=1, dim2=2) - row_sum.square() / total
        spread = torch.exp(mean + torch.logsumexp(-mean, -1, keepdim=True)) / c**2
        variance = variance.clamp_min(torch.finfo(torch.float32).eps)
        alpha = (1 - 2 / c + spread) / variance
        return (alpha / alpha.sum(-1, keepdim=True)).to(gaussian.mean.dtype)


LINKS = ("mc", "probit", "bridge")


def make_link(name: str, num_samples: int, seed: int) -> Link:
    """The link of that name: "mc", "probit" or "bridge".

    Raises:
        ValueError: For another name, or `num_samples` below 1.
    """
    if num_samples < 1:
        raise ValueError(f"`num_samples` must be at least 1; got {num_samples}.")
    links: dict[str, Link] = {
        "mc": MonteCarlo(num_samples, seed),
        "probit": Probit(),
        "bridge": LaplaceBridge(),
    }
    if name not in links:
        raise ValueError(f"`link` must be one of {LINKS}; got {name!r}.")
    return links[name]


@dataclass(frozen=True)
class Uncertainty:
    """Scores of shape (n,); each is higher for inputs the classifier knows less about.

    Attributes:
        entropy: Entropy of the averaged probabilities, in nats.
        mutual_information: Entropy minus the mean entropy of the draws, in nats: the part of the
            uncertainty that comes from the weights.
        logit_variance: Mean marginal variance of the logits.
        confidence_deficit: One minus the largest averaged probability ("max-softmax").
        energy: −logsumexp of the mean logits.
    """

    entropy: Tensor
    mutual_information: Tensor
    logit_variance: Tensor
    confidence_deficit: Tensor
    energy: Tensor


def entropy(probs: Tensor) -> Tensor:
    """Entropy over the last axis, in nats, with 0·log 0 = 0."""
    return -torch.xlogy(probs, probs).sum(-1)


def uncertainty(gaussian: LogitGaussian, num_samples: int = 128, seed: int = 0) -> Uncertainty:
    """All scores of n examples from one set of draws (see `Uncertainty`)."""
    draws = gaussian.compressed().probabilities(num_samples, seed)
    probs = draws.mean(0).T
    total = entropy(probs)
    return Uncertainty(
        entropy=total,
        mutual_information=(total - entropy(draws.transpose(1, 2)).mean(0)).clamp_min(0),
        logit_variance=gaussian.variance().mean(-1),
        confidence_deficit=1 - probs.max(-1).values,
        energy=-torch.logsumexp(gaussian.mean, -1),
    )
