"""Where the activations of any architecture are worth reading."""

import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ella.activations import STATISTICS, FeatureTaps, Tap, first_tensor
from ella.inputs import Inputs, Rows, input_tensors, num_examples, take
from ella.network import Network
from ella.outputs import as_rows
from ella.views import Reader

log = logging.getLogger("ella")

MAX_WIDTH = 2048
"""Vector activations wider than this are not tapped, nor more features than this of one stage."""
NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._NormBase)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FEW, MORE = 3, 5
"""Two numbers of examples: what has an axis that grows from one to the other follows the batch."""


@dataclass(frozen=True)
class Activation:
    """What a module returned.

    Attributes:
        tap: It, read.
        shape: Shape of one example.
        value: A number that modules share if one passes on what the other returned.
        by_itself: Whether the module returned nothing else.
        parts: How many of each example the axis of the batch holds.
    """

    tap: Tap
    shape: tuple[int, ...]
    value: int
    by_itself: bool = True
    parts: int = 1


def choose_taps(network: Network, x: Inputs, *others: Inputs, most: int = 6) -> list[Tap]:
    """Places that describe what the classifier sees at several depths.

    Only what follows the batch counts: an axis that grows with the number of examples, along which
    values move as the examples do, and do not depend on the others. Position embeddings, weights
    that a parametrization computes, attention over stacked inputs and modules that some passes
    leave out are none of that; windows, frames and `batch_first=False` are.

    Activations are grouped into stages, runs of one shape, and the last one of each stage is
    taken, the latest `most` stages; a model with few stages (a transformer, an MLP) adds one in
    the middle of each. Of a transformer only what is as wide as its normalisation layers counts:
    the residual stream, not the inside of its feed-forward blocks. Of the last stage of a
    convolution net, whose weights carry most of the Jacobian, the normalisation layers and blocks
    are added, the latest first, up to `MAX_WIDTH` features. The input of the last linear layer,
    the penultimate features, comes last.

    Args:
        network: The model.
        x: Any inputs; up to five of them are run, a few times.
        *others: Inputs of other lengths; what changes its width with them is left out.
        most: Upper limit of the number of stages.
    """
    model, first = network.model, not _channels_last(network.model)
    seen, kept = _that_describe(network, x, others)
    chosen = _stages(kept, most)
    if first:
        chosen += _last_stage(model, kept, {each.value for each in chosen})
    taps = list({each.tap.module: each.tap for each in chosen}.values())
    name = last_linear(network, x)
    last = None if name is None else input_of(model, name)
    if not taps and seen:
        where = "logits alone" if last is None else "penultimate features"
        warnings.warn(
            f"No activation inside the model follows the batch, example by example, so that the "
            f"eigenfunctions read its {where}. If outputs of an example depend on the rest of "
            f"the batch, they cannot be trusted; else pass `NeuralEF(network=..., reads="
            f'"inputs")`, or restructure the forward pass.',
            stacklevel=2,
        )
    taps = taps if last is None else [*taps, last]
    log.info("activations are read at %s", ", ".join(tap.module for tap in taps) or "the logits")
    return taps


def stage_ends(network: Network, x: Inputs, *others: Inputs, most: int = 6) -> list[Tap]:
    """The ends of stages and the penultimate features: some of what `choose_taps` finds.

    Args:
        network: See `choose_taps`.
        x: See `choose_taps`.
        *others: See `choose_taps`.
        most: See `choose_taps`.
    """
    _, kept = _that_describe(network, x, others)
    name = last_linear(network, x)
    taps = {each.tap.module: each.tap for each in _stages(kept, most)}
    if name is not None:
        taps.pop(name, None)
        return [*taps.values(), input_of(network.model, name)]
    return list(taps.values())


def is_linear(module: nn.Module | None) -> bool:
    """Whether it is a linear layer, or a convolution that is one at each position."""
    if not isinstance(module, CONVOLUTIONS):
        return isinstance(module, nn.Linear)
    alone = (*module.kernel_size, *module.stride, module.groups)
    return set(alone) == {1} and set(module.padding) <= {0, "valid"}


