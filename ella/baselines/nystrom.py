"""laplace-torch's own ELLA: Nyström features of the tangent kernel, without the residual."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ella.arguments import COUNT
from ella.baselines._laplace import (
    LaplaceBaseline,
    fit_laplace,
    num_bytes,
    require_full_precision,
    require_tensor,
)
from ella.batches import Batches, Split
from ella.inputs import Inputs
from ella.likelihoods import Likelihood
from ella.linearize import DEFAULT_MEMORY_BUDGET, Linearized
from ella.outputs import Output
from ella.posterior import GaussianPosterior, LaplaceEvaluation
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
        output: See `Predictor`.
        split: See `Predictor`.
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
        likelihood: str | Likelihood = "classification",
        prior_precision: float = 1.0,
        noise_variance: float | None = None,
        output: Output = None,
        split: Split | None = None,
        memory_budget: int = DEFAULT_MEMORY_BUDGET,
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        rank, subsample = COUNT("rank", rank), COUNT("subsample", subsample)
        if rank > subsample:
            raise ValueError(
                f"`rank` must lie in 1..subsample; got rank={rank}, subsample={subsample}."
            )
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
        self.rank = rank
        self.subsample = subsample
        self._found: _Nystrom | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the k directions in weight space and their k curvatures."""
        if self._found is None:
            return 0
        return num_bytes((self._found.directions, self._found.posterior.eigenvalues))

    def _fit(self, linearized: Linearized, batches: Batches) -> Callable[[], None]:
        require_full_precision(linearized)
        parts = [
            (require_tensor(x), y)
            for x, y in self._checked_batches(linearized, batches, "training data")
        ]
        x, y = (torch.cat(column) for column in zip(*parts, strict=True))
        if self.subsample > len(x):
            raise ValueError(
                f"`subsample` is {self.subsample}, but the loader has {len(x)} examples. Lower it."
            )
        laplace = self._run(linearized, TensorDataset(x, y))
        # G = U diag(λ) Uᵀ once, and U folded into the directions: any δ is then a scaling.
        values, vectors = torch.linalg.eigh(laplace.feature_gram.double())
        directions = (laplace.dual_directions.double() @ vectors).T.to(linearized.dtype)
        posterior = GaussianPosterior(values.clamp_min(0), torch.eye(len(values)).to(values))
        found = _Nystrom(linearized, directions.contiguous(), posterior)

        def assign() -> None:
            self._found = found

        return assign

    def _run(self, linearized: Linearized, data: TensorDataset) -> Any:  # noqa: ANN401
        # It takes the Jacobian of a whole batch at once, and needs many times that to work in: 24
        # examples of a ResNet-20 (0.3 GB of rows) took more than 23 GB.
        x = data.tensors[0]
        row = linearized.num_outputs(x) * linearized.num_parameters * linearized.dtype.itemsize
        batch = min(MAX_BATCH, max(1, self.memory_budget // (128 * row)))
        return fit_laplace(
            copy.deepcopy(self.model).eval(),
            DataLoader(data, batch_size=batch),
            likelihood=self._name,
            backend="CurvlinopsGGN",
            rng_seed=self.seed,
            seed=self.seed,
            subset_of_weights="all",
            hessian_structure="gp",
            functional_approximation="nystrom",
            subsample_size=self.subsample,
            n_eigenvalues=self.rank,
        )

    def _evaluate(self, x: Inputs) -> LaplaceEvaluation:
        if self._found is None:
            raise self._unfitted()
        linearized = self._found.linearized
        prior = LogitGaussian(linearized(x), linearized.jvp(x, self._found.directions))
        return LaplaceEvaluation(prior, self._found.posterior)


@dataclass(frozen=True)
class _Nystrom:
    """What `fit` leaves.

    Attributes:
        linearized: The model.
        directions: Vᵀ in the eigenvectors of G, shape (k, p).
        posterior: With G diagonal.
    """

    linearized: Linearized
    directions: Tensor
    posterior: GaussianPosterior
