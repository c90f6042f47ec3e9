"""Sketches of the Jacobian's rows: few numbers whose inner products are those of the rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ella.inputs import Inputs, slices
from ella.linearize import Linearized

SKETCH_SIZE = 4096
"""Numbers that a count sketch has."""
FOLDS_AT_ONCE = 256
"""Folds of a row that are signed and added at a time."""


class RowSketch(Protocol):
    """Folds rows ∂f_j(x)/∂θ of the Jacobian to s numbers each, without keeping anything of size p.

    Attributes:
        size: s.
    """

    @property
    def size(self) -> int:
        """How many numbers, s."""

    @property
    def name(self) -> str:
        """What kind of sketch it is."""

    def route(self, x: Inputs) -> str:
        """How rows at inputs like x are computed."""

    def rows(self, x: Inputs, outputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sketches and squared norms.

        Args:
            x: n examples.
            outputs: Which rows of each, shape (n, q); None for all c.

        Returns:
            Shapes (n, q, s) and (n, q), the diagonal of κ(x, x).
        """

    def blocks(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Sketches of all rows, shape (n, c, s), and κ(x, x), shape (n, c, c)."""


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
        project: Rows of the Jacobian (i, j, p) to (i, j, r), each by itself.
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


@dataclass(frozen=True)
class CountSketch:
    """Exact rows, multiplied by random signs and folded to s numbers; exact where s = p.

    Norms and blocks are exact. The memory is p for the signs, and one chunk of rows.

    Reference: Finding frequent items in data streams (Charikar et al., 2002); for gradients:
    TRAK (Park et al., 2023), https://arxiv.org/abs/2303.14186

    Attributes:
        linearized: The model.
        signs: Of the weights, shape (p,), int8.
        size: s.
    """

    linearized: Linearized
    signs: Tensor
    size: int
    name: ClassVar[str] = "count"

    @classmethod
    def of(cls, linearized: Linearized, seed: int, size: int = SKETCH_SIZE) -> "CountSketch":
        """Of p or `size` numbers, whichever is less."""
        p = linearized.num_parameters
        return cls(linearized, random_signs(p, seed, linearized.device), min(p, size))

    def route(self, x: Inputs) -> str:
        """See `RowSketch.route`."""
        return self.linearized.rows_route(x)

    def __call__(self, rows: Tensor) -> Tensor:
        """Of rows (..., p)."""
        return folded(rows, self.signs, self.size)

    def rows(self, x: Inputs, outputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `RowSketch.rows`."""
        return projected_rows(self.linearized, x, self, outputs)

    def blocks(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """See `RowSketch.blocks`; a whole Jacobian (c, p) has to fit."""
        return projected_blocks(self.linearized, x, self)
