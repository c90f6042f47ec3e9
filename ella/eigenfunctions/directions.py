"""A subspace of weight space that carries the kernel: S(x) = J(x)V for orthonormal V."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ella.collection import Collection
from ella.inputs import Inputs, slices
from ella.linearize import Linearized
from ella.spectral.nystrom import numerical_eigenpairs, row_gram

log = logging.getLogger("ella")

SKETCH_SIZE = 4096
"""Numbers that a row of the Jacobian is folded to where rows are too long to be kept."""
FOLDS_AT_ONCE = 256
"""Folds of a row that are signed and added at a time."""
SKETCHED_INPUTS = 1000
"""Inputs whose sketched rows the leading directions are found from."""


class Directions(Protocol):
    """r directions."""

    def __len__(self) -> int:
        """R."""

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows of the Jacobian (i, j, p) in terms of the directions, (i, j, r)."""


@dataclass(frozen=True)
class StoredRows:
    """The span of m sampled rows of the Jacobian.

    Attributes:
        rows: Shape (m, p).
        mix: Makes them orthonormal, shape (m, r).
    """

    rows: Tensor
    mix: Tensor

    def __len__(self) -> int:
        return self.mix.shape[1]

    def __call__(self, rows: Tensor) -> Tensor:
        """See `Directions`."""
        return (rows @ self.rows.T) @ self.mix


@dataclass(frozen=True)
class SketchedRows:
    """Leading directions of rows that are sketched, never stored: memory p + s·r, not r·p.

    A row is multiplied by random signs and folded to s numbers, so that inner products are right
    on average (a count sketch); V are the leading eigenvectors of sampled sketched rows.

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
        """See `Directions`."""
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
) -> Directions:
    """`num_directions` directions from rows of the Jacobian, a random output of each input.

    The rows are stored where four times the memory budget holds them, and else sketched.

    Raises:
        ValueError: If the sampled rows span fewer than `rank` directions.
    """
    m = min(num_directions, len(inputs))
    if m * linearized.row_bytes <= 4 * linearized.memory_budget:
        rows, mix = _stored(linearized, inputs, m, generator)
        check_rank(rank, mix.shape[1])
        return StoredRows(rows, mix)
    return _sketched(linearized, inputs, rank, num_directions, generator)


def check_rank(rank: int, spanned: int) -> None:
    """Refuse more eigenfunctions than directions."""
    if spanned < rank:
        raise ValueError(
            f"`rank` is {rank}, but the sampled rows of the Jacobian span only {spanned} "
            f"directions. Lower `rank`, or raise `num_directions` or the number of inputs."
        )


def _chosen_outputs(
    linearized: Linearized, inputs: Collection, m: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """M inputs, and an output of each."""
    chosen = torch.randperm(len(inputs), generator=generator)[:m]
    c = linearized.num_outputs(inputs.parts[0])
    return chosen, torch.randint(c, (m,), generator=generator).to(linearized.device)


def _stored(
    linearized: Linearized, inputs: Collection, m: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    chosen, outputs = _chosen_outputs(linearized, inputs, m, generator)
    shape = (m, linearized.num_parameters)
    rows = torch.empty(shape, dtype=linearized.dtype, device=linearized.device)
    for where, x in inputs.chosen(chosen):
        rows[where] = linearized.row_gradients(x, outputs[where])
    values, vectors = numerical_eigenpairs(row_gram(rows))
    return rows, (vectors / values.sqrt()).to(rows)


def _sketched(
    linearized: Linearized,
    inputs: Collection,
    rank: int,
    num_directions: int,
    generator: torch.Generator,
) -> SketchedRows:
    p, size = linearized.num_parameters, max(SKETCH_SIZE, num_directions)
    m = min(SKETCHED_INPUTS, len(inputs))
    seed = int(torch.randint(2**31, (1,), generator=generator))
    signs = random_signs(p, seed, linearized.device)
    log.info("rows of %d weights are sketched to %d numbers from %d inputs", p, size, m)
    chosen, outputs = _chosen_outputs(linearized, inputs, m, generator)
    sketches = torch.empty(m, size, dtype=linearized.dtype, device=linearized.device)
    for where, x in inputs.chosen(chosen):
        sketches[where] = linearized.over_rows(
            x, lambda rows: folded(rows, signs, size), outputs[where].unsqueeze(1)
        ).squeeze(1)
    values, vectors = numerical_eigenpairs(row_gram(sketches))
    check_rank(rank, len(values))
    values, vectors = values[:num_directions], vectors[:, :num_directions]
    axes = sketches.T @ (vectors / values.sqrt()).to(sketches)
    return SketchedRows(signs, axes)
