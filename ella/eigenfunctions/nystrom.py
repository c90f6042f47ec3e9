"""Nyström eigenfunctions: exact Jacobian products with k fixed directions."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella.arguments import COUNT, one_of, settle
from ella.batches import Batches, Loader, as_batches
from ella.eigenfunctions.base import check_product_residual
from ella.inputs import Inputs, num_examples, take
from ella.linearize import Linearized
from ella.network import Network
from ella.predictive import LogitGaussian
from ella.saving import State
from ella.sketches import projected_blocks, projected_rows
from ella.spectral.nystrom import leading_eigenpairs, row_gram

OUTPUTS = ("random", "all")


@dataclass(frozen=True)
class Nystrom:
    r"""Eigenfunctions from m sampled rows of the Jacobian.

    With J_m ∈ R^{m×p} the sampled rows and :math:`J_m J_m^\top = U Λ U^\top`, the directions are
    :math:`v_j = J_m^\top u_j / \sqrt{λ_j}` (orthonormal) and φ(x) = J(x)V. A prediction costs k
    Jacobian-vector products (or c row gradients), the state k·p numbers. Memory while fitting:
    m·p numbers in the model's dtype, plus one chunk.

    Attributes:
        rank: k.
        subsample: Number of examples that rows are taken from (fewer if the loader has fewer).
        outputs: "random" takes one random output of each example, as the authors do; "all" takes
            all c, so that m = c·subsample and the rank can reach rank(J).
        residual: "diag", "exact" (full c×c blocks) or "none" (the paper's: it under-reports).

    Reference: Accelerated Linearized Laplace Approximation for Bayesian Deep Learning
    (Deng et al., 2022), https://arxiv.org/abs/2210.12642
    """

    rank: int = 20
    subsample: int = 2000
    outputs: str = "random"
    residual: str = "diag"

    def __post_init__(self) -> None:
        check_product_residual(self.residual)
        settle(self, rank=COUNT, subsample=COUNT, outputs=one_of(*OUTPUTS))

    def fit(
        self, linearized: Linearized, loader: Loader | Batches, *, seed: int, progress: bool
    ) -> "JacobianProjection":
        """See `EigenfunctionMethod.fit`. The first `subsample` examples of the loader are used.

        Raises:
            ValueError: If the rows span fewer than `rank` directions, or m·p numbers exceed 16
                times the memory budget.
        """
        rows = self._sample_rows(linearized, loader, seed, progress)
        values, vectors = leading_eigenpairs(row_gram(rows), self.rank)
        directions = (vectors / values.sqrt()).T.to(rows) @ rows
        return JacobianProjection(linearized, directions, self.residual)

    def restore(
        self, network: Network, state: State, *, trainable: tuple[str, ...], memory_budget: int
    ) -> "JacobianProjection":
        """See `EigenfunctionMethod.restore`."""
        linearized = Linearized(network, memory_budget=memory_budget, trainable=trainable)
        shape = (None, linearized.num_parameters)
        directions = state.tensor("directions", shape, linearized.dtype)
        return JacobianProjection(linearized, directions, state.text("residual"))

    def _sample_rows(
        self, linearized: Linearized, loader: Loader | Batches, seed: int, progress: bool
    ) -> Tensor:
        """J_m, shape (m, p), written part by part into its place: never a second copy."""
        batches = as_batches(loader, linearized.network)
        parts, processes = self._first_inputs(batches), batches.processes
        first, total = processes.extent(sum(num_examples(x) for x in parts))
        c = processes.agreed(linearized.num_outputs(parts[0]) if parts else None)
        rows_each = c if self.outputs == "all" else 1
        self._check_memory(linearized, rows_each * total)
        chosen = torch.randint(c, (total,), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[first:].to(linearized.device)
        shape = (rows_each * sum(map(num_examples, parts)), linearized.num_parameters)
        rows = torch.empty(shape, dtype=linearized.dtype, device=linearized.device)
        end = 0
        for x in tqdm(parts, desc="row gradients", disable=not progress, leave=False):
            start, end = end, end + rows_each * num_examples(x)
            if self.outputs == "all":
                rows[start:end] = linearized.jacobian(x).flatten(0, 1)
            else:
                rows[start:end] = linearized.row_gradients(x, chosen[start:end])
        return processes.joined(rows, linearized.device)

    def _first_inputs(self, batches: Batches) -> list[Inputs]:
        """The first `subsample` inputs, or all of them, in batches; several processes share."""
        parts: list[Inputs] = []
        missing = len(range(batches.processes.rank, self.subsample, batches.processes.size))
        if missing == 0:
            return parts
        for x, _ in batches.labelled():
            parts.append(take(x, slice(missing)))
            missing -= num_examples(parts[-1])
            if missing <= 0:
                break
        batches.end()
        return parts

    @staticmethod
    def _check_memory(linearized: Linearized, m: int) -> None:
        needed = m * linearized.num_parameters * linearized.dtype.itemsize
        if needed > 16 * linearized.memory_budget:
            raise ValueError(
                f"Nystrom would keep {m} rows of {linearized.num_parameters} weights, "
                f"{needed / 2**30:.1f} GiB, over 16 times the memory budget. Lower `subsample`, "
                f"or use NeuralEF, whose state does not grow with the weights."
            )


class JacobianProjection:
    """φ(x) = J(x)V for orthonormal directions V, and the exact residual J(I − VVᵀ)Jᵀ.

    Args:
        linearized: The model.
        directions: Vᵀ, shape (k, p), orthonormal rows.
        residual: "diag", "exact" or "none".
    """

    def __init__(self, linearized: Linearized, directions: Tensor, residual: str) -> None:
        check_product_residual(residual)
        self.linearized = linearized
        self.directions = directions
        self.residual = residual

    @property
    def rank(self) -> int:
        """K."""
        return len(self.directions)

    def __call__(self, x: Inputs) -> LogitGaussian:
        """Evaluate at n inputs; Jacobians come in chunks within the memory budget."""
        logits = self.linearized(x)
        k, c = len(self.directions), logits.shape[1]
        if self.residual == "none" and k < c:
            return LogitGaussian(logits, self.linearized.jvp(x, self.directions), None)
        if self.residual == "exact":
            phi, blocks = projected_blocks(self.linearized, x, self._project)
            return LogitGaussian(logits, phi, blocks - phi @ phi.mT)
        phi, diagonal = projected_rows(self.linearized, x, self._project)
        if self.residual == "none":
            return LogitGaussian(logits, phi, None)
        return LogitGaussian(logits, phi, (diagonal - phi.square().sum(-1)).clamp_min(0))

    def _project(self, rows: Tensor) -> Tensor:
        return rows @ self.directions.T

    def state(self) -> State:
        """See `Eigenfunctions.state`."""
        return State({"directions": self.directions}, {"residual": self.residual})
