"""What is dear to compute of a network at an image: computed once, kept on disk, shared.

Half of the methods of the CIFAR-10 study differ only in what they do with the same Jacobians or
activations (rank, residual, tuning). A `Store` keeps what a pass leaves, a few kilobytes an image,
under a name made of the image itself, so that a method that comes second, or a run that was
killed, reads it instead. What the pass took is kept with it and charged to every method that reads
it, so shared work is not mistaken for cheap work.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from _posterior import reduced
from _report import PeakMemory, cpu_timed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ella import NeuralEF, Nystrom
from ella.activations import FeatureTaps, Tap, hooked
from ella.eigenfunctions import Features
from ella.eigenfunctions.neuralef import NeuralFeatures
from ella.eigenfunctions.nystrom import JacobianProjection
from ella.eigenfunctions.sample import KernelSample
from ella.linearize import Linearized


@dataclass
class Store:
    """Tensors on disk, by name, with what they cost.

    Attributes:
        folder: Where the files are.
        seconds: CPU seconds that all reads so far saved.
        bytes: The largest memory that any of them would have taken.
        open: Whether to read and write; closed, everything is computed.
    """

    folder: Path
    seconds: float = 0.0
    bytes: float = 0.0
    open: bool = True

    def get(
        self,
        name: str,
        make: Callable[[], tuple[dict[str, Tensor], dict[str, Any]]],
        memory: PeakMemory | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON-able settings of that name, made and kept if they are not there.

        Args:
            name: Tells it from all others of this network.
            make: Computes both.
            memory: Watches what it takes, where that counts.
        """
        if not self.open:
            return make()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as file:
                kept = json.loads((file.metadata() or {})["kept"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.seconds += kept["seconds"]
            self.bytes = max(self.bytes, kept["bytes"])
            return tensors, kept["settings"]
        with memory or nullcontext():
            (tensors, settings), seconds = cpu_timed(make)
        cost = {"seconds": seconds, "bytes": memory.bytes if memory else 0}
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        metadata = {"kept": json.dumps({**cost, "settings": settings})}
        partial = path.with_suffix(".partial")  # a killed run leaves no half file behind
        save_file(whole, partial, metadata=metadata)
        partial.rename(path)
        return tensors, settings

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Compute everything, as for timing."""
        self.open = False
        try:
            yield
        finally:
            self.open = True


@dataclass(frozen=True)
class SampledOnce:
    """NeuralEF whose pass over the Jacobians is kept; the networks are trained for each residual.

    Attributes:
        method: The settings.
        store: Of one network.
    """

    method: NeuralEF
    store: Store

    def fit(
        self,
        linearized: Linearized,
        loader: Iterable[Any],
        *,
        residual: str,
        seed: int,
        progress: bool,
    ) -> NeuralFeatures:
        """See `EigenfunctionMethod.fit`."""

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            sample = self.method.sample(linearized, loader, seed=seed, progress=progress)
            return _unpacked(sample)

        options = (self.method.num_inputs, self.method.num_directions, seed)
        name = "sample-{}-{}-{}".format(*options)
        tensors, settings = self.store.get(name, make, PeakMemory("cpu"))
        sample = _packed(linearized, tensors, settings, self.store)
        return self.method.learn(sample, residual=residual, seed=seed, progress=progress)


def _unpacked(sample: KernelSample) -> tuple[dict[str, Tensor], dict[str, Any]]:
    named = ("inputs", "activations", "kernel_features", "diagonal", "blocks", "axes")
    tensors = {name: getattr(sample, name) for name in named}
    return tensors, {"taps": [asdict(tap) for tap in sample.taps.taps], "scale": sample.scale}


def _packed(
    linearized: Linearized, tensors: dict[str, Tensor], settings: dict[str, Any], store: Store
) -> KernelSample:
    taps = KeptTaps(linearized, [Tap(**tap) for tap in settings["taps"]], store)
    here = {name: tensor.to(linearized.device) for name, tensor in tensors.items()}
    return KernelSample(taps=taps, scale=settings["scale"], **here)


class KeptTaps(FeatureTaps):
    """Logits and activations, from disk for images that were seen before.

    Args:
        linearized: The model.
        taps: Where to read.
        store: Of one network.
    """

    def __init__(self, linearized: Linearized, taps: list[Tap], store: Store) -> None:
        super().__init__(linearized, taps)
        self.store = store

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, c) and features (n, d)."""

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            logits, activations = super(KeptTaps, self).__call__(x)
            return {"logits": logits, "activations": activations}, {}

        kept = self.store.get(f"activations-{_digest(x)}", make)[0]
        return kept["logits"].to(x.device), kept["activations"].to(x.device)


class KeptBody(nn.Module):
    """A classifier with a last layer `fc`, whose input is on disk for images seen before.

    Args:
        network: The classifier.
        store: Of this network.
    """

    def __init__(self, network: nn.Module, store: Store) -> None:
        super().__init__()
        self.network = network
        self.fc = network.fc
        self.store = store

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, c)."""
        if not self.store.open:
            return self.network(x)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            read: list[Tensor] = []
            with hooked([(self.network.fc, lambda module, args, output: read.append(args[0]))]):
                self.network(x)
            return {"penultimate": read[0]}, {}

        kept = self.store.get(f"penultimate-{_digest(x)}", make)[0]
        return self.fc(kept["penultimate"].to(x.device))


@dataclass(frozen=True)
class ProjectedOnce:
    """Nyström of a large rank and its exact residual, kept for every image; smaller ones follow.

    The first k of the large rank's functions are those of rank k on the same rows.

    Attributes:
        method: The settings of the large rank.
        rank: k.
        store: Of one network.
    """

    method: Nystrom
    rank: int
    store: Store

    def fit(
        self,
        linearized: Linearized,
        loader: Iterable[Any],
        *,
        residual: str,
        seed: int,
        progress: bool,
    ) -> "KeptProjection":
        """See `EigenfunctionMethod.fit`."""

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            fitted = self.method.fit(
                linearized, loader, residual="exact", seed=seed, progress=progress
            )
            return fitted.tensors(), {}

        name = f"directions-{self.method.subsample}-{seed}"
        kept, _ = self.store.get(name, make, PeakMemory("cpu"))
        directions = kept["directions"].to(linearized.device)
        whole = JacobianProjection(linearized, directions, "exact")
        return KeptProjection(whole, self.rank, residual, self.store)


@dataclass(frozen=True)
class KeptProjection:
    """φ(x) and R(x) of `ProjectedOnce`, from disk for images that were seen before.

    Attributes:
        whole: The large rank, with the exact residual.
        rank: k.
        residual: "diag", "exact" or "none".
        store: Where they are kept.
    """

    whole: JacobianProjection
    rank: int
    residual: str
    store: Store

    @cached_property
    def digest(self) -> str:
        """Of the directions, part of the names of the files."""
        return _digest(self.whole.directions)

    def __call__(self, x: Tensor) -> Features:
        """Evaluate at n inputs."""
        if not self.store.open:
            return self.alone()(x)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            return self.whole(x)._asdict(), {}

        tensors, _ = self.store.get(f"features-{self.digest}-{_digest(x)}", make)
        kept = Features(**{name: tensor.to(x.device) for name, tensor in tensors.items()})
        return reduced(kept, self.rank, self.residual)

    def alone(self) -> JacobianProjection:
        """The method as a user has it: nothing kept, and no more computed than it needs."""
        directions = self.whole.directions[: self.rank]
        return JacobianProjection(self.whole.linearized, directions, self.residual)

    def tensors(self) -> dict[str, Tensor]:
        """See `Eigenfunctions.tensors`."""
        return self.alone().tensors()

    def settings(self) -> dict[str, Any]:
        """See `Eigenfunctions.settings`."""
        return self.alone().settings()


def _digest(tensor: Tensor) -> str:
    values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:20]
