"""Neural eigenfunctions of the NTK: φ(x) for the price of one forward pass."""

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ella._checks import (
    Inputs,
    batches,
    check_choice,
    concatenate,
    num_examples,
    slices,
    take,
)
from ella.eigenfunctions.augmentation import Augmentation, Perturb
from ella.eigenfunctions.base import Features
from ella.features import FeatureTaps, Tap, choose_taps
from ella.linearize import Linearized
from ella.spectral import (
    FeatureKernel,
    Moments,
    NestedLoRA,
    Objective,
    Regression,
    ResidualMLP,
    Teacher,
    Training,
    numerical_eigenpairs,
    rayleigh_ritz,
    train,
)

RESIDUALS = ("diag", "none")
TOP_EIGENVALUE = 10.0
"""The kernel is rescaled so that its largest eigenvalue is this while networks train on it."""
FLOOR = 1e-3
"""Smallest share of κ(x, x) that the residual variance is taken to be."""
PROBES = 64
"""Random directions that estimate κ(x, x) when c is too large for exact Jacobians."""


@dataclass(frozen=True)
class NeuralEF:
    r"""A network learns the k leading eigenfunctions of the NTK from Jacobian products.

    1. **Inputs**: `num_inputs` training inputs, all but the first pass through the loader changed
       by `augment`.
    2. **Kernel**: the NTK is restricted to the span of `num_directions` sampled rows of the
       Jacobian, S(x) = J(x)V, so every input's Jacobian is computed once. κ ≈ SSᵀ within that
       span, which must be larger than `rank`; what lies outside counts as residual.
    3. **Network**: ψ reads frozen activations of the classifier (or, if `network` is given, the
       inputs themselves). It starts from `teacher`: regression onto the k leading eigenfunctions
       of SSᵀ on those inputs; `training`, if given, then minimises `objective` on ψ and Tψ.
    4. **Rayleigh-Ritz** in float64 over all inputs gives φ = ψA√μ.
    5. **Residual**: a second network learns log(diag κ(x, x) − diag φφᵀ) by regression.

    After `fit` no Jacobian is needed, and nothing of size p is kept. Memory while fitting:
    num_inputs·c·num_directions numbers for S, num_directions·p for the rows, plus one chunk.

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
        teacher: Training on the teacher; None skips it.
        training: Training on the objective; None, the default, skips it, as the teacher alone was
            as good or better wherever both were measured (experiments/README.md).

    Reference: NeuralEF: Deconstructing Kernels by Deep Neural Networks (Deng et al., 2022),
    https://arxiv.org/abs/2205.00165
    """

    rank: int = 64
    objective: Objective = field(default_factory=NestedLoRA)
    network: nn.Module | None = None
    num_inputs: int = 10_000
    augment: Augmentation | None = field(default_factory=Perturb)
    num_directions: int = 256
    width: int = 512
    teacher: Training | None = field(default_factory=lambda: Training(weight_decay=0.3))
    training: Training | None = None

    def __post_init__(self) -> None:
        for name in ("rank", "num_inputs", "num_directions", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")
        if self.teacher is None and self.training is None:
            raise ValueError("NeuralEF needs `teacher` or `training`; both are None.")

    def fit(
        self,
        linearized: Linearized,
        loader: Iterable[Any],
        *,
        residual: str,
        seed: int,
        progress: bool,
    ) -> "NeuralFeatures":
        """See `EigenfunctionMethod.fit`.

        Raises:
            ValueError: If `residual` is "exact", the data carry fewer than `rank` directions, or
                `network` returns another shape.
        """
        check_residual(residual)
        generator = torch.Generator().manual_seed(seed)
        inputs = self._collect(linearized, loader, generator)
        taps = FeatureTaps(linearized, choose_taps(linearized, inputs))
        data = self._project(linearized, inputs, taps, generator, progress)
        psi_inputs = data.activations if self.network is None else inputs
        network = self._network(data, generator)
        self._check_network(network, psi_inputs, data)
        options: dict[str, Any] = {"generator": generator, "progress": progress}
        if self.teacher is not None:
            target = data.kernel_features @ data.leading(self.rank)
            train(network, Teacher(), psi_inputs, target, Regression(), self.teacher, **options)
        if self.training is not None:
            s = data.kernel_features
            train(
                network, FeatureKernel(), psi_inputs, s, self.objective, self.training, **options
            )
        psi = evaluate(network, psi_inputs)
        mixing = self._ritz(psi, data)
        log_residual = None
        if residual == "diag":
            log_residual = self._fit_residual(data, psi @ mixing, options)
        return NeuralFeatures(
            taps, network, mixing / data.scale, log_residual, reads_inputs=self.network is not None
        )

    def restore(
        self, linearized: Linearized, tensors: dict[str, Tensor], settings: dict[str, Any]
    ) -> "NeuralFeatures":
        """See `EigenfunctionMethod.restore`.

        Raises:
            ValueError: If the file was made with a network of the user's and none is given.
        """
        taps = FeatureTaps(linearized, [Tap(**tap) for tap in settings["taps"]])
        network: nn.Module
        if settings["reads_inputs"]:
            if self.network is None:
                raise ValueError(
                    "The file holds weights of a custom eigen-network. Pass "
                    "`eigenfunctions=NeuralEF(network=...)` with the same module to load."
                )
            network = copy.deepcopy(self.network)
        else:
            network = _rebuild(settings["network"])
        log_residual = None
        if settings["log_residual"] is not None:
            log_residual = LogResidual(_rebuild(settings["log_residual"]))
        like = tensors["mixing"]
        for name, module in (("network", network), ("log_residual", log_residual)):
            if module is not None:
                # In the file's dtype first, so that no digit of the weights is lost.
                module.to(like).load_state_dict(_with_prefix(tensors, f"{name}."))
                module.eval().requires_grad_(False)
        return NeuralFeatures(
            taps, network, like, log_residual, reads_inputs=settings["reads_inputs"]
        )

    def _collect(
        self, linearized: Linearized, loader: Iterable[Any], generator: torch.Generator
    ) -> Inputs:
        """`num_inputs` inputs: one plain pass through the loader, then augmented passes."""
        parts: list[Inputs] = []
        count = 0
        changed = False
        while count < self.num_inputs:
            before = count
            for x, _ in batches(loader, linearized.device):
                x = self.augment(x, generator) if changed and self.augment is not None else x
                parts.append(take(x, slice(self.num_inputs - count)))
                count += num_examples(parts[-1])
                if count >= self.num_inputs:
                    break
            if self.augment is None or count == before:
                break
            changed = True
        return concatenate(parts)

    def _project(
        self,
        linearized: Linearized,
        inputs: Inputs,
        taps: FeatureTaps,
        generator: torch.Generator,
        progress: bool,
    ) -> "_KernelData":
        """S(x) = J(x)V, diag κ(x, x) and activations at all inputs, one pass."""
        n, c = num_examples(inputs), linearized.num_outputs(inputs)
        row_bytes = linearized.num_parameters * linearized.dtype.itemsize
        m = min(self.num_directions, n, 4 * linearized.memory_budget // row_bytes)
        chosen = torch.randperm(n, generator=generator)[: max(m, 1)]
        outputs = torch.randint(c, (len(chosen),), generator=generator).to(linearized.device)
        rows = linearized.row_gradients(take(inputs, chosen), outputs)
        values, vectors = numerical_eigenpairs(rows.double() @ rows.double().T)
        if len(values) < self.rank:
            raise ValueError(
                f"`rank` is {self.rank}, but the {len(rows)} sampled rows of the Jacobian span "
                f"only {len(values)} directions. Lower `rank`, or raise `num_directions` or the "
                f"number of inputs."
            )
        mix = (vectors / values.sqrt()).to(rows)
        exact = c <= len(rows) + PROBES
        probes = None if exact else _probes(linearized, generator)
        activations, features, diagonals = [], [], []
        size = 256
        bar = tqdm(slices(n, size), "jacobians", -(-n // size), disable=not progress, leave=False)
        for part in bar:
            x = take(inputs, part)
            activations.append(taps(x)[1])
            if probes is not None:
                features.append(linearized.jvp(x, rows) @ mix)
                diagonals.append(linearized.jvp(x, probes).square().mean(-1))
                continue
            for _, jacobian in linearized.jacobian_chunks(x):
                features.append((jacobian @ rows.T) @ mix)
                diagonals.append(jacobian.square().sum(-1))
        return _KernelData.of(torch.cat(activations), torch.cat(features), torch.cat(diagonals))

    def _network(self, data: "_KernelData", generator: torch.Generator) -> nn.Module:
        if self.network is not None:
            return copy.deepcopy(self.network).requires_grad_(True)
        c = data.diagonal.shape[1]
        d = data.activations.shape[1]
        network = ResidualMLP(d, (c, self.rank), width=self.width, generator=generator)
        network.to(data.activations).standardize(data.activations)
        return network

    def _check_network(self, network: nn.Module, inputs: Inputs, data: "_KernelData") -> None:
        with torch.no_grad():
            psi = network.eval()(take(inputs, slice(2)))
        c = data.diagonal.shape[1]
        if psi.shape[1:] != (c, self.rank):
            raise ValueError(
                f"`network` must return (n, c, k) = (n, {c}, {self.rank}); got {tuple(psi.shape)}."
            )

    def _ritz(self, psi: Tensor, data: "_KernelData") -> Tensor:
        """A√μ, shape (k, k'): Rayleigh-Ritz with E[ψᵀTψ] = WWᵀ, W = E[ψᵀS]."""
        flat, s = psi.double().flatten(0, 1), data.kernel_features.flatten(0, 1)
        w = flat.new_zeros(self.rank, s.shape[1])
        for part in slices(len(s), 2**16):  # float64 copies of S, a part at a time
            w += flat[part].T @ s[part].double()
        w /= len(psi)
        values, mixing = rayleigh_ritz(Moments(flat.T @ flat, w @ w.T * len(psi), len(psi)))
        return (mixing * values.clamp_min(0).sqrt()).to(psi)

    def _fit_residual(
        self, data: "_KernelData", phi: Tensor, options: dict[str, Any]
    ) -> "LogResidual":
        """Regress log(diag κ − diag φφᵀ) on the activations."""
        outside = torch.maximum(data.diagonal - phi.square().sum(-1), FLOOR * data.diagonal)
        target = outside.clamp_min(torch.finfo(outside.dtype).tiny).log()
        d, c = data.activations.shape[1], target.shape[1]
        network = ResidualMLP(d, (c,), width=min(self.width, 128), generator=options["generator"])
        module = LogResidual(network).to(target)
        module.prepare(data.activations, target)
        targets = module.standardized(target).unsqueeze(-1)
        column = nn.Sequential(network, nn.Unflatten(1, (c, 1)))
        settings = self.teacher or self.training or Training()
        train(column, Teacher(), data.activations, targets, Regression(), settings, **options)
        offset = 2 * torch.log(torch.tensor(data.scale))
        module.location -= offset
        module.highest -= offset
        return module.eval()


class LogResidual(nn.Module):
    """log R(x) from activations; never above the largest value seen in training plus one.

    Args:
        network: From activations (n, d) to standardised log variances (n, c).
    """

    location: Tensor
    spread: Tensor
    highest: Tensor

    def __init__(self, network: ResidualMLP) -> None:
        super().__init__()
        self.network = network
        for name in ("location", "spread", "highest"):
            self.register_buffer(name, torch.zeros(()))

    def prepare(self, activations: Tensor, target: Tensor) -> None:
        """Set all statistics from training values."""
        self.network.standardize(activations)
        self.location.copy_(target.mean())
        self.spread.copy_(target.std().clamp_min(1e-6))
        self.highest.copy_(target.max())

    def standardized(self, target: Tensor) -> Tensor:
        """Targets on the network's scale."""
        return (target - self.location) / self.spread

    def forward(self, activations: Tensor) -> Tensor:
        """Shape (n, c)."""
        value = self.network(activations) * self.spread + self.location
        return torch.minimum(value, self.highest + 1)


class NeuralFeatures:
    """φ(x) = ψ(x)A√μ and R(x) = exp(network), in one forward pass with the logits.

    Args:
        taps: Read the classifier's activations.
        network: ψ.
        mixing: A√μ, shape (k, k').
        log_residual: Network for log R; None drops the residual.
        reads_inputs: Whether ψ reads the inputs instead of the activations.
    """

    def __init__(
        self,
        taps: FeatureTaps,
        network: nn.Module,
        mixing: Tensor,
        log_residual: LogResidual | None,
        *,
        reads_inputs: bool,
    ) -> None:
        self.taps = taps
        self.network = network
        self.mixing = mixing
        self.log_residual = log_residual
        self.reads_inputs = reads_inputs

    @torch.no_grad()
    def __call__(self, x: Inputs) -> Features:
        """Evaluate at n inputs."""
        logits, activations = self.taps(x)
        phi = self.network(x if self.reads_inputs else activations) @ self.mixing
        residual = None if self.log_residual is None else self.log_residual(activations).exp()
        return Features(logits, phi, residual)

    def tensors(self) -> dict[str, Tensor]:
        """See `Eigenfunctions.tensors`."""
        named = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        if self.log_residual is not None:
            state = self.log_residual.state_dict()
            named |= {f"log_residual.{name}": t for name, t in state.items()}
        return {"mixing": self.mixing, **named}

    def settings(self) -> dict[str, Any]:
        """See `Eigenfunctions.settings`."""
        heads = {
            "network": None if self.reads_inputs else self.network,
            "log_residual": None if self.log_residual is None else self.log_residual.network,
        }
        described = {
            name: head.settings() if isinstance(head, ResidualMLP) else None
            for name, head in heads.items()
        }
        return {
            "taps": [asdict(tap) for tap in self.taps.taps],
            "reads_inputs": self.reads_inputs,
            **described,
        }


@dataclass(frozen=True)
class _KernelData:
    """What one pass over the inputs leaves: everything the networks learn from.

    Attributes:
        activations: (n, d).
        kernel_features: S·scale, shape (n, c, r).
        diagonal: diag κ(x, x)·scale², shape (n, c).
        scale: Makes the largest eigenvalue of the kernel `TOP_EIGENVALUE`.
        axes: Eigenvectors of Σ SᵀS, shape (r, r), leading first.
    """

    activations: Tensor
    kernel_features: Tensor
    diagonal: Tensor
    scale: float
    axes: Tensor

    @classmethod
    def of(cls, activations: Tensor, features: Tensor, diagonal: Tensor) -> "_KernelData":
        second = features.new_zeros(features.shape[2], features.shape[2], dtype=torch.float64)
        for part in slices(len(features), 4096):
            wide = features[part].flatten(0, 1).double()
            second += wide.T @ wide
        values, axes = torch.linalg.eigh(second / len(features))
        scale = (TOP_EIGENVALUE / values[-1].item()) ** 0.5
        return cls(
            activations, features * scale, diagonal * scale**2, scale, axes.flip(1).to(features)
        )

    def leading(self, rank: int) -> Tensor:
        """The axes of the leading eigenfunctions, (r, k): t = S @ axes is the teacher."""
        return self.axes[:, :rank]


def check_residual(residual: str) -> None:
    """Networks give "diag" or "none".

    Raises:
        ValueError: For anything else, "exact" included.
    """
    if residual == "exact":
        raise ValueError(
            'NeuralEF learns the diagonal of the residual: use residual="diag" or "none", or '
            'Nystrom with residual="exact".'
        )
    check_choice("residual", residual, RESIDUALS)


@torch.no_grad()
def evaluate(network: nn.Module, inputs: Inputs, size: int = 1024) -> Tensor:
    """Network values at all inputs, in batches, without gradients."""
    network.eval().requires_grad_(False)
    return torch.cat([network(take(inputs, i)) for i in slices(num_examples(inputs), size)])


def _probes(linearized: Linearized, generator: torch.Generator) -> Tensor:
    """Random signs z with E[(Jz)²] = diag JJᵀ, shape (PROBES, p)."""
    shape = (PROBES, linearized.num_parameters)
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8)
    return (2 * signs - 1).to(linearized.device, linearized.dtype)


def _rebuild(settings: dict[str, Any]) -> ResidualMLP:
    """A network to load weights into; its own come from no generator that anyone else uses."""
    return ResidualMLP(**settings, generator=torch.Generator())


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
