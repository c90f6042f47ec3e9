"""What is dear to compute of a network at an image: computed once, kept on disk, shared.

Half of the methods of the CIFAR-10 study differ only in what they do with the same Jacobians or
activations (rank, residual, tuning). A `Store` keeps what a pass leaves, a few kilobytes an image,
under a name made of the image itself, so that a method that comes second, or a run that was
killed, reads it instead. What the pass took is kept with it and charged to every method that reads
it, so shared work is not mistaken for cheap work.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from _given import digest, reduced
from _report import PeakMemory, cpu_timed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ella import FeatureTaps, Linearized, LogitGaussian, Network, NeuralEF, Nystrom, State, Tap
from ella.eigenfunctions import JacobianProjection, KernelSample, NeuralFeatures


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
        found = self.known(name)
        if found is not None:
            return found
        path = self.folder / f"{name}.safetensors"
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

    def known(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What is kept under a name; None if nothing is."""
        path = self.folder / f"{name}.safetensors"
        if not (self.open and path.exists()):
            return None
        with safe_open(path, framework="pt") as file:
            kept = json.loads((file.metadata() or {})["kept"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.seconds += kept["seconds"]
        self.bytes = max(self.bytes, kept["bytes"])
        return tensors, kept["settings"]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Store":
        """Itself: copies of a model that holds a store use the same one."""
        return self

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
        seed: int,
        progress: bool,
    ) -> NeuralFeatures:
        """See `EigenfunctionMethod.fit`."""

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            state = self.method.sample(linearized, loader, seed=seed, progress=progress).state()
            return dict(state.tensors), dict(state.settings)

        options = (self.method.num_inputs, self.method.num_directions, seed)
        name = "sample-{}-{}-{}".format(*options)
        state = State(*self.store.get(name, make, PeakMemory("cpu")))
        sample = KernelSample.restore(linearized.network, state.to(linearized.device))
        taps = KeptTaps(linearized.network, sample.taps.taps, self.store)
        return self.method.learn(replace(sample, taps=taps), seed=seed, progress=progress)


class KeptTaps(FeatureTaps):
    """Logits and activations, from disk for images that were seen before.

    Args:
        network: The model.
        taps: Where to read.
        store: Of one network.
    """

    def __init__(self, network: Network, taps: list[Tap], store: Store) -> None:
        super().__init__(network, taps)
        self.store = store

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, c) and features (n, d)."""

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            logits, activations = super(KeptTaps, self).__call__(x)
            return {"logits": logits, "activations": activations}, {"penultimate": place}

        place, end = None, 0
        for tap in self.taps:
            start, end = end, end + (tap.width or 0)
            if (tap.module, tap.side) == ("fc", "input"):
                place = [start, end]
        kept = self.store.get(f"activations-{digest(x)}", make)[0]
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
        return self.fc(self.penultimate(x)) if self.store.open else self.network(x)

    def penultimate(self, x: Tensor) -> Tensor:
        """What the last layer reads, (n, d); a part of the activations, if those are kept."""
        name = digest(x)
        whole = self.store.known(f"activations-{name}")
        if whole is not None and whole[1].get("penultimate"):
            start, end = whole[1]["penultimate"]
            return whole[0]["activations"][:, start:end].to(x.device)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            read: list[Tensor] = []
            handle = self.network.fc.register_forward_pre_hook(
                lambda _, args: read.append(args[0])
            )
            try:
                self.network(x)
            finally:
                handle.remove()
            return {"penultimate": read[0]}, {}

        kept = self.store.get(f"penultimate-{name}", make)[0]
        return kept["penultimate"].to(x.device)


@dataclass(frozen=True)
class ProjectedOnce:
    """Nyström of a large rank and its exact residual, kept for every image; smaller ones follow.

    The first k of the large rank's functions are those of rank k on the same rows.

    Attributes:
        method: The settings of the large rank.
        rank: k.
        store: Of one network.
        residual: "diag", "exact" or "none".
    """

    method: Nystrom
    rank: int
    store: Store
    residual: str = "diag"

    def fit(
        self,
        linearized: Linearized,
        loader: Iterable[Any],
        *,
        seed: int,
        progress: bool,
    ) -> "KeptProjection":
        """See `EigenfunctionMethod.fit`."""

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            fitted = self.method.fit(linearized, loader, seed=seed, progress=progress)
            return dict(fitted.state().tensors), {}

        name = f"directions-{self.method.subsample}-{seed}"
        kept, _ = self.store.get(name, make, PeakMemory("cpu"))
        directions = kept["directions"].to(linearized.device)
        whole = JacobianProjection(linearized, directions, "exact")
        return KeptProjection(whole, self.rank, self.residual, self.store)


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
        return digest(self.whole.directions)

    def __call__(self, x: Tensor) -> LogitGaussian:
        """Evaluate at n inputs."""
        if not self.store.open:
            return self.alone()(x)

        def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
            whole = self.whole(x)
            return {"logits": whole.mean, "phi": whole.factor, "residual": whole.residual}, {}

        kept, _ = self.store.get(f"features-{self.digest}-{digest(x)}", make)
        whole = LogitGaussian(kept["logits"], kept["phi"], kept["residual"]).to(x.device)
        return reduced(whole, self.rank, self.residual)

    def alone(self) -> JacobianProjection:
        """The method as a user has it: nothing kept, and no more computed than it needs."""
        directions = self.whole.directions[: self.rank]
        return JacobianProjection(self.whole.linearized, directions, self.residual)

    def state(self) -> State:
        """See `Eigenfunctions.state`."""
        return self.alone().state()
