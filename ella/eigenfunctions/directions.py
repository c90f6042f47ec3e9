"""A subspace of weight space that carries the kernel: S(x) = J(x)V for orthonormal V."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ella.batches import Batches
from ella.collection import Collection
from ella.inputs import Inputs, slices
from ella.linearize import Linearized
from ella.processes import Processes
from ella.saving import State
from ella.spectral.nystrom import numerical_eigenpairs, row_gram

log = logging.getLogger("ella")

SKETCH_SIZE = 4096
"""Numbers that a row of the Jacobian is folded to."""
FOLDS_AT_ONCE = 256
"""Folds of a row that are signed and added at a time."""
SKETCHED_ROWS = 1000
"""Rows of the Jacobian that the leading directions are found from."""


@dataclass(frozen=True)
class Directions:
    """Leading directions V of the Jacobian's rows, which are sketched, never stored.

    A row is multiplied by random signs and folded to s numbers, so that inner products are right
    on average (a count sketch), and exact where s = p; V are the leading eigenvectors of sampled
    sketched rows. The memory is p + s·r, not r·p.

    Reference: Finding frequent items in data streams (Charikar et al., 2002); for gradients:
    TRAK (Park et al., 2023), https://arxiv.org/abs/2303.14186

    Attributes:
        signs: Of the weights, shape (p,), int8.
        axes: V, shape (s, r).
    """

    signs: Tensor
    axes: Tensor

    def __len__(self) -> int:
        return self.axes.shape[1]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows of the Jacobian (i, j, p) in terms of the directions, (i, j, r)."""
        return folded(rows, self.signs, len(self.axes)) @ self.axes


def random_signs(p: int, seed: int, device: torch.device) -> Tensor:
    """±1 for each weight, int8; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (p,), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(device)


def folded(rows: Tensor, signs: Tensor, size: int) -> Tensor:
    """The count sketch of rows (..., p): weight j, with its sign, is added to number j mod s."""
    found = rows.new_zeros(*rows.shape[:-1], size)
    for part in slices(rows.shape[-1], FOLDS_AT_ONCE * size):  # in the cache, without a copy
        signed = rows[..., part] * signs[part]
        whole = signed.shape[-1] // size * size
        found += signed[..., :whole].unflatten(-1, (-1, size)).sum(-2)
        found[..., : signed.shape[-1] - whole] += signed[..., whole:]
    return found


def projected_rows(
    linearized: Linearized,
    x: Inputs,
    project: Callable[[Tensor], Tensor],
    outputs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S(x) and diag κ(x, x) at all outputs or some, in the memory of one chunk of rows.

    Args:
        linearized: The model.
        x: n examples.
        project: Rows of the Jacobian (i, j, p) to (i, j, r), such as `Directions`.
        outputs: Which rows, shape (n, q); None for all c.

    Returns:
        Shapes (n, q, r) and (n, q).
    """

    def with_norms(rows: Tensor) -> Tensor:
        return torch.cat([project(rows), rows.square().sum(-1, keepdim=True)], dim=-1)

    found = linearized.over_rows(x, with_norms, outputs)
    return found[..., :-1], found[..., -1]


def projected_blocks(
    linearized: Linearized, x: Inputs, project: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """S(x), shape (n, c, r), and κ(x, x), shape (n, c, c); see `projected_rows`."""
    inside, blocks = [], []
    for _, jacobian in linearized.jacobian_chunks(x):
        inside.append(project(jacobian))
        blocks.append(jacobian @ jacobian.mT)
    return torch.cat(inside), torch.cat(blocks)


def find_directions(
    linearized: Linearized,
    inputs: Collection,
    *,
    rank: int,
    num_directions: int,
    generator: torch.Generator,
    batches: Batches,
) -> Directions:
    """The `num_directions` leading directions of `SKETCHED_ROWS` rows, random outputs of inputs.

    All processes find the same, from the inputs of all.

    Raises:
        ValueError: If the sampled rows span fewer than `rank` directions.
    """
    p = linearized.num_parameters
    size = min(p, max(SKETCH_SIZE, num_directions))
    seed = int(torch.randint(2**31, (1,), generator=generator))
    signs = random_signs(p, seed, linearized.device)
    processes, checkpoint = batches.processes, batches.checkpoint
    state = checkpoint.kept_by_all("sample-directions", processes, linearized.device)
    if state is not None:
        generator.set_state(state.tensors["generator"].cpu())
        return Directions(signs, state.tensor("axes", (size, None)))
    sketches = _sampled_sketches(linearized, inputs, signs, size, generator, processes)
    log.info(
        "rows of %d weights are sketched to %d numbers; directions from %d rows",
        *(p, size, len(sketches)),
    )
    values, vectors = numerical_eigenpairs(row_gram(sketches))
    values, vectors = values[:num_directions], vectors[:, :num_directions]
    check_rank(rank, len(values))
    axes = sketches.T @ (vectors / values.sqrt()).to(sketches)
    known = State({"axes": axes, "generator": generator.get_state()})
    checkpoint.keep("sample-directions", known)
    return Directions(signs, axes)


def _sampled_sketches(
    linearized: Linearized,
    inputs: Collection,
    signs: Tensor,
    size: int,
    generator: torch.Generator,
    processes: Processes,
) -> Tensor:
    """Sketches of one random output of each input, or of several where inputs are few: (m, s)."""
    start, total = processes.extent(len(inputs))
    chosen = torch.randperm(total, generator=generator)[:SKETCHED_ROWS]
    c = processes.agreed(linearized.num_outputs(inputs.parts[0]) if inputs.parts else None)
    each = min(c, -(-SKETCHED_ROWS // len(chosen)))
    draws = torch.rand(len(chosen), c, generator=generator)
    outputs = draws.topk(each, dim=1).indices.to(linearized.device)
    shape = (len(chosen), each, size)
    sketches = torch.zeros(shape, dtype=linearized.dtype, device=linearized.device)
    for where, x in inputs.chosen(chosen - start):  # those of this process
        sketches[where] = linearized.over_rows(
            x, lambda rows: folded(rows, signs, size), outputs[where]
        )
    return processes.sum(sketches).flatten(0, 1)


def check_rank(rank: int, spanned: int) -> None:
    """Refuse more eigenfunctions than directions."""
    if spanned < rank:
        raise ValueError(
            f"`rank` is {rank}, but the sampled rows of the Jacobian span only {spanned} "
            f"directions. Lower `rank`, or raise `num_directions` or the number of inputs."
        )
