"""A private view of the trained model: called by everything, seen by nobody else."""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ella.attention import FUSED, DifferentiableAttention
from ella.inputs import (
    Inputs,
    Rows,
    all_finite,
    check_inputs,
    example_shape,
    input_tensors,
    map_inputs,
    model_inputs,
    take,
)
from ella.modes import within
from ella.outputs import Layout, Output, as_rows, check_output, find_logits
from ella.views import Reader, View, Watch, fingerprint, remembered, shared_copy
from ella.wrappers import clean, unwrapped

ALWAYS = nullcontext()


class Network:
    """A trained model as it is used here: in eval mode, without autograd, seen by nobody else.

    It works on copies of the module *tree* whose parameters and buffers are the user's own
    tensors, so nothing is stored twice, and weights changed in place are seen. Each call borrows a
    copy that no other call has meanwhile: threads do not meet, not even in modules that keep
    activations on themselves, and the user's own modules (modes, hooks, attributes, gradients) are
    never touched; what a pass leaves on a copy is dropped. Attributes and hooks are those of the
    time of the copy. Buffers that a forward pass changes in eval mode, such as counters, are
    copied for each call. Wrappers such as `torch.compile` and `DataParallel` are taken off.

    Outputs with positions, (n, positions, c) or (n, c, height, width), are read row by row: such a
    network is called with `Rows`. Half precision is widened to float32 in what it returns.

    A model that cannot be copied in this way, because it holds a lock or a file or has a
    `__deepcopy__` of its own that copies weights, is used itself, by one call at a time under a
    lock; modes and hooks are put back after each.

    Args:
        model: Maps x to outputs (n, c), or to something that holds them.
        output: Where they are in what it returns; None is the obvious guess (`find_logits`).

    Raises:
        TypeError: If `model` is no `nn.Module`, or one that cannot be differentiated, or `output`
            says nothing.
    """

    def __init__(self, model: nn.Module, *, output: Output = None) -> None:
        check_output(output)
        self.model = unwrapped(model)
        self.output = output
        self._free: list[View] = []
        self._plain: Layout | None = None
        self._changing: frozenset[str] | None = None
        self._remembering: frozenset[str] = frozenset()
        self._lock: AbstractContextManager[Any] | None = None
        self._watch = Watch.of(self.model)
        self._look_again()

    def __getstate__(self) -> dict[str, Any]:
        """The user's model alone; copies and what was noticed are made anew."""
        return {"model": self.model, "output": self.output}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        vars(self).update(vars(Network(state["model"], output=state["output"])))

    # What it is

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the parameters that require a gradient, now."""
        return tuple(name for name, p in self.model.named_parameters() if p.requires_grad)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter, or buffer."""
        return self._first.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter, or buffer."""
        return self._first.dtype

    @property
    def wide(self) -> torch.dtype:
        """Of everything computed of its outputs: its dtype, or float32 for half precision."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def tolerance(self) -> float:
        """Relative differences of outputs and activations up to this are rounding."""
        return 1e-3 if self.dtype.itemsize >= 4 else 1e-2

    @property
    def input_dtype(self) -> torch.dtype | None:
        """What real inputs should be: the dtype of its weights; None if they have several."""
        return self.dtype if self._one_dtype else None

    def named(self, names: Iterable[str]) -> tuple[str, ...]:
        """Its own names of parameters and modules; compiled or not, they are called the same."""
        parameters = (name for name, _ in self.model.named_parameters())
        modules = (name for name, _ in self.model.named_modules())
        exact = dict.fromkeys((*parameters, *modules))
        own = {clean(name): name for name in exact}
        return tuple(name if name in exact else own.get(clean(name), name) for name in names)

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
            x: n examples, or n rows of a network with positions.
            readers: By module name, what is called each time after that module ran.

        Raises:
            TypeError: If the model does not return a tensor of outputs.
            ValueError: If `x` is bad (`check_inputs`), the outputs are not (n, c), or not finite.
        """
        inputs = model_inputs(x)
        n = check_inputs(inputs, self.device)
        self._learn_from(inputs)
        with self.borrowed(readers) as module, self.attention(), blamed_on(inputs):
            outputs = as_rows(called(module, self.own(inputs), self.output), x)
        rows = len(x.position) if isinstance(x, Rows) else n
        if outputs.ndim != 2 or outputs.shape[0] != rows:
            raise ValueError(
                f"`model` must return outputs of shape (n, c) with n = {n}; got "
                f"{tuple(outputs.shape)}. Flatten or pool them in a wrapper module, or say with "
                f"`output=` which are the logits."
            )
        if outputs.dtype.itemsize < 4:
            outputs = outputs.float()
        if not all_finite(outputs):
            raise ValueError(
                "`model` returned NaN or infinite logits. Check its weights and the input scale."
            )
        return outputs

    def own(self, x: Inputs) -> Inputs:
        """The inputs, copied if the model would write into them."""
        return map_inputs(x, Tensor.clone) if self._overwrites else x

    def layout(self, x: Inputs) -> Layout:
        """Which axes the outputs for such inputs have; one example is run for each new shape."""
        if self._plain is not None:
            return self._plain
        key = example_shape(x)
        if key not in self._layouts:
            x = model_inputs(x)
            self._learn_from(x)
            with self.borrowed() as module, self.attention(), blamed_on(x):
                outputs = called(module, self.own(take(x, slice(2))), self.output)
            self._layouts[key] = found = Layout.of(outputs)
            if not found.positions:
                self._plain = found
        return self._layouts[key]

    def working_bytes(self, x: Inputs) -> int:
        """What the model needs to compute one example: four times the largest activation."""
        key = example_shape(x)
        if key not in self._working:
            sizes = [0]

            def read(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
                if isinstance(output, Tensor):
                    sizes.append(output.numel() * output.element_size())

            readers = {name: read for name, _ in self.model.named_modules() if name}
            self.apart()(take(x, slice(1)), readers)
            self._working[key] = 4 * max(sizes)
        return self._working[key]

    def apart(self) -> "Network":
        """The same with copies of its own, for hooks that should not stay on those of this one."""
        return Network(self.model, output=self.output)

    @contextmanager
    def borrowed(self, readers: Mapping[str, Reader] | None = None) -> Iterator[nn.Module]:
        """The module tree, in eval mode and without autograd, for one user at a time.

        Args:
            readers: See `__call__`.
        """
        if not self._watch.same_tensors():  # values changed in place are those of the copies, too
            self._look_again()
        # Entering a mode takes longer than many a small network.
        inference = torch.inference_mode(False) if torch.is_inference_mode_enabled() else ALWAYS
        with self._view() as view, inference, torch.no_grad():
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

    def _learn_from(self, x: Inputs) -> None:
        """See once what a pass changes."""
        if self._changing is None:
            self._find_changing(x)

    def _find_changing(self, x: Inputs) -> None:
        """Run two examples with copies of all buffers, and see what they leave on the modules."""
        if self._lock is not None:
            self._changing, self._overwrites = frozenset(), True
            return
        names = frozenset(name for name, _ in self.model.named_buffers())
        with torch.inference_mode(False), torch.no_grad(), self.attention():
            view = View.of(shared_copy(self.model), self.model, names)
            before = {name: own._version for name, own, _ in view.buffers}
            attributes = [(n, m, dict(vars(m))) for n, m in view.module.named_modules()]
            one = map_inputs(take(x, slice(2)), Tensor.clone)
            versions = [tensor._version for tensor in input_tensors(one)]
            with blamed_on(x):
                called(view.module, one, self.output)
        self._overwrites = versions != [tensor._version for tensor in input_tensors(one)]
        # `_changing` last: it tells other threads that all is known.
        self._remembering = frozenset(n for n, m, old in attributes if remembered(m, old))
        self._generation, self._free = object(), []
        self._changing = frozenset(n for n, own, _ in view.buffers if own._version != before[n])

    def attention(self) -> AbstractContextManager[Any]:
        """What attention of the model needs to run under: its fast path skips hooks."""
        return within(DifferentiableAttention()) if self._fused else ALWAYS

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
        self._layouts: dict[tuple[object, ...], Layout] = {}
        self._plain = None
        self._working: dict[tuple[object, ...], int] = {}
        self._overwrites = True
        self._first = self._find_first_tensor()
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        self._one_dtype = len(dtypes) == 1
        self._lock = None if _can_be_copied(self.model) else threading.RLock()
        self._fused = any(isinstance(module, FUSED) for module in self.model.modules())

    def _find_first_tensor(self) -> Tensor:
        for tensors in (self.model.parameters(), self.model.buffers()):
            for tensor in tensors:
                if tensor.is_floating_point():
                    return tensor
        return torch.zeros(())


@contextmanager
def blamed_on(x: Inputs) -> Iterator[None]:
    """Say what the model was called with where it fails; errors keep their type."""
    try:
        yield
    except (IndexError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if type(error).__module__ != "builtins" or str(error).startswith("`"):
            raise
        found = ", ".join(f"{tuple(t.shape)} of {t.dtype}" for t in input_tensors(x))
        raise type(error)(
            f"`model` failed on `x` ({found}): {error}. Are shapes, dtypes and scale of the "
            f"inputs those that it was trained on?"
        ) from error


def called(module: Callable[..., Any], x: Inputs, output: Output = None) -> Tensor:
    """The module's tensor of outputs, before its shape is checked.

    Raises:
        TypeError: If there is none, it holds no real numbers, or the module takes other arguments.
    """
    if isinstance(x, Mapping):
        _check_arguments(module, x)
        found = find_logits(module(**x), output)
    else:
        found = find_logits(module(*x) if isinstance(x, tuple) else module(x), output)
    if not found.is_floating_point() or found.layout != torch.strided or found.ndim == 0:
        raise TypeError(
            f"`model` must return logits (n, c), dense and of floating point; got "
            f"{tuple(found.shape)} of {found.dtype} ({found.layout})."
        )
    return found


def _check_arguments(module: Callable[..., Any], x: Mapping[str, Any]) -> None:
    if not isinstance(module, nn.Module):
        return
    parameters = inspect.signature(module.forward).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        return
    if unknown := sorted(set(x) - set(parameters)):
        raise TypeError(
            f"The model's forward takes no {', '.join(map(repr, unknown))}, which the inputs "
            f"hold; it takes {', '.join(map(repr, parameters))}. Leave them out with `split=`."
        )


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
