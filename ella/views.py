"""Copies of a module tree that share its tensors, and what tells that the original changed."""

import copy
import functools
import hashlib
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ella.modes import within
from ella.wrappers import COMPILED, clean, without_wrappers

Reader = Callable[[nn.Module, Any, Any], None]
"""A forward hook: `(module, positional arguments, output)`."""

ATOMIC = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, str, bytes)
"""What `copy.deepcopy` does not look into."""


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree, in eval mode, that holds the very tensors of the original.

    Raises:
        TypeError: If copying made other parameters.
        Exception: Whatever copying an object that the model holds raises.
    """
    memo: dict[int, Any] = {id(held): held for held in _held_tensors(model)}
    with within(_SharedTensors()):
        twin = copy.deepcopy(model, memo)
    pairs = zip(twin.parameters(), model.parameters(), strict=True)
    if twin is model or not all(one is other for one, other in pairs):
        raise TypeError("The copy does not share its parameters.")
    for module in twin.modules():
        # They would be called for gradients that are not the user's, and may change them.
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False
    return without_wrappers(twin).eval()


PLAIN = (bool, int, float, str, bytes, type(None))


def remembered(module: nn.Module, before: Mapping[str, object]) -> list[str]:
    """Attributes in which a pass left something larger than a number, such as activations."""
    return [
        name
        for name, value in vars(module).items()
        if not isinstance(value, PLAIN) and before.get(name) is not value
    ]


class _SharedTensors(TorchFunctionMode):
    """Tensors are their own copies.

    So are those that another thread, a training step for example, puts on a module after
    `_held_tensors` has gone through it.
    """

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """See `TorchFunctionMode`."""
        return args[0] if func is Tensor.__deepcopy__ else func(*args, **(kwargs or {}))


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over module names and classes, and over names and values of all tensors."""
    digest = hashlib.sha256()
    for name, module in without_wrappers_named(model):
        digest.update(f"{name}:{type(module).__name__}\n".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        _update(digest, clean(name), tensor)
    return digest.hexdigest()


def without_wrappers_named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules as they would be had nothing been compiled."""
    for name, module in model.named_modules():
        if not isinstance(getattr(module, COMPILED, None), nn.Module):
            yield clean(name), module


def _update(digest: "hashlib._Hash", name: str, tensor: Tensor) -> None:
    digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    digest.update(flat.view(torch.uint8).numpy().data)


def _held_tensors(root: object) -> Iterator[object]:
    """Every tensor and array that deepcopy would come to, in modules or beside them."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        held = stack.pop()
        if isinstance(held, ATOMIC) or id(held) in seen:
            continue
        seen.add(id(held))
        if isinstance(held, (Tensor, np.ndarray)):
            yield held
        elif isinstance(held, Mapping):
            stack.extend(held.values())
        elif isinstance(held, (list, tuple, set, frozenset, deque)):
            stack.extend(held)
        elif isinstance(held, types.MethodType):
            stack.append(held.__self__)
        elif isinstance(held, functools.partial):
            stack.extend((held.func, *held.args, *held.keywords.values()))
        else:
            stack.extend(getattr(held, "__dict__", {}).values())
            slots = (getattr(kind, "__slots__", ()) for kind in type(held).__mro__)
            names = ((s,) if isinstance(s, str) else s for s in slots)
            stack.extend(getattr(held, name, None) for each in names for name in each)


@dataclass
class View:
    """One copy of the tree.

    Attributes:
        module: It.
        buffers: Name, copy and original of the buffers that are its own.
        attributes: Modules that remember something of a pass, and what they held before.
        keeps_hooks: Whether hooks stay for the next call; not on the user's own modules.
        readers: What its hooks call now.
        hooked: Names of the modules that have a hook.
    """

    module: nn.Module
    buffers: list[tuple[str, Tensor, Tensor]]
    attributes: list[tuple[nn.Module, dict[str, object]]] = field(default_factory=list)
    keeps_hooks: bool = True
    readers: Mapping[str, Reader] = field(default_factory=dict)
    hooked: set[str] = field(default_factory=set)

    @classmethod
    def of(
        cls,
        module: nn.Module,
        model: nn.Module,
        own: frozenset[str],
        remembering: frozenset[str] = frozenset(),
    ) -> "View":
        """A copy of `model`.

        Args:
            module: The copy.
            model: The original.
            own: Names of buffers that are copied, too.
            remembering: Names of modules whose attributes a pass changes.
        """
        originals = dict(model.named_buffers())
        buffers = []
        for name in sorted(own):
            path, _, last = name.rpartition(".")
            clone = originals[name].detach().clone()
            module.get_submodule(path)._buffers[last] = clone
            buffers.append((name, clone, originals[name]))
        modules = [module.get_submodule(name) for name in remembering]
        return cls(module, buffers, [(each, dict(vars(each))) for each in modules])

    @classmethod
    def itself(cls, model: nn.Module) -> "View":
        """The user's own model."""
        return cls(model, [], keeps_hooks=False)

    def refresh_buffers(self) -> None:
        """Give the buffers of its own the values of the originals."""
        for _, own, original in self.buffers:
            own.copy_(original)

    def forget(self) -> None:
        """Drop what a pass left on modules: activations would live until the next one."""
        for module, before in self.attributes:
            for name in remembered(module, before):
                vars(module).pop(name)
                vars(module).update({name: before[name]} if name in before else {})

    @contextmanager
    def read_by(self, readers: Mapping[str, Reader]) -> Iterator[None]:
        """Call `readers` during what follows."""
        self.readers = readers
        handles = [self._hook(name) for name in readers if name not in self.hooked]
        if self.keeps_hooks:
            self.hooked.update(readers)
        try:
            yield
        finally:
            self.readers = {}
            if not self.keeps_hooks:
                for handle in handles:
                    handle.remove()

    def _hook(self, name: str) -> torch.utils.hooks.RemovableHandle:
        def dispatch(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
            reader = self.readers.get(name)
            if reader is not None:
                reader(module, args, output)

        return self.module.get_submodule(name).register_forward_hook(dispatch)


@dataclass
class Watch:
    """How the user's model looked: notices what happens to it, in tens of microseconds.

    Replaced modules and tensors are noticed by identity, in-place changes by autograd's version
    counters. Changes through `.data` leave no version, so one value of each tensor, the largest,
    is compared too.

    Attributes:
        owners: The dictionaries of modules, parameters and buffers of every module.
        held: What was in them; kept, so that nothing new gets the identity of something old.
        identities: Of what was in them, and where the memory of tensors began.
        tensors: Parameters and buffers.
        versions: Theirs.
        samples: By dtype and device, views of one entry of each parameter, and their values.
        fingerprint: Once it is computed.
    """

    owners: list[Mapping[str, object]]
    held: list[object]
    identities: list[int]
    tensors: list[Tensor]
    versions: list[int]
    samples: list[tuple[list[Tensor], Tensor]]
    fingerprint: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> "Watch":
        """As it is now."""
        owners: list[Mapping[str, object]] = []
        for module in model.modules():
            owners += (module._modules, module._parameters, module._buffers)
        held = [value for owner in owners for value in owner.values()]
        tensors = [value for value in held if isinstance(value, Tensor)]
        identities = _identities(owners, tensors)
        return cls(owners, held, identities, tensors, _versions(tensors), _samples(tensors))

    def same_tensors(self) -> bool:
        """Whether every module and tensor is where it was, and no other came."""
        return _identities(self.owners, self.tensors) == self.identities

    def same_values(self) -> bool:
        """Whether no tensor was changed in place."""
        return _versions(self.tensors) == self.versions and all(
            torch.equal(torch.stack(views), values) for views, values in self.samples
        )


def _identities(owners: list[Mapping[str, object]], tensors: list[Tensor]) -> list[int]:
    held = map(id, chain.from_iterable(owner.values() for owner in owners))
    return [*map(len, owners), *held, *(0 if t.is_meta else t.data_ptr() for t in tensors)]


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _samples(tensors: list[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.numel() and not tensor.is_meta:
                flat = tensor.detach().flatten()
                if flat.data_ptr() == tensor.data_ptr():  # a view, no copy
                    largest = flat[int(flat.abs().argmax())]
                    groups.setdefault((tensor.dtype, tensor.device), []).append(largest)
        return [(views, torch.stack(views)) for views in groups.values()]
