"""What networks learn eigenfunctions from: the kernel and the activations at many inputs."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella.activations import FeatureTaps, restored_taps
from ella.batches import Batches
from ella.checkpoint import Checkpoint, digest_of
from ella.collection import Collection, input_state, restored_inputs
from ella.eigenfunctions.directions import (
    Directions,
    check_rank,
    find_directions,
)
from ella.eigenfunctions.plan import Plan
from ella.inputs import Inputs, input_tensors, num_examples, slices
from ella.linearize import Linearized
from ella.network import Network
from ella.saving import State
from ella.sketches import CountSketch, RowSketch

log = logging.getLogger("ella")

TOP_EIGENVALUE = 10.0
"""The kernel is rescaled so that its largest eigenvalue is this while networks train on it."""
MOST_OUTPUTS = 64
"""With this many outputs more than directions, some rows of each input stand for all."""
SAMPLED_OUTPUTS = 8
"""How many they are."""
AT_ONCE = 256
"""Inputs between two steps of the progress bar."""


@dataclass(frozen=True)
class KernelSample:
    """What one pass over n inputs leaves. Every rank and residual can be learned from it.

    Attributes:
        taps: Where activations are read.
        inputs: The n inputs, or those of them that are this process's.
        activations: Shape (n, d).
        kernel_features: S·scale with S(x) = J(x)V for r orthonormal V, shape (n, q, r), q being c
            or the number of sampled outputs.
        diagonal: diag κ(x, x)·scale², shape (n, q).
        blocks: κ(x, x)·scale², shape (n, c, c), or None if c or p is too large for them.
        scale: Makes the largest eigenvalue of the kernel `TOP_EIGENVALUE`.
        axes: Eigenvectors of Σ SᵀS, shape (r, r), leading first.
        num_outputs: c.
        outputs: Which outputs were sampled of each input, shape (n, q); None for all.
        plan: What it was expected to take; None if it comes from a file.
    """

    taps: FeatureTaps
    inputs: Collection
    activations: Tensor
    kernel_features: Tensor
    diagonal: Tensor
    blocks: Tensor | None
    scale: float
    axes: Tensor
    num_outputs: int
    outputs: Tensor | None = None
    plan: Plan | None = None

    @property
    def weight(self) -> float:
        """How many rows each row stands for, c/q."""
        return self.num_outputs / self.diagonal.shape[1]

    def state(self) -> State:
        """What `restore` takes; the inputs are part of it."""
        named = {"activations": self.activations, "kernel_features": self.kernel_features}
        named |= {"diagonal": self.diagonal, "axes": self.axes}
        for name, tensor in (("blocks", self.blocks), ("outputs", self.outputs)):
            named |= {} if tensor is None else {name: tensor}
        forms = []
        for i, part in enumerate(self.inputs.parts):
            form, inputs = input_state(part)
            forms.append(form)
            named |= {f"{i}.{name}": tensor for name, tensor in inputs.items()}
        settings = {"taps": [asdict(tap) for tap in self.taps.taps], "scale": self.scale}
        return State(named, {**settings, "inputs": forms, "num_outputs": self.num_outputs})

    @classmethod
    def restore(cls, network: Network, state: State) -> "KernelSample":
        """What `state` described.

        Raises:
            ValueError: If a part is missing, misshaped or not finite.
        """
        s = state.tensor("kernel_features", (None, None, None))
        n, q, r = s.shape
        c = state.integer("num_outputs", 2**31)
        named = state.tensors
        blocks = state.tensor("blocks", (n, c, c)) if "blocks" in named else None
        outputs = state.tensor("outputs", (n, q)) if "outputs" in named else None
        parts = []
        for i, form in enumerate(state.list("inputs")):
            own = {k.removeprefix(f"{i}."): t for k, t in named.items() if k.startswith(f"{i}.")}
            parts.append(restored_inputs(form, own))
        return cls(
            FeatureTaps(network, restored_taps(state)),
            Collection(tuple(parts)),
            state.tensor("activations", (n, None)),
            s,
            state.tensor("diagonal", (n, q)),
            blocks,
            state.number("scale"),
            state.tensor("axes", (r, r)),
            c,
            outputs,
        )

    def teacher(self, rank: int) -> Tensor:
        """The k leading eigenfunctions of the sampled kernel at the n inputs, (n, q, k).

        Raises:
            ValueError: If the kernel features span fewer than k directions.
        """
        check_rank(rank, self.axes.shape[1])
        return self.kernel_features @ self.axes[:, :rank]


def sample_kernel(
    linearized: Linearized,
    inputs: Collection,
    taps: FeatureTaps,
    *,
    rank: int,
    num_directions: int,
    sketch: str,
    generator: torch.Generator,
    batches: Batches,
    progress: bool,
) -> KernelSample:
    """One pass over the inputs, of c sketched rows each, or `SAMPLED_OUTPUTS` for a large c.

    Each of the processes that the batches name passes over its own inputs; all get the numbers
    that all have found. Finished parts go to the batches' checkpoint.

    Raises:
        ValueError: If the sampled rows span fewer than `rank` directions.
    """
    found = find_directions(
        linearized,
        inputs,
        sketch,
        rank=rank,
        num_directions=num_directions,
        generator=generator,
        batches=batches,
    )
    processes = batches.processes
    c = processes.agreed(linearized.num_outputs(inputs.parts[0]) if inputs.parts else None)
    start, total = processes.extent(len(inputs))
    outputs = None
    if c > num_directions + MOST_OUTPUTS:
        draws = torch.rand(total, c, generator=generator)[start : start + len(inputs)]
        outputs = draws.topk(SAMPLED_OUTPUTS, dim=1).indices.to(linearized.device)
    whole = outputs is None and _blocks_fit(linearized, found.sketch, total, c)
    plan = _planned(linearized, inputs, found, c, outputs is None, whole)
    if plan is not None:
        log.info("plan: %s", plan)
    each = _Pass(linearized, taps, found, outputs, whole, batches.checkpoint)
    features, diagonals, blocks, read = (
        processes.joined(torch.cat(parts) if parts else None, linearized.device)
        for parts in each.over(inputs, progress)
    )
    s, scale, axes = _scaled(features, c)
    known = blocks * scale**2 if whole else None
    drawn = None if outputs is None else processes.joined(outputs, linearized.device)
    norms = diagonals * scale**2
    return KernelSample(taps, inputs, read, s, norms, known, scale, axes, c, drawn, plan)


def _planned(
    linearized: Linearized, inputs: Collection, found: Directions, c: int, every: bool, whole: bool
) -> Plan | None:
    """What the pass over this process's inputs is going to take, if there are any."""
    if not inputs.parts:
        return None
    return Plan(
        num_inputs=len(inputs),
        rows_each=c if every else SAMPLED_OUTPUTS,
        num_outputs=c,
        num_weights=linearized.num_parameters,
        sketch=found.sketch.name,
        sketch_size=len(found.axes),
        route=found.sketch.route(inputs.parts[0]),
        blocks=whole,
        num_directions=len(found),
        seconds_each=found.seconds_each,
        chunk_bytes=linearized.chunk_bytes,
        itemsize=linearized.dtype.itemsize,
    )


