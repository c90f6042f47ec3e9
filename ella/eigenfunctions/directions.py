"""A subspace of weight space that carries the kernel: S(x) = J(x)V for orthonormal V."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ella.batches import Batches
from ella.collection import Collection
from ella.derivatives import is_out_of_memory
from ella.inputs import Inputs, num_examples, slices, take
from ella.kronecker import KroneckerSketch
from ella.linearize import Linearized
from ella.processes import Processes
from ella.saving import State
from ella.sketches import CountSketch, RowSketch
from ella.spectral.nystrom import numerical_eigenpairs, row_gram

log = logging.getLogger("ella")

SKETCHED_ROWS = 1000
"""Rows of the Jacobian that the leading directions are found from."""
SKETCHED_NUMBERS = 2**22
"""Numbers of sketches of eight rows an input that are made before they are projected."""
WORTH_IT = 2**22
"""Weights from which on rows are sketched layer by layer: below, whole ones are cheap enough."""


@dataclass(frozen=True)
class Directions:
    """Leading directions V of the Jacobian's rows, which are sketched, never stored.

    Attributes:
        sketch: From rows to s numbers.
        axes: V, leading eigenvectors of sampled sketches, shape (s, r).
        seconds_each: That one row took; 0 if they were found before.
    """

    sketch: RowSketch
    axes: Tensor
    seconds_each: float = 0.0

    def __len__(self) -> int:
        return self.axes.shape[1]

    def rows(self, x: Inputs, outputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """S(x) and diag κ(x, x) at all outputs or some: (n, q, r) and (n, q)."""
        found = []
        for part in slices(num_examples(x), self._at_once):
            sketches, norms = self.sketch.rows(
                take(x, part), None if outputs is None else outputs[part]
            )
            found.append((sketches @ self.axes, norms))
        return torch.cat([each for each, _ in found]), torch.cat([norms for _, norms in found])

    def blocks(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """S(x), shape (n, c, r), and κ(x, x), shape (n, c, c)."""
        found = []
        for part in slices(num_examples(x), self._at_once):
            sketches, blocks = self.sketch.blocks(take(x, part))
            found.append((sketches @ self.axes, blocks))
        return torch.cat([each for each, _ in found]), torch.cat([blocks for _, blocks in found])

    @property
    def _at_once(self) -> int:
        """Inputs whose sketches of a few rows fit `SKETCHED_NUMBERS`."""
        return max(1, SKETCHED_NUMBERS // (8 * len(self.axes)))


def sketch_of(linearized: Linearized, x: Inputs, kind: str, seed: int) -> RowSketch:
    """The sketch that suits a model.

    Args:
        linearized: The model.
        x: Some examples.
        kind: "count", "kronecker", or "auto": the latter from `WORTH_IT` weights on, if the model
            allows it.
        seed: Of everything random.

    Raises:
        ValueError: If "kronecker" was asked for and cannot be had.
    """
    if kind == "count" or (kind == "auto" and linearized.num_parameters < WORTH_IT):
        return CountSketch.of(linearized, seed)
    try:
        return KroneckerSketch(linearized, x, seed)
    except Exception as error:  # anything may be raised in the user's forward pass
        if is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        if kind == "kronecker":
            raise ValueError(
                f'sketch="kronecker" cannot be had for this model: {reason}. Use sketch="auto".'
            ) from error
        log.info("rows of the Jacobian are made whole: %s", reason)
        return CountSketch.of(linearized, seed)


def shared_sketch(
    linearized: Linearized, inputs: Collection, kind: str, seed: int, processes: Processes
) -> tuple[RowSketch, int]:
    """The sketch that all processes use, and its size; see `sketch_of`."""
    own = sketch_of(linearized, inputs.parts[0], kind, seed) if inputs.parts else None
    about = processes.each(None if own is None else (type(own).__name__, own.size))
    known = sorted({each for each in about if each is not None})
    if own is None or len(known) > 1:  # without inputs it sketches nothing
        own = CountSketch.of(linearized, seed)
    if inputs.parts and isinstance(own, CountSketch):
        linearized.time_rows(inputs.parts[0])
    return own, known[0][1] if len(known) == 1 else own.size


def find_directions(
    linearized: Linearized,
    inputs: Collection,
    kind: str,
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
    processes, checkpoint, device = batches.processes, batches.checkpoint, batches.device
    seed = int(torch.randint(2**31, (1,), generator=generator))
    sketch, size = shared_sketch(linearized, inputs, kind, seed, processes)
    state = checkpoint.kept_by_all("sample-directions", processes, device)
    if state is not None:
        generator.set_state(state.tensors["generator"].cpu())
        return Directions(sketch, state.tensor("axes", (size, None)))
    c = processes.agreed(linearized.num_outputs(inputs.parts[0]) if inputs.parts else None)
    start, total = processes.extent(len(inputs))
    chosen = torch.randperm(total, generator=generator)[:SKETCHED_ROWS]
    each = min(c, -(-SKETCHED_ROWS // len(chosen)))
    draws = torch.rand(len(chosen), c, generator=generator)
    outputs = draws.topk(each, dim=1).indices.to(device)
    begin = time.perf_counter()
    own = {where: sketch.rows(x, outputs[where])[0] for where, x in inputs.chosen(chosen - start)}
    taken = time.perf_counter() - begin
    empty = torch.zeros(len(chosen), each, size, dtype=linearized.dtype, device=device)
    sketches = processes.sum(_placed(own, empty)).flatten(0, 1)
    log.info(
        "rows of %d weights are sketched to %d numbers (%s); directions from %d rows",
        *(linearized.num_parameters, size, type(sketch).__name__, len(sketches)),
    )
    values, vectors = numerical_eigenpairs(row_gram(sketches))
    values, vectors = values[:num_directions], vectors[:, :num_directions]
    check_rank(rank, len(values))
    axes = sketches.T @ (vectors / values.sqrt()).to(sketches)
    known = State({"axes": axes, "generator": generator.get_state()})
    checkpoint.keep("sample-directions", known)
    rows = each * sum(len(where) for where in own)
    return Directions(sketch, axes, taken / max(rows, 1))


def check_rank(rank: int, spanned: int) -> None:
    """Refuse more eigenfunctions than directions."""
    if spanned < rank:
        raise ValueError(
            f"`rank` is {rank}, but the sampled rows of the Jacobian span only {spanned} "
            f"directions. Lower `rank`, or raise `num_directions` or the number of inputs."
        )


def _placed(parts: dict[Tensor, Tensor], found: Tensor) -> Tensor:
    """Rows at their places, zeros elsewhere."""
    for where, part in parts.items():
        found[where] = part
    return found
