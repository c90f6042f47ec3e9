"""Laplace over the weights of the last linear layer, by laplace-torch and BackPACK."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ella.activations import FeatureTaps
from ella.arguments import one_of
from ella.baselines._laplace import LaplaceBaseline, LaplaceLoader, fit_laplace, num_bytes
from ella.batches import Batches, Split
from ella.choosing import input_of, last_linear
from ella.inputs import Inputs, slices
from ella.likelihoods import Likelihood
from ella.linearize import Linearized
from ella.outputs import Output
from ella.predictive import Evaluation, LogitGaussian
from ella.processes import NO_DATA

STRUCTURES = ("full", "kron")
CHUNK_BYTES = 2**28


class LastLayerLaplace(LaplaceBaseline):
    r"""Last-layer Laplace: :math:`S(x) = J (H + δI)^{-1} J^\top`, J = [h(x), 1] ⊗ I_c.

    H is the generalized Gauss-Newton matrix of the training loss in the weights of the last
    `nn.Linear`, whose input h is computed once for each example; everything before it is fixed.
    For regression it is that of the squared error over σ².
    H and its decomposition are float64. `structure="full"` holds H, of p = c(d + 1) rows: 0.2 GB
    for c = 10, d = 512, and out of reach for c = 1000. `structure="kron"` holds one Kronecker
    product for the weight and one block for the bias, and costs little for any c.

    Reference: Laplace Redux – Effortless Bayesian Deep Learning (Daxberger et al., 2021),
    https://arxiv.org/abs/2106.14806

    Args:
        model: Maps x to logits (n, c) that are the output of an `nn.Linear`.
        structure: "full" or "kron".
        likelihood: "classification" or "regression".
        prior_precision: δ until `calibrate` chooses one.
        noise_variance: σ² for regression; None takes the training residuals' mean square.
        output: See `Predictor`.
        split: See `Predictor`.
        seed: Seed of the Monte Carlo draws.
        progress: Whether to show progress bars.

    Raises:
        ValueError: For another structure, or a prior precision that is not above 0.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        structure: str = "kron",
        likelihood: str | Likelihood = "classification",
        prior_precision: float = 1.0,
        noise_variance: float | None = None,
        output: Output = None,
        split: Split | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        one_of(*STRUCTURES)("structure", structure)
        super().__init__(
            model,
            likelihood=likelihood,
            prior_precision=prior_precision,
            noise_variance=noise_variance,
            output=output,
            split=split,
            seed=seed,
            progress=progress,
        )
        self.structure = structure
        self._taps: FeatureTaps | None = None
        self._posterior: _Posterior | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the eigendecomposed curvature."""
        return num_bytes(self._posterior.tensors()) if self._posterior is not None else 0

    def _fit(self, linearized: Linearized, batches: Batches) -> Callable[[], None]:
        taps: FeatureTaps | None = None
        features, labels = [], []
        for x, y in self._checked_batches(linearized, batches, "features"):
            taps = taps or _tap(linearized, x)
            features.append(_evaluate_with_input(taps, x)[1].double())
            labels.append(y.double() if y.is_floating_point() else y)
        if taps is None:
            raise ValueError(NO_DATA)
        layer = self.model.get_submodule(taps.taps[0].module)
        data = LaplaceLoader(lambda: zip(features, labels, strict=True), sum(map(len, labels)))
        laplace = fit_laplace(
            # Its feature extractor refuses a model that is one module.
            nn.Sequential(nn.Identity(), _as_linear(layer)),
            data,
            likelihood=self._name,
            backend="BackPackGGN",
            rng_seed=self.seed,
            subset_of_weights="last_layer",
            hessian_structure=self.structure,
        )
        posterior = _posterior(laplace, linearized.dtype)

        def assign() -> None:
            self._taps, self._posterior = taps, posterior

        return assign

    def _evaluate(self, x: Inputs) -> "_LastLayerEvaluation":
        if self._taps is None or self._posterior is None:
            raise self._unfitted()
        logits, h = _evaluate_with_input(self._taps, x)
        return _LastLayerEvaluation(logits, h, self._posterior)


@dataclass(frozen=True)
class _LastLayerEvaluation(Evaluation):
    """Logits (n, c) and the input h of the last layer (n, d)."""

    logits: Tensor
    h: Tensor
    posterior: "_Posterior"

    def rows(self, index: Tensor | slice) -> "_LastLayerEvaluation":
        return _LastLayerEvaluation(self.logits[index], self.h[index], self.posterior)

    @classmethod
    def joined(cls, parts: "Sequence[_LastLayerEvaluation]") -> "_LastLayerEvaluation":
        logits, h = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "h")
        )
        return cls(logits, h, parts[0].posterior)

    def prior_variance(self) -> float:
        squares = self.h.double().square().sum(-1).mean().item()
        return squares + self.posterior.has_bias

    def gaussian(self, prior_precision: float) -> LogitGaussian:
        return self.posterior.gaussian(self.logits, self.h, prior_precision)


class _Posterior(Protocol):
    """An eigendecomposed curvature of the last layer."""

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias."""

    def gaussian(self, logits: Tensor, h: Tensor, precision: float) -> LogitGaussian:
        """The Gaussian over logits at δ from features h, shape (n, d)."""

    def tensors(self) -> list[Tensor]:
        """Everything it holds."""


