"""Kronecker-factored Laplace over all weights, by laplace-torch and curvlinops."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ella.baselines._laplace import (
    LaplaceBaseline,
    LaplaceLoader,
    fit_laplace,
    num_bytes,
    require_full_precision,
    require_tensor,
)
from ella.batches import Batches, Split
from ella.calibrate import precision_grid
from ella.inputs import Inputs, take
from ella.likelihoods import Likelihood
from ella.linearize import DEFAULT_MEMORY_BUDGET, Linearized
from ella.outputs import Output
from ella.predictive import Evaluation, LogitGaussian
from ella.processes import NO_DATA

PROBED = 32
"""Training examples from which the scale of the prior variance is taken."""


class KroneckerLaplace(LaplaceBaseline):
    r"""Kronecker-factored Laplace (KFAC) over the weights of all `nn.Linear` and `nn.Conv2d`.

    BatchNorm, LayerNorm, embeddings and every other kind of parameter are held fixed, as are
    layers with a frozen parameter: neither KFAC backend supports them. Each layer's curvature is
    :math:`B ⊗ A` for the weight and B for the bias, decomposed once, so that with R the Jacobian
    rotated into its eigenvectors :math:`S(x) = R (λ + δ)^{-1} R^\top` holds for any δ.

    Each prediction takes the Jacobian of its batch, c backward passes, in chunks within
    `memory_budget`. Jacobians are too large to keep, so `calibrate` reduces each at once to the
    covariances (c, c) at the 15 prior precisions that the search asks for: it holds
    15·c² numbers for each validation example. The searched range is set by the prior variance of
    training examples.

    Reference: A Scalable Laplace Approximation for Neural Networks (Ritter et al., 2018),
    https://openreview.net/forum?id=Skdvd2xAZ; linearized as in Laplace Redux (Daxberger et al.,
    2021), https://arxiv.org/abs/2106.14806

    Args:
        model: Maps one tensor x to logits (n, c), in float32 or float64.
        likelihood: "classification" or "regression".
        prior_precision: δ until `calibrate` chooses one.
        noise_variance: σ² for regression; None takes the training residuals' mean square.
        output: See `Predictor`.
        split: See `Predictor`.
        memory_budget: Bytes of working memory.
        seed: Seed of the Monte Carlo draws.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        likelihood: str | Likelihood = "classification",
        prior_precision: float = 1.0,
        noise_variance: float | None = None,
        output: Output = None,
        split: Split | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        super().__init__(
            model,
            likelihood=likelihood,
            prior_precision=prior_precision,
            noise_variance=noise_variance,
            output=output,
            split=split,
            memory_budget=memory_budget,
            seed=seed,
            progress=progress,
        )
        self._blocks: list[_Block] = []
        self._grid: list[float] = []
        self._linearized: Linearized | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the eigendecomposed Kronecker factors."""
        return num_bytes(t for b in self._blocks for t in (*b.values, *b.vectors))

    def _fit(self, linearized: Linearized, batches: Batches) -> Callable[[], None]:
        require_full_precision(linearized)
        first, num_examples = None, 0
        for x, y in self._checked_batches(linearized, batches, "check"):
            first = require_tensor(x) if first is None else first
            num_examples += len(y)
        if first is None:
            raise ValueError(NO_DATA)
        blocks = self._run(linearized, batches, num_examples)
        grid = precision_grid(_prior_variance(linearized, blocks, take(first, slice(PROBED))))

        def assign() -> None:
            self._blocks, self._grid, self._linearized = blocks, grid, linearized

        return assign

    def _run(self, linearized: Linearized, batches: Batches, num_examples: int) -> "list[_Block]":
        """laplace-torch on a copy whose other parameters are frozen."""
        covered = set(_covered_parameters(self.model))
        model = copy.deepcopy(self.model).eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in covered)

        def passes() -> Iterator[tuple[Tensor, Tensor]]:
            for x, y in self._checked_batches(linearized, batches, "curvature"):
                yield require_tensor(x), y

        laplace = fit_laplace(
            model,
            LaplaceLoader(passes, num_examples),
            likelihood=self._name,
            backend="CurvlinopsGGN",
            rng_seed=self.seed,
            subset_of_weights="all",
            hessian_structure="kron",
        )
        # laplace-torch's blocks follow the order of the trainable parameters.
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        curvature = laplace.H
        parts = zip(names, curvature.eigenvalues, curvature.eigenvectors, strict=True)
        return [_Block(name, tuple(v), tuple(q)) for name, v, q in parts]

    def _evaluate(self, x: Inputs) -> "_KroneckerEvaluation":
        """At every precision that the search may ask for."""
        return self._evaluated_at(x, self._grid)

    def _evaluate_at(self, x: Inputs, prior_precision: float) -> "_KroneckerEvaluation":
        return self._evaluated_at(x, [prior_precision])

    def _evaluated_at(self, x: Inputs, precisions: list[float]) -> "_KroneckerEvaluation":
        if self._linearized is None:
            raise self._unfitted()
        covariances = _covariances(self._linearized, self._blocks, x, precisions)
        return _KroneckerEvaluation(self._linearized(x), covariances, tuple(precisions))

    def _precisions(self, evaluation: Evaluation, prior_variance: float) -> list[float]:
        return self._grid


@dataclass(frozen=True)
class _KroneckerEvaluation(Evaluation):
    """Logits (n, c), and covariances (n, m, c, c) at m prior precisions: Jacobians are too large.

    Attributes:
        logits: f.
        covariances: At T = 1 and unit dispersion.
        precisions: δ of each.
    """

    logits: Tensor
    covariances: Tensor
    precisions: tuple[float, ...]

    def rows(self, index: Tensor | slice) -> "_KroneckerEvaluation":
        return _KroneckerEvaluation(self.logits[index], self.covariances[index], self.precisions)

    @classmethod
    def joined(cls, parts: "Sequence[_KroneckerEvaluation]") -> "_KroneckerEvaluation":
        logits = torch.cat([part.logits for part in parts])
        covariances = torch.cat([part.covariances for part in parts])
        return cls(logits, covariances, parts[0].precisions)

    def prior_variance(self) -> float:
        """From the largest precision, at which the posterior is nearly the prior."""
        variances = self.covariances[:, -1].diagonal(dim1=1, dim2=2).double()
        return variances.mean().item() * self.precisions[-1]

    def gaussian(self, prior_precision: float) -> LogitGaussian:
        distances = [abs(math.log(known / prior_precision)) for known in self.precisions]
        index = distances.index(min(distances))
        if distances[index] > 1e-6:
            raise ValueError(f"Not evaluated at the prior precision {prior_precision:.6g}.")
        factor = self.logits.new_zeros(*self.logits.shape, 0)
        return LogitGaussian(self.logits, factor, self.covariances[:, index])


@dataclass(frozen=True)
class _Block:
    """The eigendecomposed curvature of one parameter.

    Attributes:
        name: Name of the parameter.
        values: Eigenvalues of one dense factor, or of the output-side and input-side factors.
        vectors: Eigenvectors likewise.
    """

    name: str
    values: tuple[Tensor, ...]
    vectors: tuple[Tensor, ...]

    def eigenvalues(self) -> Tensor:
        """λ of the whole block, in the order of the flattened parameter."""
        if len(self.values) == 1:
            return self.values[0]
        return torch.outer(*self.values).flatten()

    def rotate(self, jacobian: Tensor) -> Tensor:
        """The Jacobian (n, c, q) of this parameter in the block's eigenvectors."""
        if len(self.vectors) == 1:
            return jacobian @ self.vectors[0]
        left, right = self.vectors
        matrix = jacobian.unflatten(-1, (len(left), len(right)))
        return (left.mT @ matrix @ right).flatten(2)