def _blocks_fit(linearized: Linearized, sketch: RowSketch, n: int, c: int) -> bool:
    """Whether there is memory for κ(x, x) at n inputs, and to make one."""
    budget = linearized.memory_budget
    fits = n * c * c * linearized.dtype.itemsize <= 4 * budget
    whole = isinstance(sketch, CountSketch)  # which makes whole Jacobians
    return fits and (not whole or 2 * c * linearized.row_bytes <= budget)


@dataclass(frozen=True)
class _Pass:
    """What is computed of each input: see `KernelSample`."""

    linearized: Linearized
    taps: FeatureTaps
    directions: Directions
    outputs: Tensor | None
    whole: bool
    checkpoint: Checkpoint

    def over(self, inputs: Collection, progress: bool) -> tuple[list[Tensor], ...]:
        """S, diag κ, the blocks (or the diagonals again) and activations, in parts."""
        found: tuple[list[Tensor], ...] = ([], [], [], [])
        bar = tqdm(total=len(inputs), desc="jacobians", disable=not progress, leave=False)
        for where, x in _numbered(inputs):
            for parts, part in zip(found, self._kept(where, x), strict=True):
                parts.append(part)
            bar.update(num_examples(x))
        bar.close()
        return found

    def _kept(self, where: slice, x: Inputs) -> tuple[Tensor, ...]:
        """What was computed before of these inputs, or is now."""
        if self.checkpoint.folder is None:
            return self._at(where, x)
        name, digest = f"sample-{where.start:08d}", digest_of(input_tensors(x))
        state = self.checkpoint.kept(name, self.linearized.device)
        if state is None or state.text("digest") != digest:
            named = {str(i): tensor for i, tensor in enumerate(self._at(where, x))}
            self.checkpoint.keep(name, state := State(named, {"digest": digest}))
        return tuple(state.tensors[str(i)] for i in range(4))

    def _at(self, where: slice, x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        read = self.taps(x)[1]
        if self.whole:
            inside, blocks = self.directions.blocks(x)
            return inside, blocks.diagonal(dim1=1, dim2=2), blocks, read
        chosen = None if self.outputs is None else self.outputs[where]
        inside, norms = self.directions.rows(x, chosen)
        return inside, norms, norms, read


def _numbered(inputs: Collection) -> Iterator[tuple[slice, Inputs]]:
    start = 0
    for x in inputs.chunks(AT_ONCE):
        end = start + num_examples(x)
        yield slice(start, end), x
        start = end


def _scaled(features: Tensor, c: int) -> tuple[Tensor, float, Tensor]:
    """S·scale, the scale and the eigenvectors: see `KernelSample`."""
    second = features.new_zeros(features.shape[2], features.shape[2], dtype=torch.float64)
    for part in slices(len(features), 4096):
        wide = features[part].flatten(0, 1).double()
        second += wide.T @ wide
    values, axes = torch.linalg.eigh(second * (c / features.shape[1]) / len(features))
    scale = (TOP_EIGENVALUE / values[-1].item()) ** 0.5
    return features * scale, scale, axes.flip(1).to(features)
