"""One format for the values of all stages: named tensors, and settings that are JSON."""

import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ella.arguments import check_path

FORMAT = 2
"""Written now; `read` takes 1, too."""

HALF = (torch.bfloat16, torch.float16)
"""Dtypes in which `State.narrowed` stores."""

DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError)
"""What reading a part of a file raises if the file is not what it says."""

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


@dataclass(frozen=True)
class State:
    """The value of one stage, or of several under names.

    Attributes:
        tensors: By name.
        settings: Everything else.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Mapping[str, "State"], **settings: Json) -> "State":
        """One state that holds several, each as a `part` under its name."""
        tensors = {
            f"{name}.{key}": tensor
            for name, part in parts.items()
            for key, tensor in part.tensors.items()
        }
        return cls(tensors, {**settings, **{n: dict(p.settings) for n, p in parts.items()}})

    def part(self, name: str) -> "State":
        """What `joined` put under a name."""
        prefix = f"{name}."
        tensors = {
            key.removeprefix(prefix): t
            for key, t in self.tensors.items()
            if key.startswith(prefix)
        }
        return State(tensors, self._typed(name, dict))

    def to(self, device: torch.device | str) -> "State":
        """The same with its tensors on a device."""
        return State({name: t.to(device) for name, t in self.tensors.items()}, self.settings)

    def narrowed(self, names: Sequence[str], dtype: torch.dtype) -> "State":
        """The same with matrices of some parts in half precision; vectors stay as they are.

        Args:
            names: Of the parts.
            dtype: torch.bfloat16 or torch.float16.

        Raises:
            ValueError: If the dtype is another, no such matrix is there, or one does not fit.
        """
        if dtype not in HALF:
            known = " or ".join(map(str, HALF))
            raise ValueError(f"`dtype` must be {known}, or None for all digits; got {dtype!r}.")
        prefixes = tuple(f"{name}." for name in names)
        large = {
            name: tensor.to(dtype)
            for name, tensor in self.tensors.items()
            if name.startswith(prefixes) and tensor.ndim > 1 and tensor.is_floating_point()
        }
        if not large:
            raise ValueError(
                "`dtype` is for the weights of networks, and there are none. Use dtype=None."
            )
        if bad := [name for name, tensor in large.items() if not torch.isfinite(tensor).all()]:
            raise ValueError(
                f"{bad[0]!r} holds values that {dtype} cannot. Use dtype=torch.bfloat16 or None."
            )
        return State({**self.tensors, **large}, self.settings)

    # What is there, checked before anything is built from it

    def tensor(
        self, name: str, shape: Sequence[int | None], dtype: torch.dtype | None = None
    ) -> Tensor:
        """A tensor of a shape, in which None is any length.

        Raises:
            ValueError: If it is missing, has another shape or dtype, or is not finite.
        """
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ValueError(f"the tensor {name!r} is missing")
        expected = tuple("any" if length is None else length for length in shape)
        fits = len(shape) == tensor.ndim and all(
            want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"{name!r} has the shape {tuple(tensor.shape)}, expected {expected}")
        if dtype is not None and tensor.dtype != dtype:
            raise ValueError(f"{name!r} is {tensor.dtype}, expected {dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name!r} holds NaN or infinite values")
        return tensor

    def number(self, name: str) -> float:
        """A finite number.

        Raises:
            ValueError: If it is missing or something else.
        """
        value = self.settings.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name!r} must be a number, not {value!r}")
        if not math.isfinite(value):
            raise ValueError(f"{name!r} must be finite, not {value!r}")
        return float(value)

    def integer(self, name: str, most: int = 2**53) -> int:
        """A whole number in 0..most; see `number`."""
        value = self.settings.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{name!r} must be a whole number in 0..{most}, not {value!r}")
        return value

    def text(self, name: str) -> str:
        """A string; see `number`."""
        value: str = self._typed(name, str)
        return value

    def list(self, name: str) -> list[Any]:
        """A list, which JSON makes of tuples, too; see `number`."""
        value = self.settings.get(name)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name!r} must be a list, not {value!r}")
        return [*value]

    def _typed(self, name: str, kind: type) -> Any:  # noqa: ANN401 - of that type
        value = self.settings.get(name)
        if not isinstance(value, kind):
            raise ValueError(f"{name!r} must be a {kind.__name__}, not {value!r}")
        return value


# Settings objects


def describe(value: Any) -> Json:  # noqa: ANN401
    """A frozen dataclass of ella's own, or what one may hold, as JSON; "custom" for the rest."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [describe(each) for each in value]
    if is_dataclass(value) and type(value).__module__.split(".")[0] == "ella":
        named = {f.name: describe(getattr(value, f.name)) for f in fields(value) if f.init}
        return {"type": type(value).__name__, **named}
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return {"type": "custom", "name": name}


