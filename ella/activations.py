"""Frozen features of a classifier, read off during its own forward pass."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ella.inputs import Inputs, attention_mask, take
from ella.network import Network
from ella.saving import State
from ella.views import Reader

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


def restored_taps(state: State) -> list[Tap]:
    """The taps that a state lists under "taps".

    Raises:
        ValueError: If one of them is none.
    """
    taps = []
    for found in state.list("taps"):
        match found:
            case {
                "module": str(module),
                "side": "input" | "output",
                "channels_first": bool(first),
            }:
                taps.append(Tap(module, found["side"], first))
            case _:
                raise ValueError(f"{found!r} says of no activation where it is read")
    return taps


class FeatureTaps:
    """Logits and pooled activations of several depths, from one forward pass.

    Of padded sequences the padding does not count, if the inputs are a mapping that holds
    `attention_mask`, as Hugging Face's do.

    Args:
        network: The model.
        taps: Where to read; `choose_taps` finds places for any model.

    Raises:
        ValueError: If the model has no module of a tap's name.
    """

    def __init__(self, network: Network, taps: list[Tap]) -> None:
        self.network = network
        self.taps = taps
        modules = {name for name, _ in network.model.named_modules()}
        if missing := [tap.module for tap in taps if tap.module not in modules]:
            raise ValueError(f"The model has no module named {missing[0]!r} to read.")

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Logits (n, c) and features (n, d): every tap, then the logits."""
        pooled: dict[int, Tensor] = {}
        mask = attention_mask(x)

        def reader(indices: list[int]) -> Reader:
            def read(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
                # Pooled at once: a later in-place operation may overwrite the activation.
                for i in indices:
                    side = args if self.taps[i].side == "input" else output
                    pooled[i] = self.taps[i].pool(_tensor(side), mask)

            return read

        places: dict[str, list[int]] = {}
        for i, tap in enumerate(self.taps):
            places.setdefault(tap.module, []).append(i)
        logits = self.network(x, {name: reader(indices) for name, indices in places.items()})
        return logits, torch.cat([*(pooled[i] for i in range(len(self.taps))), logits], dim=1)


def choose_taps(network: Network, x: Inputs, *, most: int = 6) -> list[Tap]:
    """Places that describe what the classifier sees at several depths.

    Activations are grouped into stages, runs of one shape, and the last one of each stage is
    taken, the latest `most` stages; a model with few stages (a transformer, an MLP) adds one in
    the middle of each. Of a transformer only what is as wide as its normalisation layers counts:
    the residual stream, not the inside of its feed-forward blocks. Of the last stage of a
    convolution net, whose weights carry most of the Jacobian, the normalisation layers and blocks
    are added, the latest first, up to `MAX_WIDTH` features. The input of the last linear layer,
    the penultimate features, comes last.

    Args:
        network: The model.
        x: Any inputs; one example is run.
        most: Upper limit of the number of stages.
    """
    seen = _activations(network, x)
    first = not _channels_last(network.model)
    if not first:
        seen = _residual_stream(network.model, seen)
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
        chosen += _last_stage(network.model, seen, {each.value for each in chosen})
    taps = [Tap(name, "output", first) for name in dict.fromkeys(each.module for each in chosen)]
    last = last_linear(network, x)
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


def _activations(network: Network, x: Inputs) -> list[Activation]:
    """What modules returned, in the order of their ends: vectors, and anything with positions.

    The logits and vectors wider than `MAX_WIDTH` are left out.
    """
    seen: list[Activation] = []
    latest: tuple[object, int] = (None, 0)
    value = 0

    def note(name: str, output: object) -> None:
        nonlocal latest, value
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        # An in-place operation returns the same tensor in a new version.
        value += output is not latest[0] or output._version != latest[1]
        latest = output, output._version
        if output.ndim == 2 or (output.ndim > 2 and output.shape[2:].numel() > 1):
            seen.append(Activation(name, output.shape[1:], value))

    names = [name for name, _ in network.model.named_modules() if name]
    logits = _noted(network, x, names, note)
    return [
        each
        for each in seen
        if each.shape != logits.shape[1:] and (len(each.shape) > 1 or each.shape[0] <= MAX_WIDTH)
    ]


def _noted(
    network: Network, x: Inputs, names: Iterable[str], note: Callable[[str, object], None]
) -> Tensor:
    """Logits of one example; `note` is told what each of these modules returned."""

    def reader(name: str) -> Reader:
        return lambda module, args, output: note(name, output)

    # On copies of its own, as hooks on every module would stay on those of the network.
    return Network(network.model)(take(x, slice(1)), {name: reader(name) for name in names})


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


def last_linear(network: Network, x: Inputs) -> str | None:
    """Name of the linear layer whose output is the logits; None if there is none."""
    outputs: dict[str, Tensor] = {}

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output.detach().clone()

    modules = network.model.named_modules()
    names = [name for name, module in modules if isinstance(module, nn.Linear)]
    logits = _noted(network, x, names, note)
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