def input_of(model: nn.Module, layer: str) -> Tap:
    """Where the input of a linear layer (`is_linear`) is read."""
    module = model.get_submodule(layer)
    if isinstance(module, CONVOLUTIONS):
        return Tap(layer, "input", channels_first=True, width=module.in_channels)
    width = module.in_features if isinstance(module, nn.Linear) else None
    return Tap(layer, "input", channels_first=False, width=width)


def last_linear(network: Network, x: Inputs) -> str | None:
    """Name of the linear layer (`is_linear`) whose output is the logits; None if there is none."""
    outputs: dict[str, Tensor] = {}

    def note(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output.detach().clone()

    modules = network.model.named_modules()
    names = [name for name, module in modules if is_linear(module)]
    x = _examples(x, FEW)
    logits = _noted(network, x, names, note)
    for name, output in reversed(outputs.items()):
        rows = as_rows(output, x) if output.ndim > 2 or not isinstance(x, Rows) else output
        if rows.shape == logits.shape and torch.equal(rows.to(logits), logits):
            return name
    return None


# What there is


def _examples(x: Inputs, n: int) -> Inputs:
    """As many examples, some of them again if there are fewer."""
    return _picked(x, torch.arange(n, device=input_tensors(x)[0].device) % num_examples(x))


def _picked(x: Inputs, index: Tensor) -> Inputs:
    """Some examples, or some rows with an input of its own for each."""
    if isinstance(x, Rows):
        inputs = take(x.inputs, x.example[index])
        return Rows(inputs, torch.arange(len(index)).to(index), x.position[index])
    return take(x, index)


def _noted(
    network: Network, x: Inputs, names: Iterable[str], note: Callable[[str, object], None]
) -> Tensor:
    """Logits; `note` is told what each of these modules returned."""

    def reader(name: str) -> Reader:
        return lambda module, args, output: note(name, output)

    # On copies of its own, as hooks on every module would stay on those of the network.
    return network.apart()(x, {name: reader(name) for name in names})


def _activations(network: Network, x: Inputs, channels_first: bool) -> list[Activation]:
    """What modules returned that grows with the batch, in the order of their ends.

    Vectors, and anything with positions; not the logits, nor vectors wider than `MAX_WIDTH`. What
    is returned with something else, as by attention or an LSTM, counts where there is nothing
    else with positions.
    """
    few, more = (_returned(network, _examples(x, n)) for n in (FEW, MORE))
    seen = []
    for name, shape in more.shapes.items():
        axis = _batch_axis(few.shapes.get(name, ()), shape)
        if axis is None:
            continue
        parts = shape[axis] // MORE
        rest = tuple(length for i, length in enumerate(shape) if i != axis)
        one = rest
        if parts > 1:
            one = (rest[0], parts, *rest[1:]) if channels_first else (parts, *rest)
        useful = len(one) == 1 or (len(one) > 1 and torch.Size(one[1:]).numel() > 1)
        too_wide = len(one) == 1 and one[0] > MAX_WIDTH
        if not useful or too_wide or one == tuple(more.logits.shape[1:]):
            continue
        tap = Tap(name, "output", channels_first, axis)
        value = more.values[name]
        seen.append(Activation(tap, one, abs(value), value > 0, parts))
    by_themselves = [each for each in seen if each.by_itself]
    return by_themselves if any(len(each.shape) > 1 for each in by_themselves) else seen


def _batch_axis(few: tuple[int, ...], more: tuple[int, ...]) -> int | None:
    """The axis that alone grows as the number of examples does."""
    if len(few) != len(more):
        return None
    grown = [i for i, (a, b) in enumerate(zip(few, more, strict=True)) if a != b]
    if len(grown) != 1 or few[grown[0]] * MORE != more[grown[0]] * FEW:
        return None
    return grown[0]


@dataclass(frozen=True)
class Returned:
    """What modules returned in one pass, the last time that each ran.

    Attributes:
        logits: Of the model.
        shapes: By module name, in the order of their ends, of what is real.
        values: By module name a number that modules share if one passes on what the other
            returned, negative where a module returned other things, too.
    """

    logits: Tensor
    shapes: dict[str, tuple[int, ...]]
    values: dict[str, int]


def _returned(network: Network, x: Inputs) -> Returned:
    shapes: dict[str, tuple[int, ...]] = {}
    values: dict[str, int] = {}
    latest: tuple[object, int] = (None, 0)
    value = 0

    def note(name: str, output: object) -> None:
        nonlocal latest, value
        found = first_tensor(output)
        if found is None:
            return
        # An in-place operation returns the same tensor in a new version.
        value += found is not latest[0] or found._version != latest[1]
        latest = found, found._version
        values[name] = value if isinstance(output, Tensor) else -value
        if found.is_floating_point():
            shapes.pop(name, None)  # in the order of the last calls
            shapes[name] = tuple(found.shape)

    names = [name for name, _ in network.model.named_modules() if name]
    return Returned(_noted(network, x, names, note), shapes, values)


# What follows the batch


def _that_describe(
    network: Network, x: Inputs, others: tuple[Inputs, ...]
) -> tuple[list[Activation], list[Activation]]:
    """All activations, and those that say something of each example."""
    model, first = network.model, not _channels_last(network.model)
    seen = _activations(network, x, first)
    found = _that_follow(network, x, others, seen)
    return seen, found if first else _residual_stream(model, found)


def _that_follow(
    network: Network, x: Inputs, others: tuple[Inputs, ...], seen: list[Activation]
) -> list[Activation]:
    """Activations that move as the examples do, ran in every pass, and keep their width."""
    other_way = [each for each in seen if each.parts > 1]
    other_way = [replace(each, tap=replace(each.tap, parts_first=True)) for each in other_way]
    both = seen + other_way
    taps = FeatureTaps(network.apart(), [each.tap for each in both])
    order = torch.tensor([3, 0, 4, 1, 2])
    whole = _examples(x, MORE)
    order = order.to(input_tensors(whole)[0].device)
    _, read = taps.each(whole)
    _, permuted = taps.each(_picked(whole, order))
    _, alone = taps.each(_picked(whole, order[:FEW]))
    elsewhere = [taps.each(_examples(other, FEW))[1] for other in others]
    kept: dict[str, Activation] = {}
    for i, each in enumerate(both):
        runs = (permuted.get(i), alone.get(i))
        found = read.get(i)
        if found is None or not all(_same(found[order], run, network.tolerance) for run in runs):
            continue
        if all(i in one and one[i].shape[1] == found.shape[1] for one in elsewhere):
            known = replace(each, tap=replace(each.tap, width=found.shape[1]))
            kept.setdefault(each.tap.module, known)
    return [kept[each.tap.module] for each in seen if each.tap.module in kept]


def _same(expected: Tensor, found: Tensor | None, tolerance: float) -> bool:
    """Whether the first examples agree, but for rounding."""
    if found is None or found.shape[1:] != expected.shape[1:]:
        return False
    expected = expected[: len(found)]
    scale = expected.abs().max().clamp_min(1e-12)
    return bool((found - expected).abs().max() <= tolerance * scale)


# What is worth reading


def _stages(seen: list[Activation], most: int) -> list[Activation]:
    """The last activation of the latest runs of one shape, and the middle where runs are few."""
    runs: list[list[Activation]] = []
    previous = None
    for each in seen:
        if each.shape != previous:
            runs.append([])
        runs[-1].append(each)
        previous = each.shape
    if len(runs) < 3:
        return [each for run in runs for each in (run[len(run) // 2], run[-1])]
    return [run[-1] for run in runs[-most:]]


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
        module = model.get_submodule(each.tap.module)
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


def _channels_last(model: nn.Module) -> bool:
    """Whether activations are (n, positions, channels), as in transformers."""
    blocks = [m for m in model.modules() if isinstance(m, (nn.LayerNorm, *CONVOLUTIONS))]
    return not blocks or isinstance(blocks[-1], nn.LayerNorm)
