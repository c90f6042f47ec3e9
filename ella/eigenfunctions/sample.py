"""What networks learn eigenfunctions from: the kernel and the activations at many inputs."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ella.activations import FeatureTaps, restored_taps
from ella.inputs import Inputs, input_state, num_examples, restored_inputs, slices, take
from ella.linearize import Linearized
from ella.network import Network
from ella.saving import State
from ella.spectral.nystrom import numerical_eigenpairs, row_gram

TOP_EIGENVALUE = 10.0
"""The kernel is rescaled so that its largest eigenvalue is this while networks train on it."""
PROBES = 64
"""Random directions that estimate κ(x, x) when c is too large for exact Jacobians."""
PROBES_AT_ONCE = 16


@dataclass(frozen=True)
class KernelSample:
    """What one pass over n inputs leaves. Every rank and residual can be learned from it.

    Attributes:
        taps: Where activations are read.
        inputs: The n inputs.
        activations: Shape (n, d).
        kernel_features: S·scale with S(x) = J(x)V for r orthonormal V, shape (n, c, r).
        diagonal: diag κ(x, x)·scale², shape (n, c).
        blocks: κ(x, x)·scale², shape (n, c, c), or None if c is too large for them.
        scale: Makes the largest eigenvalue of the kernel `TOP_EIGENVALUE`.
        axes: Eigenvectors of Σ SᵀS, shape (r, r), leading first.
    """

    taps: FeatureTaps
    inputs: Inputs
    activations: Tensor
    kernel_features: Tensor
    diagonal: Tensor
    blocks: Tensor | None
    scale: float
    axes: Tensor

    def state(self) -> State:
        """What `restore` takes; the inputs are part of it."""
        named = {"activations": self.activations, "kernel_features": self.kernel_features}
        named |= {"diagonal": self.diagonal, "axes": self.axes}
        if self.blocks is not None:
            named["blocks"] = self.blocks
        form, inputs = input_state(self.inputs)
        taps = [asdict(tap) for tap in self.taps.taps]
        return State({**named, **inputs}, {"taps": taps, "scale": self.scale, "inputs": form})

    @classmethod
    def restore(cls, network: Network, state: State) -> "KernelSample":
        """What `state` described.

        Raises:
            ValueError: If a part is missing, misshaped or not finite.
        """
        s = state.tensor("kernel_features", (None, None, None))
        n, c, r = s.shape
        blocks = state.tensor("blocks", (n, c, c)) if "blocks" in state.tensors else None
        return cls(
            FeatureTaps(network, restored_taps(state)),
            restored_inputs(state.list("inputs"), state.tensors),
            state.tensor("activations", (n, None)),
            s,
            state.tensor("diagonal", (n, c)),
            blocks,
            state.number("scale"),
            state.tensor("axes", (r, r)),
        )

    def teacher(self, rank: int) -> Tensor:
        """The k leading eigenfunctions of the sampled kernel at the n inputs, (n, c, k).

        Raises:
            ValueError: If the kernel features span fewer than k directions.
        """
        check_rank(rank, self.axes.shape[1])
        return self.kernel_features @ self.axes[:, :rank]


def check_rank(rank: int, spanned: int) -> None:
    """Refuse more eigenfunctions than directions."""
    if spanned < rank:
        raise ValueError(
            f"`rank` is {rank}, but the sampled rows of the Jacobian span only {spanned} "
            f"directions. Lower `rank`, or raise `num_directions` or the number of inputs."
        )


def sample_kernel(
    linearized: Linearized,
    inputs: Inputs,
    taps: FeatureTaps,
    *,
    rank: int,
    num_directions: int,
    generator: torch.Generator,
    progress: bool,
) -> KernelSample:
    """One pass over the inputs: S(x) = J(x)V, κ(x, x) or its diagonal, and activations.

    V spans `num_directions` sampled rows of the Jacobian, or as many as four times the memory
    budget holds. Costs c row gradients an input, or r + `PROBES` products where c is larger.

    Raises:
        ValueError: If the sampled rows span fewer than `rank` directions.
    """
    rows, mix = _directions(linearized, inputs, rank, num_directions, generator)
    exact = linearized.num_outputs(inputs) <= len(rows) + PROBES
    seed = int(torch.randint(2**31, (1,), generator=generator))
    activations, features, diagonals, blocks = [], [], [], []
    parts = tqdm(
        list(slices(num_examples(inputs), 256)), "jacobians", disable=not progress, leave=False
    )
    for part in parts:
        x = take(inputs, part)
        activations.append(taps(x)[1])
        if exact:
            for _, jacobian in linearized.jacobian_chunks(x):
                features.append((jacobian @ rows.T) @ mix)
                blocks.append(jacobian @ jacobian.mT)
                diagonals.append(blocks[-1].diagonal(dim1=1, dim2=2))
        else:
            features.append(linearized.jvp(x, rows) @ mix)
            diagonals.append(_probed_diagonal(linearized, x, seed))
    s, scale, axes = _scaled(torch.cat(features))
    return KernelSample(
        taps,
        inputs,
        torch.cat(activations),
        s,
        torch.cat(diagonals) * scale**2,
        torch.cat(blocks) * scale**2 if blocks else None,
        scale,
        axes,
    )


def _directions(
    linearized: Linearized,
    inputs: Inputs,
    rank: int,
    num_directions: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Sampled rows of the Jacobian (m, p), and what makes them orthonormal, (m, r)."""
    n, c = num_examples(inputs), linearized.num_outputs(inputs)
    row_bytes = linearized.num_parameters * linearized.dtype.itemsize
    m = max(1, min(num_directions, n, 4 * linearized.memory_budget // row_bytes))
    chosen = torch.randperm(n, generator=generator)[:m]
    outputs = torch.randint(c, (m,), generator=generator).to(linearized.device)
    rows = linearized.row_gradients(take(inputs, chosen), outputs)
    values, vectors = numerical_eigenpairs(row_gram(rows))
    check_rank(rank, len(values))
    return rows, (vectors / values.sqrt()).to(rows)


def _scaled(features: Tensor) -> tuple[Tensor, float, Tensor]:
    """S·scale, the scale and the eigenvectors: see `KernelSample`."""
    second = features.new_zeros(features.shape[2], features.shape[2], dtype=torch.float64)
    for part in slices(len(features), 4096):
        wide = features[part].flatten(0, 1).double()
        second += wide.T @ wide
    values, axes = torch.linalg.eigh(second / len(features))
    scale = (TOP_EIGENVALUE / values[-1].item()) ** 0.5
    return features * scale, scale, axes.flip(1).to(features)


def _probed_diagonal(linearized: Linearized, x: Inputs, seed: int) -> Tensor:
    """Estimates diag JJᵀ = E[(Jz)²] with `PROBES` random sign vectors z, a few at a time."""
    generator = torch.Generator().manual_seed(seed)
    shape = (PROBES_AT_ONCE, linearized.num_parameters)
    total = torch.zeros((), device=linearized.device, dtype=linearized.dtype)
    for _ in range(PROBES // PROBES_AT_ONCE):
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
        signs = (2 * signs - 1).to(linearized.device, linearized.dtype)
        total = total + linearized.jvp(x, signs).square().sum(-1)
    return total / PROBES
