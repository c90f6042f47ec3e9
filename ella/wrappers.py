"""What surrounds a model, taken off; and what is no model that could be differentiated."""

import torch
from torch import nn

COMPILED = "_orig_mod"
"""Under which attribute `torch.compile` keeps the module that it wraps."""


def unwrapped(model: object) -> nn.Module:
    """What is inside `torch.compile`, `DataParallel`, `DistributedDataParallel`, Fabric and PEFT.

    A PEFT model with prompts that it learned is more than its base model, and stays.

    Raises:
        TypeError: If there is no `nn.Module` whose weights can be differentiated.
    """
    found = model
    while isinstance(found, nn.Module) and (inner := _inner(found)) is not None:
        found = inner
    check_module(found)
    return found  # type: ignore[return-value] # checked


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    for name in (COMPILED, "_forward_module"):
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return inner
    config = getattr(model, "active_peft_config", None)
    if config is not None and not getattr(config, "is_prompt_learning", True):
        inner = model.get_base_model()  # type: ignore[operator]
        return inner if isinstance(inner, nn.Module) and inner is not model else None
    return None


def check_module(model: object) -> None:
    """Refuse what has no weights that can be differentiated.

    Raises:
        TypeError: For scripted, exported and quantized models, and what is no module.
    """
    original = "Pass the nn.Module that it was made from."
    if isinstance(model, torch.export.ExportedProgram):
        raise TypeError(f"`model` is an exported program, which has no modules. {original}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"`model` is or holds TorchScript, which is a black box. {original}")
        if _is_quantized(module):
            raise TypeError(
                f"`model` is quantized ({type(module).__name__}): its weights are no real numbers "
                f"and have no derivative. {original}"
            )
        if any(map(nn.parameter.is_lazy, (*module.parameters(False), *module.buffers(False)))):
            raise TypeError(
                f"`model` holds a lazy layer ({type(module).__name__}) that has no weights yet. "
                f"Call the model on one batch, and train it, first."
            )
        if any(t.is_meta for t in (*module.parameters(False), *module.buffers(False))):
            raise TypeError(
                "`model` is on the meta device: its weights have no values. Load them."
            )
        if "_guards_fn" in module._modules:
            raise TypeError(f"`model` is an exported program, which has no modules. {original}")


def _is_quantized(module: nn.Module) -> bool:
    parts = type(module).__module__.split(".")
    tensors = (*module._parameters.values(), *module._buffers.values())
    return "quantized" in parts or any(t is not None and t.is_quantized for t in tensors)


class Passthrough(nn.Module):
    """Stands in the place of a wrapper inside a model; its child keeps its name.

    Args:
        name: Of the child in the wrapper.
        inner: The child.
    """

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)
        self._name = name

    def forward(self, *args: object, **keywords: object) -> object:
        """What the child returns."""
        return self._modules[self._name](*args, **keywords)  # type: ignore[misc]


def without_wrappers(model: nn.Module) -> nn.Module:
    """Replace wrappers inside a tree, in place; names stay."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is None:
                continue
            if isinstance(inner := getattr(child, COMPILED, None), nn.Module):
                module._modules[name] = Passthrough(COMPILED, inner)
            elif isinstance(child, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                module._modules[name] = Passthrough("module", child.module)
    return model


def clean(name: str) -> str:
    """A name without what `torch.compile` adds to it."""
    return name.replace(f"{COMPILED}.", "").removesuffix(f".{COMPILED}")