def custom_names(description: Json, name: str = "object") -> list[str]:
    """What in a description cannot be rebuilt, as "setting (class)"."""
    if isinstance(description, list):
        return [found for each in description for found in custom_names(each, name)]
    if not isinstance(description, dict):
        return []
    if description.get("type") == "custom":
        return [f"{name} ({description.get('name')})"]
    return [found for key, each in description.items() for found in custom_names(each, key)]


def rebuild(description: Json, kinds: Mapping[str, Callable[..., Any]]) -> Any:  # noqa: ANN401
    """What was described, made by one of the classes in `kinds`; nothing else is ever called.

    Raises:
        ValueError: If a type is not among them, or its constructor refuses the values.
    """
    if isinstance(description, list):
        return tuple(rebuild(each, kinds) for each in description)
    if not isinstance(description, dict):
        return description
    values = {name: rebuild(value, kinds) for name, value in description.items() if name != "type"}
    kind = kinds.get(str(description.get("type")))
    if kind is None:
        raise ValueError(f"settings of the type {description.get('type')!r} are not known")
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings of {description['type']} are bad: {error}") from error


# Files


def write(path: str | os.PathLike[str], state: State) -> None:
    """Write a safetensors file; on any failure the old file stays as it was.

    The file is written beside its place, flushed to the disk, and put there by a rename. A link
    is followed, and the permissions of an old file are kept.

    Raises:
        OSError: If the folder is missing or full, or may not be written to, or there is something
            else than a file.
    """
    check_path("path", path)
    place = Path(path).resolve()
    if place.exists() and not place.is_file():
        raise OSError(f"{os.fspath(path)!r} is a folder or a device; expected the path of a file.")
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state.tensors.items()}
    metadata = {"format": FORMAT, "sha256": _digest(tensors), "settings": dict(state.settings)}
    partial = place.with_name(f".{place.name}.{secrets.token_hex(6)}")
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # as umask says
    mode = stat.S_IMODE((place if place.exists() else partial).stat().st_mode)
    try:
        save_file(tensors, partial, metadata={"ella": json.dumps(metadata)})
        partial.chmod(mode)  # some versions of safetensors make the file anew
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(place)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(f"{os.fspath(path)!r} could not be written: {error}.") from error
        raise
    _sync_folder(place.parent)


def read(path: str | os.PathLike[str]) -> tuple[int, State]:
    """The format of a file that `write` (or version 0.1) wrote, and what it holds.

    Tensors are copies: the file may be overwritten afterwards. Nothing in it is executed.

    Raises:
        OSError: If the file cannot be read.
        TypeError: If `path` is none.
        ValueError: If it is not ours, or damaged.
    """
    check_path("path", path)
    where = os.fspath(path)
    if os.path.isdir(where):
        raise OSError(f"{where!r} is a folder; expected a file that `save` wrote.")
    try:
        with safe_open(where, framework="pt") as file:
            text = (file.metadata() or {}).get("ella")
            names = file.keys()
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except SafetensorError as error:
        raise ValueError(f"{where!r} is no safetensors file, or damaged: {error}.") from error
    metadata = _parsed(text)
    found = metadata.get("format")
    if found not in (1, FORMAT):
        raise ValueError(
            f"{where!r} is no file that this version of ella can read (format {found!r}, expected "
            f"1 or {FORMAT})."
        )
    if found == 1:
        return 1, State(tensors, metadata)
    settings = metadata.get("settings")
    if metadata.get("sha256") != _digest(tensors) or not isinstance(settings, dict):
        raise ValueError(f"{where!r} is damaged: its tensors are not those that were written.")
    return FORMAT, State(tensors, settings)


def _parsed(text: str | None) -> dict[str, Any]:
    try:
        metadata = json.loads(text) if text else {}
    except (json.JSONDecodeError, RecursionError):
        return {}
    return metadata if isinstance(metadata, dict) else {}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
