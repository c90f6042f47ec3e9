"""laplace-torch's own ELLA: Nyström features of the tangent kernel, without the residual."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ella.baselines._laplace import (
    LaplaceBaseline,
    fit_laplace,
    num_bytes,
    require_full_precision,
    require_tensor,
)
from ella.inputs import Inputs
from ella.linearize import DEFAULT_MEMORY_BUDGET, Linearized
from ella.predictive import LogitGaussian

MAX_BATCH = 128


class NystromLaplace(LaplaceBaseline):
    r"""The published ELLA as laplace-torch implements it: :math:`S = φ (G + δI)^{-1} φ^\top`.

    φ(x) = J(x)V, V being the k leading directions of `subsample` training examples' row
    gradients, one random output each. `fit` needs subsample·p·12 bytes and keeps the training
    inputs in memory, so p and the data are limited; prediction is k forward-mode products.

    Reference: Accelerated Linearized Laplace Approximation for Bayesian Deep Learning (Deng et
    al., 2022), https://arxiv.org/abs/2210.12642

    Args:
        model: Maps one tensor x to logits (n, c), in float32 or float64.
        rank: k.
        subsample: M, the number of training examples that span the directions; at least k.
        likelihood: "classification" or "regression".
        prior_precision: δ until `calibrate` chooses one.
        noise_variance: σ² for regression; None takes the training residuals' mean square.
        memory_budget: Bytes of working memory for one batch.
        seed: Seed of the subsample and the Monte Carlo draws.
        progress: Whether to show progress bars.

    Raises:
        ValueError: If not 1 <= rank <= subsample.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: int = 20,
        subsample: int = 2000,
        likelihood: str = "classification",
        prior_precision: float = 1.0,
        noise_variance: float | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        if not 1 <= rank <= subsample:
            raise ValueError(
                f"`rank` must lie in 1..subsample; got rank={rank}, subsample={subsample}."
            )
        super().__init__(
            model,
            likelihood=likelihood,
            prior_precision=prior_precision,
            noise_variance=noise_variance,
            memory_budget=memory_budget,
            seed=seed,
            progress=progress,
        )
        self.rank = rank
        self.subsample = subsample
        self._directions: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the k directions in weight space and their k curvatures."""
        return num_bytes(t for t in (self._directions, self._values) if t is not None)

    def _fit(
        self, linearized: Linearized, loader: Iterable[Any], noise_variance: float
    ) -> Callable[[], None]:
        require_full_precision(linearized)
        parts = [
            (require_tensor(x), y)
            for x, y in self._checked_batches(linearized, loader, "training data")
        ]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        if self.subsample > len(x):
            raise ValueError(
                f"`subsample` is {self.subsample}, but the loader has {len(x)} examples. Lower it."
            )
        laplace = self._run(linearized, TensorDataset(x, y))
        # G = U diag(λ) Uᵀ once, and U folded into the directions: any δ is then a scaling.
        values, vectors = torch.linalg.eigh(laplace.feature_gram.double() / noise_variance)
        directions = (laplace.dual_directions.double() @ vectors).T.to(linearized.dtype)

        def assign() -> None:
            self._directions, self._values = directions.contiguous(), values.clamp_min(0)

        return assign

    def _run(self, linearized: Linearized, data: TensorDataset) -> Any:  # noqa: ANN401
        # It takes the Jacobian of a whole batch at once, and needs many times that to work in: 24
        # examples of a ResNet-20 (0.3 GB of rows) took more than 23 GB.
        x = data.tensors[0]
        row = linearized.num_outputs(x) * linearized.num_parameters * linearized.dtype.itemsize
        batch = min(MAX_BATCH, max(1, self.memory_budget // (128 * row)))
        return fit_laplace(
            copy.deepcopy(self.model),
            DataLoader(data, batch_size=batch),
            likelihood=self.likelihood,
            backend="CurvlinopsGGN",
            rng_seed=self.seed,
            seed=self.seed,
            subset_of_weights="all",
            hessian_structure="gp",
            functional_approximation="nystrom",
            subsample_size=self.subsample,
            n_eigenvalues=self.rank,
        )

    def _evaluate(self, x: Inputs) -> tuple[Tensor | None, ...]:
        linearized = self._fitted_model()
        assert self._directions is not None
        return linearized(x), linearized.jvp(x, self._directions)

    def _gaussian(
        self, evaluation: tuple[Tensor | None, ...], prior_precision: float
    ) -> LogitGaussian:
        logits, phi = evaluation
        assert logits is not None
        assert phi is not None
        assert self._values is not None
        scale = (self._values + prior_precision).rsqrt().to(phi.dtype)
        return LogitGaussian(logits, phi * scale)
