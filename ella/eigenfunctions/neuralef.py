"""Neural eigenfunctions of the NTK: φ(x) for the price of one forward pass."""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ella.activations import FeatureTaps, choose_taps, restored_taps
from ella.eigenfunctions.augmentation import Augmentation, Perturb
from ella.eigenfunctions.residuals import DiagonalResidual, FactorResidual, LearnedResidual
from ella.eigenfunctions.sample import KernelSample, sample_kernel
from ella.inputs import (
    Inputs,
    check_choice,
    concatenate,
    labelled,
    num_examples,
    slices,
    take,
)
from ella.linearize import Linearized
from ella.network import Network
from ella.predictive import LogitGaussian
from ella.saving import State
from ella.spectral import (
    FeatureKernel,
    Moments,
    NestedLoRA,
    Objective,
    Regression,
    ResidualMLP,
    Samples,
    Teacher,
    Training,
    rayleigh_ritz,
    train,
)

RESIDUALS = ("diag", "factor", "none")
LEARNING_STREAM = 2**32
"""Added to the seed, so that batches are not drawn like the Jacobian's rows."""


@dataclass(frozen=True)
class NeuralEF:
    r"""A network learns the k leading eigenfunctions of the NTK from Jacobian products.

    1. **Inputs**: `num_inputs` training inputs, at least half of them changed by `augment`.
    2. **Kernel**: the NTK is restricted to the span of `num_directions` sampled rows of the
       Jacobian, S(x) = J(x)V, so every input's Jacobian is computed once. κ ≈ SSᵀ within that
       span, which must be larger than `rank`; what lies outside counts as residual.
    3. **Network**: ψ reads frozen activations of the classifier (or, if `network` is given, the
       inputs themselves). It starts from `teacher`: regression onto the k leading eigenfunctions
       of SSᵀ on those inputs; `training`, if given, then minimises `objective` on ψ and Tψ.
    4. **Rayleigh-Ritz** in float64 over all inputs gives φ = ψA√μ.
    5. **Residual**: a second network learns R = κ(x, x) − φφᵀ by regression: its log diagonal
       ("diag"), or a factor L with R = LLᵀ ("factor").

    After `fit` no Jacobian is needed, and nothing of size p is kept. Memory while fitting:
    num_inputs·c·num_directions numbers for S, num_inputs·c² for the blocks κ(x, x) where c is at
    most num_directions + 64, num_directions·p for the rows, plus one chunk.

    Attributes:
        rank: k.
        objective: What `training` minimises; `NestedLoRA` or `NeuralEFObjective`.
        network: A module from inputs to (n, c, k), copied at `fit`; None builds a `ResidualMLP` on
            the classifier's own activations.
        num_inputs: Inputs to learn from.
        augment: Makes inputs that look unseen; None uses each training input once, as it is.
        num_directions: Rows of the Jacobian whose span carries the kernel; fewer if four times the
            memory budget cannot hold them.
        width: Hidden units of the default network.
        depth: Its hidden layers; 0 leaves a linear map.
        teacher: Training on the teacher; None skips it.
        training: Training on the objective; None, the default, skips it, as the teacher alone was
            as good or better wherever both were measured (experiments/README.md).
        residual: "diag", "factor" (a learned c×r factor, nearer to the full blocks) or "none".

    Reference: NeuralEF: Deconstructing Kernels by Deep Neural Networks (Deng et al., 2022),
    https://arxiv.org/abs/2205.00165
    """

    rank: int = 64
    objective: Objective = field(default_factory=NestedLoRA)
    network: nn.Module | None = None
    num_inputs: int = 10_000
    augment: Augmentation | None = field(default_factory=Perturb)
    num_directions: int = 256
    width: int = 256
    depth: int = 2
    teacher: Training | None = field(default_factory=lambda: Training(weight_decay=0.3))
    training: Training | None = None
    residual: str = "diag"

    def __post_init__(self) -> None:
        for name in ("rank", "num_inputs", "num_directions", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        if self.depth < 0:
            raise ValueError(f"`depth` must be at least 0; got {self.depth}.")
        check_residual(self.residual)
        if self.teacher is None and self.training is None:
            raise ValueError("NeuralEF needs `teacher` or `training`; both are None.")

    def fit(
        self, linearized: Linearized, loader: Iterable[Any], *, seed: int, progress: bool
    ) -> "NeuralFeatures":
        """See `EigenfunctionMethod.fit`.

        Raises:
            ValueError: If the data carry fewer than `rank` directions, or `network` returns
                another shape.
        """
        sample = self.sample(linearized, loader, seed=seed, progress=progress)
        return self.learn(sample, seed=seed, progress=progress)

    def sample(
        self, linearized: Linearized, loader: Iterable[Any], *, seed: int, progress: bool
    ) -> KernelSample:
        """The dear half of `fit`: one pass over `num_inputs` inputs with their Jacobians.

        Raises:
            ValueError: If the data carry fewer than `rank` directions.
        """
        generator = torch.Generator().manual_seed(seed)
        inputs = self._collect(linearized, loader, generator)
        return sample_kernel(
            linearized,
            inputs,
            FeatureTaps(linearized.network, choose_taps(linearized.network, inputs)),
            rank=self.rank,
            num_directions=self.num_directions,
            generator=generator,
            progress=progress,
        )

    def learn(self, sample: KernelSample, *, seed: int, progress: bool) -> "NeuralFeatures":
        """The other half: train the networks. One sample serves many ranks and settings.

        Raises:
            ValueError: If `residual` needs blocks that the sample lacks, the sample spans fewer
                than `rank` directions, or `network` returns another shape.
        """
        if self.residual == "factor" and sample.blocks is None:
            raise ValueError(
                'residual="factor" needs exact Jacobians, which are too dear for '
                f'{sample.diagonal.shape[1]} outputs. Use residual="diag".'
            )
        target = sample.teacher(self.rank)
        inputs = sample.activations if self.network is None else sample.inputs
        generator = torch.Generator().manual_seed(seed + LEARNING_STREAM)
        network = self._network(sample, generator)
        self._check_network(network, inputs, sample)
        options: dict[str, Any] = {"generator": generator, "progress": progress}
        if self.teacher is not None:
            problem = Samples(Teacher(), inputs, target, generator=generator)
            train(network, problem, Regression(), self.teacher, **options)
        if self.training is not None:
            s = sample.kernel_features
            problem = Samples(FeatureKernel(), inputs, s, generator=generator)
            train(network, problem, self.objective, self.training, **options)
        psi = evaluate(network, inputs)
        mixing = self._ritz(psi, sample)
        learned = self._fit_residual(sample, psi @ mixing, options)
        return NeuralFeatures(
            sample.taps,
            network,
            mixing / sample.scale,
            learned,
            reads_inputs=self.network is not None,
        )

    def restore(
        self, network: Network, state: State, *, trainable: tuple[str, ...], memory_budget: int
    ) -> "NeuralFeatures":
        """See `EigenfunctionMethod.restore`.

        Raises:
            ValueError: If the file was made with a network of the user's and none is given.
        """
        taps = FeatureTaps(network, restored_taps(state))
        settings, tensors = state.settings, dict(state.tensors)
        net: nn.Module
        if settings["reads_inputs"]:
            if self.network is None:
                raise ValueError(
                    "The file holds weights of a custom eigen-network. Pass "
                    "`eigenfunctions=NeuralEF(network=...)` with the same module to load."
                )
            net = copy.deepcopy(self.network)
        else:
            net = _rebuild(settings["network"])
        residual = None
        if settings["residual"] is not None:
            kind = LEARNED[settings["residual"]["kind"]]
            residual = kind(_rebuild(settings["residual"]["network"]))
        like = tensors["mixing"]
        for name, module in (("network", net), ("residual", residual)):
            if module is not None:
                # In the file's dtype first, so that no digit of the weights is lost.
                module.to(like).load_state_dict(_with_prefix(tensors, f"{name}."))
                module.eval().requires_grad_(False)
        return NeuralFeatures(taps, net, like, residual, reads_inputs=settings["reads_inputs"])

    def _collect(
        self, linearized: Linearized, loader: Iterable[Any], generator: torch.Generator
    ) -> Inputs:
        """`num_inputs` inputs: half, or one pass if that is less, as they are; then augmented."""
        parts: list[Inputs] = []
        count = 0
        plain = -(-self.num_inputs // 2)
        while count < self.num_inputs:
            before = count
            for x, _ in labelled(loader, linearized.device):
                if count >= plain and self.augment is not None:
                    x = self.augment(x, generator)
                parts.append(take(x, slice(self.num_inputs - count)))
                count += num_examples(parts[-1])
                if count >= self.num_inputs:
                    break
            if self.augment is None or count == before:
                break
            plain = 0
        return concatenate(parts)

    def _network(self, data: KernelSample, generator: torch.Generator) -> nn.Module:
        if self.network is not None:
            return copy.deepcopy(self.network).requires_grad_(True)
        c = data.diagonal.shape[1]
        d = data.activations.shape[1]
        shape = (c, self.rank)
        network = ResidualMLP(d, shape, width=self.width, depth=self.depth, generator=generator)
        network.to(data.activations).standardize(data.activations)
        return network

    def _check_network(self, network: nn.Module, inputs: Inputs, data: KernelSample) -> None:
        with torch.no_grad():
            psi = network.eval()(take(inputs, slice(2)))
        c = data.diagonal.shape[1]
        if psi.shape[1:] != (c, self.rank):
            raise ValueError(
                f"`network` must return (n, c, k) = (n, {c}, {self.rank}); got {tuple(psi.shape)}."
            )

    def _ritz(self, psi: Tensor, data: KernelSample) -> Tensor:
        """A√μ, shape (k, k'): Rayleigh-Ritz with E[ψᵀTψ] = WWᵀ, W = E[ψᵀS]."""
        flat, s = psi.double().flatten(0, 1), data.kernel_features.flatten(0, 1)
        w = flat.new_zeros(self.rank, s.shape[1])
        for part in slices(len(s), 2**16):  # float64 copies of S, a part at a time
            w += flat[part].T @ s[part].double()
        w /= len(psi)
        values, mixing = rayleigh_ritz(Moments(flat.T @ flat, w @ w.T * len(psi), len(psi)))
        return (mixing * values.clamp_min(0).sqrt()).to(psi)

    def _fit_residual(
        self, data: KernelSample, phi: Tensor, options: dict[str, Any]
    ) -> LearnedResidual | None:
        """The second network, in the units of the kernel."""
        settings = self.teacher or self.training or Training()
        learned: LearnedResidual
        if self.residual == "none":
            return None
        if self.residual == "factor":
            assert data.blocks is not None  # as `learn` has checked
            learned = FactorResidual.fitted(
                data.activations, phi, data.blocks, settings, min(self.width, 256), options
            )
        else:
            learned = DiagonalResidual.fitted(
                data.activations, phi, data.diagonal, settings, min(self.width, 128), options
            )
        learned.rescale(data.scale**-2)
        return learned


LEARNED: dict[str, type[LearnedResidual]] = {
    kind.__name__: kind for kind in (DiagonalResidual, FactorResidual)
}


class NeuralFeatures:
    """φ(x) = ψ(x)A√μ and R(x), both from networks, in one forward pass with the logits.

    Args:
        taps: Read the classifier's activations.
        network: ψ.
        mixing: A√μ, shape (k, k').
        residual: Gives R; None drops it.
        reads_inputs: Whether ψ reads the inputs instead of the activations.
    """

    def __init__(
        self,
        taps: FeatureTaps,
        network: nn.Module,
        mixing: Tensor,
        residual: LearnedResidual | None,
        *,
        reads_inputs: bool,
    ) -> None:
        self.taps = taps
        self.network = network
        self.mixing = mixing
        self.residual = residual
        self.reads_inputs = reads_inputs

    @torch.no_grad()
    def __call__(self, x: Inputs) -> LogitGaussian:
        """Evaluate at n inputs."""
        logits, activations = self.taps(x)
        phi = self.network(x if self.reads_inputs else activations) @ self.mixing
        residual = None if self.residual is None else self.residual(activations)
        return LogitGaussian(logits, phi, residual)

    @property
    def rank(self) -> int:
        """K."""
        return self.mixing.shape[1]

    def state(self) -> State:
        """See `Eigenfunctions.state`."""
        named = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        if self.residual is not None:
            state = self.residual.state_dict()
            named |= {f"residual.{name}": t for name, t in state.items()}
        residual = None
        if self.residual is not None:
            network = self.residual.network.settings()
            residual = {"kind": type(self.residual).__name__, "network": network}
        described = None
        if isinstance(self.network, ResidualMLP) and not self.reads_inputs:
            described = self.network.settings()
        return State(
            {"mixing": self.mixing, **named},
            {
                "taps": [asdict(tap) for tap in self.taps.taps],
                "reads_inputs": self.reads_inputs,
                "network": described,
                "residual": residual,
            },
        )


def check_residual(residual: str) -> None:
    """Networks give "diag", "factor" or "none".

    Raises:
        ValueError: For anything else, "exact" included.
    """
    if residual == "exact":
        raise ValueError(
            'NeuralEF learns the residual: use residual="diag", "factor" or "none", or '
            'Nystrom with residual="exact".'
        )
    check_choice("residual", residual, RESIDUALS)


@torch.no_grad()
def evaluate(network: nn.Module, inputs: Inputs, size: int = 1024) -> Tensor:
    """Network values at all inputs, in batches, without gradients."""
    network.eval().requires_grad_(False)
    return torch.cat([network(take(inputs, i)) for i in slices(num_examples(inputs), size)])


def _rebuild(settings: dict[str, Any]) -> ResidualMLP:
    """A network to load weights into; its own come from no generator that anyone else uses."""
    return ResidualMLP(**settings, generator=torch.Generator())


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
