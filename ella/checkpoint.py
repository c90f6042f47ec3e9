"""Finished parts of a long computation in a folder, so that it can go on after a crash."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ella.inputs import Inputs, input_tensors, model_inputs
from ella.processes import Processes
from ella.saving import Json, State, read, write

SUFFIX = ".ella"


class Checkpoint:
    """Parts under names; each is written whole or not at all, and read by whoever comes next.

    Args:
        folder: Made if it is not there; None keeps nothing.
        about: Everything that the parts depend on: settings, model, data.

    Raises:
        ValueError: If the folder holds parts of something else.
        OSError: If it cannot be made or read.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, about: Json = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.glob(f"*{SUFFIX}"))[:1]:
                self._read(path)

    def kept(self, name: str, device: torch.device | str = "cpu") -> State | None:
        """A part, if it is there.

        Raises:
            ValueError: If it belongs to something else.
        """
        path = self._path(name)
        return None if path is None or not path.exists() else self._read(path).to(device)

    def kept_by_all(
        self, name: str, processes: Processes, device: torch.device | str
    ) -> State | None:
        """A part, if every process has its own: else all compute it together, once more."""
        state = self.kept(name, device)
        return state if all(processes.each(state is not None)) else None

    def keep(self, name: str, state: State) -> None:
        """Write a part, atomically."""
        path = self._path(name)
        if path is not None:
            write(path, State(state.tensors, {**state.settings, "checkpoint": self.key}))

    def drop(self, prefix: str) -> None:
        """Remove parts that are not needed any more."""
        if self.folder is not None:
            for path in self.folder.glob(f"{prefix}*{SUFFIX}"):
                path.unlink()

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}{SUFFIX}"

    def _read(self, path: Path) -> State:
        _, state = read(path)
        if state.settings.get("checkpoint") != self.key:
            raise ValueError(
                f"`checkpoint` {os.fspath(path.parent)!r} holds parts of a fit with other data, "
                f"another model or other settings (or with batches in another order: shuffle with "
                f"a seeded generator, or not at all). Use another folder, or remove this one to "
                f"start again."
            )
        return state


def digest_of(tensors: Iterable[Tensor], before: str = "") -> str:
    """SHA-256 of tensors, after those of another digest."""
    digest = hashlib.sha256(before.encode())
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def batch_digest(x: Inputs, y: Tensor, before: str = "") -> str:
    """The same of one batch."""
    return digest_of([*input_tensors(model_inputs(x)), y], before)
