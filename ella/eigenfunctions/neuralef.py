"""Neural eigenfunctions of the NTK: φ(x) for the price of one forward pass."""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ella.activations import FeatureTaps
from ella.arguments import (
    COUNT,
    FUNCTION,
    having,
    instance,
    one_of,
    optional,
    settle,
    whole,
)
from ella.batches import Batches, Loader, as_batches
from ella.choosing import choose_taps
from ella.collection import Collection
from ella.eigenfunctions.augmentation import Augmentation, Perturb
from ella.eigenfunctions.neural_features import Made, NetworkFactory, NeuralFeatures
from ella.eigenfunctions.residuals import (
    DiagonalResidual,
    FactorResidual,
    LearnedResidual,
)
from ella.eigenfunctions.rows import evaluate, regression
from ella.eigenfunctions.sample import KernelSample, sample_kernel
from ella.inputs import Inputs, num_examples, take
from ella.linearize import Linearized
from ella.network import Network
from ella.saving import State
from ella.spectral import (
    Eigenbasis,
    FeatureKernel,
    NestedLoRA,
    Objective,
    ResidualMLP,
    Samples,
    SpectralLoss,
    Training,
    feature_ritz,
    train,
)
from ella.spectral.networks import MAX_DEPTH

RESIDUALS = ("diag", "factor", "none")
READS = ("activations", "inputs")
SKETCHES = ("auto", "count", "kronecker")
WIDEST = 2**20
"""Most hidden units: a layer of more asks for terabytes."""
OBJECTIVE = having("an objective such as NestedLoRA()", "gradient", "loss")
WIDE = 2**14
"""Outputs c·k of the built-in network above which it gets a bottleneck."""
LEARNING_STREAM = 2**32
"""Added to the seed, so that batches are not drawn like the Jacobian's rows."""


