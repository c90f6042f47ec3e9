"""Frozen features of a classifier, read off during its own forward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ella.inputs import Inputs, attention_mask, take
from ella.linearize import Linearized

MAX_WIDTH = 2048
"""Vector activations wider than this are not tapped, nor more features than this of one stage."""
STATISTICS = 3
"""Numbers that `Tap` makes of one channel: mean, deviation, share above zero."""
NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._NormBase)


@dataclass(frozen=True)
class Tap:
    """Where activations are read.

    Attributes:
        module: Name of the module in `model.named_modules()`.
        side: Its "input" or its "output".
        channels_first: Whether axis 1 holds the channels; else the last axis does.
    """

    module: str
    side: str
    channels_first: bool

    def pool(self, activation: Tensor, mask: Tensor | None = None) -> Tensor:
        """Means, standard deviations and shares above zero of each channel, or the vector: (n, d).

        The share above zero is, before a ReLU, the share of positions that gradients pass.

        Args:
            activation: Shape (n, d), or (n, channels, *positions), or (n, *positions, channels).
            mask: Zero at the positions that are padding and do not count, shape (n, positions);
                it has no say over activations with another number of positions.
        """
        if activation.ndim == 2:
            return activation
        channels = activation if self.channels_first else activation.movedim(-1, 1)
        flat = channels.flatten(2)
        if mask is not None and mask.shape == (len(flat), flat.shape[-1]):
            real = (mask != 0).to(flat).unsqueeze(1)
            weights = real / real.sum(-1, keepdim=True).clamp_min(1)
            means = (flat * weights).sum(-1)
            norms = torch.linalg.vector_norm((flat - means.unsqueeze(-1)) * weights.sqrt(), dim=-1)
            active = (flat.sign().clamp_(min=0) * weights).sum(-1)
            return torch.cat([means, norms, active], dim=1)
        # On a CPU `Tensor.std` and sums of booleans take ten to a hundred times as long as these.
        means = flat.mean(-1)
        norms = torch.linalg.vector_norm(flat - means.unsqueeze(-1), dim=-1)
        spread = norms / flat.shape[-1] ** 0.5
        active = flat.sign().clamp_(min=0).mean(-1)
        return torch.cat([means, spread, active], dim=1)


class FeatureTaps:
    """Logits and pooled activations of several depths, from one forward pass.

    Of padded sequences the padding does not count, if the inputs are a mapping that holds
    `attention_mask`, as Hugging Face's do.

    Args:
        linearized: The model.
        taps: Where to read; `choose_taps` finds places for any model.
    """

    def __init__(self, linearized: Linearized, taps: list[Tap]) -> None:
        self.linearized = linearized
        self.taps = taps

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Logits (n, c) and features (n, d): every tap, then the logits."""
        pooled: dict[int, Tensor] = {}
        mask = attention_mask(x)
        modules = dict(self.linearized.model.named_modules())

        def reader(index: int, tap: Tap) -> Callable[[nn.Module, Any, Any], None]:
            def read(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
                # Pooled at once: a later in-place operation may overwrite the activation.
                pooled[index] = tap.pool(_tensor(args if tap.side == "input" else output), mask)

            return read

        readers = [(modules[t.module], reader(i, t)) for i, t in enumerate(self.taps)]
        with hooked(readers):
            logits = self.linearized(x)
        return logits, torch.cat([*(pooled[i] for i in range(len(self.taps))), logits], dim=1)


@contextmanager
def hooked(readers: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Forward hooks that are gone afterwards, also after an exception."""
    handles = [module.register_forward_hook(reader) for module, reader in readers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choose_taps(linearized: Linearized, x: Inputs, *, most: int = 6) -> list[Tap]:
    """Places that describe what the classifier sees at several depths.

    Activations are grouped into stages, runs of one shape, and the last one of each stage is
    taken, the latest `most` stages; a model with few stages (a transformer, an MLP) adds one in
    the middle of each. Of a transformer only what is as wide as its normalisation layers counts:
    the residual stream, not the inside of its feed-forward blocks. Of the last stage of a
    convolution net, whose weights carry most of the Jacobian, the normalisation layers and blocks
    are added, the latest first, up to `MAX_WIDTH` features. The input of the last linear layer,
    the penultimate features, comes last.

    Args:
        linearized: The model.
        x: Any inputs; one example is run.
        most: Upper limit of the number of stages.
    """
    seen = _activations(linearized, x)
    first = not _channels_last(linearized.model)
    if not first:
        seen = _residual_stream(linearized.model, seen)
    runs: list[list[Activation]] = []
    previous = None
    for each in seen:
        if each.shape != previous:
            runs.append([])
        runs[-1].append(each)
        previous = each.shape
    chosen = [run[-1] for run in runs[-most:]]
    if len(runs) < 3:
        chosen = [each for run in runs for each in (run[len(run) // 2], run[-1])]
    if first:
        chosen += _last_stage(linearized.model, seen, {each.value for each in chosen})
    taps = [Tap(name, "output", first) for name in dict.fromkeys(each.module for each in chosen)]
    last = last_linear(linearized, x)
    return [*taps, Tap(last, "input", first)] if last is not None else taps


@dataclass(frozen=True)
class Activation:
    """What a module returned.

    Attributes:
        module: Its name.
        shape: Shape of one example.
        value: A number that modules share if one passes on what the other returned.
    """

    module: str
    shape: torch.Size
    value: int


def _activations(linearized: Linearized, x: Inputs) -> list[Activation]:
    """What modules returned, in the order of their ends: vectors, and anything with positions.

    The logits and vectors wider than `MAX_WIDTH` are left out.
    """
    model = linearized.model
    names = {module: name for name, module in model.named_modules()}
    seen: list[Activation] = []
    latest: tuple[Any, int] = (None, 0)
    value = 0

    def note(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        nonlocal latest, value
        if module is model or not isinstance(output, Tensor) or not output.is_floating_point():
            return
        # An in-place operation returns the same tensor in a new version.
        value += output is not latest[0] or output._version != latest[1]
        latest = output, output._version
        if output.ndim == 2 or (output.ndim > 2 and output.shape[2:].numel() > 1):
            seen.append(Activation(names[module], output.shape[1:], value))

    with hooked([(module, note) for module in model.modules()]):
        logits = linearized(take(x, slice(1)))
    return [
        each
        for each in seen
        if each.shape != logits.shape[1:] and (len(each.shape) > 1 or each.shape[0] <= MAX_WIDTH)
    ]


def _residual_stream(model: nn.Module, seen: list[Activation]) -> list[Activation]:
    """Vectors, and what is as wide as a LayerNorm; everything in a model without one."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    widths = {module.normalized_shape[-1] for module in norms}
    return [
        each for each in seen if len(each.shape) == 1 or not widths or each.shape[-1] in widths
    ]


def _last_stage(model: nn.Module, seen: list[Activation], chosen: set[int]) -> list[Activation]:
    """Normalisation layers and blocks of the last stage that has positions."""
    spatial = [each for each in seen if len(each.shape) > 1]
    room, added = MAX_WIDTH, []
    for each in reversed(spatial):
        module = model.get_submodule(each.module)
        is_block = any(module.children()) and not isinstance(module, nn.Sequential)
        if each.shape != spatial[-1].shape or each.value in chosen:
            continue
        if is_block or isinstance(module, NORMALISATIONS):
            room -= STATISTICS * each.shape[0]
            if room < 0:
                break
            chosen.add(each.value)
            added.append(each)
    return added


def last_linear(linearized: Linearized, x: Inputs) -> str | None:
    """Name of the linear layer whose output is the logits; None if there is none."""
    named = linearized.model.named_modules()
    names: dict[nn.Module, str] = {m: name for name, m in named if isinstance(m, nn.Linear)}
    outputs: dict[str, Tensor] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
        outputs[names[module]] = output.detach().clone()

    with hooked([(module, note) for module in names]):
        logits = linearized(take(x, slice(1)))
    for name, output in reversed(outputs.items()):
        if output.shape == logits.shape and torch.equal(output, logits):
            return name
    return None


def _channels_last(model: nn.Module) -> bool:
    """Whether activations are (n, positions, channels), as in transformers."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    blocks = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, *convolutions))]
    return not blocks or isinstance(blocks[-1], nn.LayerNorm)


def _tensor(value: Any) -> Tensor:  # noqa: ANN401
    return value[0] if isinstance(value, tuple) else value