@dataclass(frozen=True)
class _Full:
    r"""H = Q diag(λ) Qᵀ: :math:`S = (JQ) (λ + δ)^{-1} (JQ)^\top`.

    Attributes:
        vectors: Q with the weight's rows as (c, d, p), followed by the bias: (c, d + 1, p).
        values: λ, shape (p,).
    """

    vectors: Tensor
    values: Tensor

    @property
    def has_bias(self) -> bool:
        return self.vectors.shape[0] * self.vectors.shape[1] == self.vectors.shape[2]

    def gaussian(self, logits: Tensor, h: Tensor, precision: float) -> LogitGaussian:
        c, width, p = self.vectors.shape
        if width > h.shape[1]:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        scale = (self.values + precision).rsqrt().to(h.dtype)
        size = max(1, CHUNK_BYTES // (c * p * h.element_size()))
        blocks = []
        for part in slices(len(h), size):
            factor = torch.einsum("nd,cdp->ncp", h[part], self.vectors) * scale
            blocks.append(factor @ factor.mT)
        return LogitGaussian(logits, logits.new_zeros(*logits.shape, 0), torch.cat(blocks))

    def tensors(self) -> list[Tensor]:
        return [self.vectors, self.values]


@dataclass(frozen=True)
class _Kronecker:
    r"""H = (B ⊗ A) ⊕ B', B = Q diag(b) Qᵀ, A = P diag(a) Pᵀ, and B' likewise for the bias.

    .. math:: S = Q diag_i( \sum_j \frac{(P^\top h)_j^2}{b_i a_j + δ} ) Q^\top
        + Q' (b' + δ)^{-1} Q'^\top

    Attributes:
        weight: b, Q, a, P.
        bias: b', Q', or nothing for a layer without bias.
    """

    weight: tuple[Tensor, Tensor, Tensor, Tensor]
    bias: tuple[Tensor, ...]

    @property
    def has_bias(self) -> bool:
        return bool(self.bias)

    def gaussian(self, logits: Tensor, h: Tensor, precision: float) -> LogitGaussian:
        b, q, a, p = self.weight
        inverse = (torch.outer(a, b) + precision).reciprocal().to(h.dtype)
        factors = [q * ((h @ p).square() @ inverse).sqrt().unsqueeze(1)]
        if self.bias:
            values, vectors = self.bias
            constant = vectors * (values + precision).rsqrt().to(h.dtype)
            factors.append(constant.expand(len(h), *constant.shape))
        return LogitGaussian(logits, torch.cat(factors, dim=2))

    def tensors(self) -> list[Tensor]:
        return [*self.weight, *self.bias]


def _posterior(laplace: Any, dtype: torch.dtype) -> _Posterior:  # noqa: ANN401
    """The fitted curvature; eigenvalues stay float64, eigenvectors take the model's dtype."""
    curvature = laplace.H
    if isinstance(curvature, Tensor):
        linear = laplace.model.last_layer
        c, d = linear.weight.shape
        values, vectors = torch.linalg.eigh(curvature)
        # laplace-torch orders the parameters as (weight row by row, bias).
        rows = [vectors[: c * d].reshape(c, d, -1)]
        if linear.bias is not None:
            rows.append(vectors[c * d :].unsqueeze(1))
        return _Full(torch.cat(rows, dim=1).to(dtype), values.clamp_min(0))
    values, vectors = curvature.eigenvalues, curvature.eigenvectors
    (b, a), (q, p) = values[0], vectors[0]
    bias = (values[1][0], vectors[1][0].to(dtype)) if len(values) > 1 else ()
    return _Kronecker((b, q.to(dtype), a, p.to(dtype)), bias)


def _tap(linearized: Linearized, x: Inputs) -> FeatureTaps:
    name = last_linear(linearized.network, x)
    if name is None:
        raise ValueError(
            "LastLayerLaplace needs a model whose logits come straight from an nn.Linear, or from "
            "a convolution of size 1."
        )
    return FeatureTaps(linearized.network, [input_of(linearized.network.model, name)])


def _as_linear(layer: Any) -> nn.Linear:  # noqa: ANN401 - a linear layer or a convolution
    """A trainable float64 copy; a convolution of size 1 becomes what it is at each position."""
    c, d = layer.weight.shape[:2]
    # First weights would be drawn from the global generator.
    bias = layer.bias is not None
    linear = nn.utils.skip_init(nn.Linear, d, c, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.view(c, d))
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
    return linear.to(layer.weight.device)


def _evaluate_with_input(taps: FeatureTaps, x: Inputs) -> tuple[Tensor, Tensor]:
    """Logits (n, c), and the input h of the last layer, (n, d)."""
    logits, features = taps(x)
    return logits, features[:, : features.shape[1] - logits.shape[1]]