@dataclass(frozen=True)
class NeuralEF:
    r"""A network learns the k leading eigenfunctions of the NTK from Jacobian products.

    1. **Inputs**: `num_inputs` training inputs, at least half of them changed by `augment`.
    2. **Kernel**: the NTK is restricted to the span of `num_directions` sampled rows of the
       Jacobian, S(x) = J(x)V, so every input's Jacobian is computed once, or a sketch of it.
       κ ≈ SSᵀ within that span, which must be larger than `rank`; what lies outside counts as
       residual.
    3. **Network**: ψ reads frozen activations of the classifier, or the inputs themselves. It
       starts from `teacher`: regression onto the k leading eigenfunctions of SSᵀ on those inputs;
       `training`, if given, then minimises `objective` on ψ and Tψ.
    4. **Rayleigh-Ritz** in float64 over all inputs gives φ = ψA√μ.
    5. **Residual**: a second network learns R = κ(x, x) − φφᵀ by regression: its log diagonal
       ("diag"), or a factor L with R = LLᵀ ("factor").

    After `fit` no Jacobian is needed, and nothing of size p is kept. Memory while fitting:
    num_inputs·q·num_directions numbers for S, q being c, or 8 where c is more than
    num_directions + 64; num_inputs·c² for the blocks κ(x, x) where they fit (a Jacobian c·p, too,
    if rows are made whole); sketches of 1,000 rows, which give the directions; plus one chunk. See
    `ELLA.plan`.

    Attributes:
        rank: k.
        objective: What `training` minimises; `NestedLoRA` or `NeuralEFObjective`.
        network: Makes the eigen-network: `(num_inputs, (c, k), generator)` ↦ a module with outputs
            (n, c, k), with first weights from the generator (or the global one, which is seeded
            and restored). One that has a method `standardize` is given all it will learn from.
            None makes a `ResidualMLP` of `width` and `depth`.
        reads: What the network is fed: "activations", vectors (n, d); or "inputs", which have to
            be one tensor, and `num_inputs` is how many numbers one example holds.
        num_inputs: Inputs to learn from.
        augment: Makes inputs that look unseen; None uses each training input once, as it is.
        num_directions: Leading directions of the Jacobian's rows, which carry the kernel.
        sketch: How rows become few numbers: "count" makes and folds whole rows; "kronecker" never
            makes them, so that a row costs a backward pass through activations alone, but norms
            are estimates; "auto" takes that from 2²² weights on where the model allows it.
        width: Hidden units of the default network.
        depth: Its hidden layers; 0 leaves a linear map.
        bottleneck: Its units before the outputs where those are more than 16,384 (c·k, as with
            256 classes and k = 64), of which its last layer would be nearly all; None for none.
        teacher: Training on the teacher; None skips it.
        training: Training on the objective; None, the default, skips it, as the teacher alone was
            as good or better wherever both were measured (experiments/eigenfunctions.md).
        residual: "diag", "factor" (a learned c×r factor, nearer to the full blocks) or "none".

    Reference: NeuralEF: Deconstructing Kernels by Deep Neural Networks (Deng et al., 2022),
    https://arxiv.org/abs/2205.00165
    """

    rank: int = 64
    objective: Objective = field(default_factory=NestedLoRA)
    network: NetworkFactory | None = None
    reads: str = "activations"
    num_inputs: int = 10_000
    augment: Augmentation | None = field(default_factory=Perturb)
    num_directions: int = 256
    sketch: str = "auto"
    width: int = 256
    depth: int = 2
    bottleneck: int | None = 128
    teacher: Training | None = field(default_factory=lambda: Training(weight_decay=0.3))
    training: Training | None = None
    residual: str = "diag"

    def __post_init__(self) -> None:
        counts = {"rank": COUNT, "num_inputs": COUNT, "num_directions": COUNT}
        sizes = {"width": whole(1, WIDEST), "depth": whole(0, MAX_DEPTH)}
        trainings = dict.fromkeys(("teacher", "training"), optional(instance(Training)))
        functions = dict.fromkeys(("network", "augment"), optional(FUNCTION))
        settle(self, **counts, **sizes, **trainings, **functions)
        settle(self, bottleneck=optional(whole(1, WIDEST)))
        settle(self, objective=OBJECTIVE, reads=one_of(*READS), sketch=one_of(*SKETCHES))
        check_residual(self.residual)
        if self.teacher is None and self.training is None:
            raise ValueError("NeuralEF needs `teacher` or `training`; both are None.")

    def fit(
        self, linearized: Linearized, loader: Loader | Batches, *, seed: int, progress: bool
    ) -> NeuralFeatures:
        """See `EigenfunctionMethod.fit`.

        Raises:
            ValueError: If the data carry fewer than `rank` directions, the network cannot read the
                inputs, or `network` returns another shape.
        """
        batches = as_batches(loader, linearized.network)
        sample = self.sample(linearized, batches, seed=seed, progress=progress)
        processes = batches.processes
        if processes.size == 1:
            return self.learn(sample, seed=seed, progress=progress).planned(sample.plan)
        # One learns for all: not every device computes the same twice.
        state = None
        if processes.rank == 0:
            state = self.learn(sample, seed=seed, progress=progress).state().to("cpu")
        state = processes.agreed(state).to(linearized.device)
        found = NeuralFeatures.restore(linearized.network, state, self.network)
        return found.planned(sample.plan)

    def sample(
        self, linearized: Linearized, loader: Loader | Batches, *, seed: int, progress: bool
    ) -> KernelSample:
        """The dear half of `fit`: one pass over `num_inputs` inputs with their Jacobians.

        Raises:
            ValueError: If the data carry fewer than `rank` directions.
        """
        generator, network = torch.Generator().manual_seed(seed), linearized.network
        batches = as_batches(loader, network)
        inputs, processes = self._collect(batches, generator), batches.processes
        if self.reads == "inputs" and processes.size > 1:
            raise ValueError(
                'reads="inputs" learns from the inputs themselves, which stay where they are in '
                'several processes. Use reads="activations".'
            )
        taps = choose_taps(network, *inputs.parts[:3]) if inputs.parts else None
        return sample_kernel(
            linearized,
            inputs,
            FeatureTaps(network, processes.agreed(taps)),
            rank=self.rank,
            num_directions=self.num_directions,
            sketch=self.sketch,
            generator=generator,
            batches=batches,
            progress=progress,
        )

    def learn(self, sample: KernelSample, *, seed: int, progress: bool) -> NeuralFeatures:
        """The other half: train the networks. One sample serves many ranks and settings.

        Raises:
            ValueError: If `residual` needs blocks that the sample lacks, the sample spans fewer
                than `rank` directions, the network cannot read the inputs, or `network` returns
                another shape.
        """
        if self.residual == "factor":
            exact_blocks(sample)  # that is, fail before the long part
        rows = sample.outputs
        if self.training is not None and rows is not None:
            raise ValueError(
                f"`training` needs the kernel at all outputs, but of {sample.num_outputs} only "
                f"{rows.shape[1]} were sampled for each input. Use training=None."
            )
        target = sample.teacher(self.rank)
        inputs = self._fed(sample)
        made = Made(self.reads, inputs[0].numel(), (sample.num_outputs, self.rank))
        generator = torch.Generator().manual_seed(seed + LEARNING_STREAM)
        network = self._network(made, inputs, sample.activations, generator)
        if self.teacher is not None:
            known = regression(inputs, target, rows=rows, generator=generator)
            train(network, known, self.teacher, generator=generator, progress=progress)
        if self.training is not None:
            problem = Samples(FeatureKernel(), inputs, sample.kernel_features, generator=generator)
            loss = SpectralLoss(problem, self.objective)
            train(network, loss, self.training, generator=generator, progress=progress)
        psi = evaluate(network, inputs, rows)
        root = sample.weight**0.5
        eigenvalues, mixing = feature_ritz(psi * root, sample.kernel_features * root)
        basis = Eigenbasis(network, mixing, eigenvalues)
        learned = self._fit_residual(sample, basis.scaled(psi), generator, progress)
        basis = replace(basis, eigenvalues=eigenvalues / sample.scale**2)
        return NeuralFeatures(sample.taps, basis.to(psi), learned, made)

    def restore(
        self, network: Network, state: State, *, trainable: tuple[str, ...], memory_budget: int
    ) -> NeuralFeatures:
        """See `EigenfunctionMethod.restore`.

        Raises:
            ValueError: If the file was made with a network of the user's and none is given.
        """
        return NeuralFeatures.restore(network, state, self.network)

    def _collect(self, batches: Batches, generator: torch.Generator) -> Collection:
        """`num_inputs` inputs: half, or one pass if that is less, as they are; then augmented.

        Each of several processes takes its share, and augments with draws of its own.
        """
        parts: list[Inputs] = []
        count, processes = 0, batches.processes
        wanted = len(range(processes.rank, self.num_inputs, processes.size))
        draws = generator
        if processes.size > 1:  # `generator` has to stay the same in all
            draws = torch.Generator().manual_seed(generator.initial_seed() + 1 + processes.rank)
        plain = -(-wanted // 2)
        while count < wanted:
            before = count
            for x, _ in batches.labelled():
                if count >= plain and self.augment is not None:
                    x = self.augment(x, draws)
                parts.append(take(x, slice(wanted - count)))
                count += num_examples(parts[-1])
                if count >= wanted:
                    break
            if self.augment is None or count == before:
                break
            plain = 0
        batches.end()
        return Collection.of(parts)

    def _fed(self, sample: KernelSample) -> Tensor:
        """What the network reads of the sample."""
        if self.reads == "activations":
            return sample.activations
        inputs = sample.inputs.parts[0]
        if not isinstance(inputs, Tensor) or len(sample.inputs.parts) > 1:
            raise ValueError(
                'reads="inputs" needs inputs that are one tensor, of one shape in all batches; '
                f'got {type(inputs).__name__}. Use reads="activations".'
            )
        if self.network is None and inputs.ndim != 2:
            raise ValueError(
                f"The built-in network reads vectors; got inputs of shape (n, "
                f"{', '.join(map(str, inputs.shape[1:]))}). Pass `network`, or use "
                'reads="activations".'
            )
        return inputs

    def _network(
        self, made: Made, inputs: Tensor, like: Tensor, generator: torch.Generator
    ) -> nn.Module:
        """A network with its first weights, in the dtype and on the device of a tensor."""
        network = made.by(self.network or self._built_in, generator).to(like)
        if isinstance(network, Standardizing):
            network.standardize(inputs)
        with torch.no_grad():
            psi = network.eval()(inputs[:2])
        if psi.shape[1:] != made.shape:
            c, k = made.shape
            raise ValueError(
                f"`network` must return (n, c, k) = (n, {c}, {k}); got {tuple(psi.shape)}."
            )
        return network

    def _built_in(
        self, num_inputs: int, shape: tuple[int, int], generator: torch.Generator
    ) -> nn.Module:
        c, k = shape
        return ResidualMLP(
            num_inputs,
            shape,
            width=self.width,
            depth=self.depth,
            bottleneck=self.bottleneck if c * k > WIDE else None,
            generator=generator,
        )

    def _fit_residual(
        self,
        data: KernelSample,
        phi: Tensor,
        generator: torch.Generator,
        progress: bool,
    ) -> LearnedResidual | None:
        """The second network, in the units of the kernel."""
        learned: LearnedResidual
        settings = self.teacher or self.training or Training()
        read = data.activations
        if self.residual == "none":
            return None
        if self.residual == "factor":
            learned = FactorResidual.fitted(
                read,
                phi,
                exact_blocks(data),
                settings,
                min(self.width, 256),
                generator=generator,
                progress=progress,
            )
        else:
            learned = DiagonalResidual.fitted(
                read,
                phi,
                data.diagonal,
                settings,
                min(self.width, 128),
                rows=data.outputs,
                num_outputs=data.num_outputs,
                generator=generator,
                progress=progress,
            )
        learned.rescale(data.scale**-2)
        return learned


@runtime_checkable
class Standardizing(Protocol):
    """A network that can be told the mean and scale of what it reads."""

    def standardize(self, features: Tensor) -> None:
        """Set both from examples."""


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
    one_of(*RESIDUALS)("residual", residual)


def exact_blocks(sample: KernelSample) -> Tensor:
    """κ(x, x) of a sample, shape (n, c, c).

    Raises:
        ValueError: If there were too many outputs for them.
    """
    if sample.blocks is None:
        raise ValueError(
            'residual="factor" needs exact Jacobians, which are too dear for '
            f'{sample.num_outputs} outputs of a network of this size. Use residual="diag".'
        )
    return sample.blocks
