"""A private view of the trained model: called by everything, seen by nobody else."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ella.inputs import Inputs, check_inputs, take
from ella.views import Reader, View, Watch, fingerprint, remembered, shared_copy

FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules with a fast path that skips their parts, and with it the hooks of these."""


class Network:
    """A trained model as it is used here: in eval mode, without autograd, seen by nobody else.

    It works on copies of the module *tree* whose parameters and buffers are the user's own
    tensors, so nothing is stored twice, and weights changed in place are seen. Each call borrows a
    copy that no other call has meanwhile: threads do not meet, not even in modules that keep
    activations on themselves, and the user's own modules (modes, hooks, attributes, gradients) are
    never touched; what a pass leaves on a copy is dropped. Attributes and hooks are those of the
    time of the copy. Buffers that a forward pass changes in eval mode, such as counters, are
    copied for each call. Models wrapped by `torch.compile` or `DataParallel` are unwrapped.

    A model that cannot be copied in this way, because it holds a lock or a file or has a
    `__deepcopy__` of its own that copies weights, is used itself, by one call at a time under a
    lock; modes and hooks are put back after each.

    Args:
        model: Maps x to outputs (n, c), or to an object with such a `.logits`.

    Raises:
        TypeError: If `model` is not an `nn.Module`.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
        self.model = unwrapped(model)
        self._free: list[View] = []
        self._changing: frozenset[str] | None = None
        self._remembering: frozenset[str] = frozenset()
        self._lock: AbstractContextManager[Any] | None = None
        self._watch = Watch.of(self.model)
        self._look_again()

    def __getstate__(self) -> dict[str, nn.Module]:
        """The user's model alone; copies and what was noticed are made anew."""
        return {"model": self.model}

    def __setstate__(self, state: dict[str, nn.Module]) -> None:
        """See `__getstate__`."""
        vars(self).update(vars(Network(state["model"])))

    # What it is

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that require a gradient, now."""
        return tuple(name for name, p in self.model.named_parameters() if p.requires_grad)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, or buffer."""
        return self._first_tensor().device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter, or buffer."""
        return self._first_tensor().dtype

    def parameters(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The parameters of these names, sharing memory with the model."""
        named = dict(self.model.named_parameters())
        return {name: named[name].detach() for name in names}

    def fingerprint(self) -> str:
        """SHA-256 over module names and classes, and over names and values of all tensors.

        It is computed again only if a tensor was replaced or changed; see `Watch` for what is
        noticed.
        """
        self._notice()
        if self._watch.fingerprint is None:
            self._watch.fingerprint = fingerprint(self.model)
        return self._watch.fingerprint

    def refreshed_fingerprint(self) -> str:
        """`fingerprint`, computed again whatever was noticed: for what is about to be kept."""
        self._watch.fingerprint = None
        return self.fingerprint()

    # Calling it

    def __call__(self, x: Inputs, readers: Mapping[str, Reader] | None = None) -> Tensor:
        """Outputs f(x) of shape (n, c).

        Args:
            x: n examples.
            readers: By module name, what is called each time after that module ran.

        Raises:
            TypeError: If the model does not return a tensor of outputs.
            ValueError: If `x` is bad (`check_inputs`), the outputs are not (n, c), or not finite.
        """
        n = check_inputs(x, self.device)
        if self._changing is None:
            self._find_changing(x)
        with self.borrowed(readers) as module, self._attention():
            outputs = called(module, x)
        if outputs.ndim != 2 or len(outputs) != n:
            raise ValueError(
                f"`model` must return outputs of shape (n, c) with n = {n}; got "
                f"{tuple(outputs.shape)}. Flatten or pool them in a wrapper module."
            )
        if not torch.isfinite(outputs).all():
            raise ValueError(
                "`model` returned NaN or infinite logits. Check its weights and the input scale."
            )
        return outputs

    @contextmanager
    def borrowed(self, readers: Mapping[str, Reader] | None = None) -> Iterator[nn.Module]:
        """The module tree, in eval mode and without autograd, for one user at a time.

        Args:
            readers: See `__call__`.
        """
        self._notice()
        with self._view() as view, torch.inference_mode(False), torch.no_grad():
            view.refresh_buffers()
            with view.read_by(readers or {}):
                yield view.module

    def changing_buffers(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies of the buffers that a forward pass changes, by name, for `functional_call`."""
        found = dict(module.named_buffers())
        return {name: found[name].clone() for name in self._changing or ()}

    @contextmanager
    def _view(self) -> Iterator["View"]:
        if self._lock is not None:
            with self._lock, _eval_mode(self.model):
                yield View.itself(self.model)
            return
        generation = self._generation
        try:
            view = self._free.pop()
        except IndexError:  # asking first would not be safe: another thread may take the last
            view = self._new_view()
        yield view
        view.forget()
        # Not after an exception: who knows in what state it left the tree.
        if generation is self._generation:
            self._free.append(view)

    @torch.inference_mode(False)
    def _new_view(self) -> View:
        module, remembering = shared_copy(self.model), self._remembering
        return View.of(module, self.model, self._changing or frozenset(), remembering)

    def _find_changing(self, x: Inputs) -> None:
        """Run one example with copies of all buffers, and see what it leaves on the modules."""
        if self._lock is not None:
            self._changing = frozenset()
            return
        names = frozenset(name for name, _ in self.model.named_buffers())
        with torch.inference_mode(False), torch.no_grad(), self._attention():
            view = View.of(shared_copy(self.model), self.model, names)
            before = {name: own._version for name, own, _ in view.buffers}
            attributes = [(n, m, dict(vars(m))) for n, m in view.module.named_modules()]
            called(view.module, take(x, slice(1)))
        # `_changing` last: it tells other threads that all is known.
        self._remembering = frozenset(n for n, m, old in attributes if remembered(m, old))
        self._generation, self._free = object(), []
        self._changing = frozenset(n for n, own, _ in view.buffers if own._version != before[n])

    def _attention(self) -> AbstractContextManager[Any]:
        return DifferentiableAttention() if self._fused else nullcontext()

    # What may happen to the user's model meanwhile

    def _notice(self) -> None:
        """Forget copies whose tensors or modules are no longer those of the user's model."""
        if not self._watch.same_tensors():
            self._look_again()
        elif not self._watch.same_values():
            self._watch = Watch.of(self.model)

    @torch.inference_mode(False)
    def _look_again(self) -> None:
        self._watch = Watch.of(self.model)
        self._generation = object()
        self._free = []
        self._changing = None
        self._lock = None if _can_be_copied(self.model) else threading.RLock()
        self._fused = any(isinstance(module, FUSED) for module in self.model.modules())

    def _first_tensor(self) -> Tensor:
        for tensors in (self.model.parameters(), self.model.buffers()):
            for tensor in tensors:
                if tensor.is_floating_point():
                    return tensor
        return torch.zeros(())


class DifferentiableAttention(TorchFunctionMode):
    """Attention by formulas that forward mode and `vmap` support, in this thread alone.

    Under any such mode torch's transformer layers leave their fast path, which has no derivative
    and skips hooks. `torch.backends.mha` and `sdpa_kernel` would do the same for all threads.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """See `TorchFunctionMode`."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            # The way that returns weights multiplies them out; the other calls a fused kernel.
            output, weights = func(*args, **{**kwargs, "need_weights": True})
            return output, weights if kwargs.get("need_weights", True) else None
        return func(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` multiplied out.

    Its fused kernels have no forward-mode derivative. Rows that may attend to nothing give 0.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    alone = scores.isneginf().all(-1, keepdim=True)
    weights = scores.masked_fill(alone, 0).softmax(-1).masked_fill(alone, 0)
    return F.dropout(weights, dropout_p) @ value


def unwrapped(model: nn.Module) -> nn.Module:
    """What is inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def called(module: Callable[..., Any], x: Inputs) -> Tensor:
    """The module's tensor of outputs, before its shape is checked.

    Raises:
        TypeError: If there is none.
    """
    if isinstance(x, Tensor):
        outputs = module(x)
    elif isinstance(x, Mapping):
        outputs = module(**x)
    else:
        outputs = module(*x)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"`model` must return a tensor of outputs, or an object with `.logits`; got "
            f"{type(outputs).__name__}. Wrap it in a module that returns the logits."
        )
    return outputs


def _can_be_copied(model: nn.Module) -> bool:
    try:
        shared_copy(model)
    except Exception:  # whatever a `__deepcopy__` or `__reduce__` of the user's raises
        return False
    return True


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