def _covariances(
    linearized: Linearized, blocks: list[_Block], x: Inputs, precisions: list[float]
) -> Tensor:
    """J (H + δI)⁻¹ Jᵀ at each precision, shape (n, len(precisions), c, c)."""
    positions = _positions(linearized)
    parts = []
    for _, jacobian in linearized.jacobian_chunks(x):
        n, c, _ = jacobian.shape
        covariances = jacobian.new_zeros(n, len(precisions), c, c)
        for block in blocks:
            rotated = block.rotate(jacobian[..., positions[block.name]])
            values = block.eigenvalues()
            for i, precision in enumerate(precisions):
                covariances[:, i] += rotated / (values + precision) @ rotated.mT
        parts.append(covariances)
    return torch.cat(parts)


def _prior_variance(linearized: Linearized, blocks: list[_Block], x: Inputs) -> float:
    """Mean of diag J Jᵀ over the covered parameters."""
    positions = _positions(linearized)
    total, count = 0.0, 0
    for _, jacobian in linearized.jacobian_chunks(x):
        for block in blocks:
            total += jacobian[..., positions[block.name]].double().square().sum().item()
        count += jacobian.shape[0] * jacobian.shape[1]
    return total / count


def _positions(linearized: Linearized) -> dict[str, slice]:
    """Where each trainable parameter's columns lie in the Jacobian."""
    positions, start = {}, 0
    for name, parameter in linearized.parameters().items():
        positions[name] = slice(start, start + parameter.numel())
        start += parameter.numel()
    return positions


def _covered_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters of plain linear and convolutional layers that are all trainable.

    Subclasses are left out: some, such as the output projection of `nn.MultiheadAttention`, are
    applied without being called, which KFAC's hooks do not see.
    """
    names = []
    for prefix, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if type(module) in (nn.Linear, nn.Conv2d) and all(p.requires_grad for p in own.values()):
            names += [f"{prefix}.{name}" if prefix else name for name in own]
    if not names:
        raise ValueError(
            "KroneckerLaplace needs a trainable nn.Linear or nn.Conv2d; the model has none."
        )
    return names
