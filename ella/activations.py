"""Frozen features of a classifier, read off during its own forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ella.inputs import Inputs, Rows, attention_mask, model_inputs, num_examples
from ella.network import Network
from ella.saving import State
from ella.views import Reader

STATISTICS = 3
"""Numbers that `Tap` makes of one channel: mean, deviation, share above zero."""


@dataclass(frozen=True)
class Tap:
    """Where activations are read.

    Attributes:
        module: Name of the module in `model.named_modules()`.
        side: Its "input" or its "output".
        channels_first: Whether the channels come right after the examples; else they are last.
        axis: Which axis holds the examples; it may hold several parts of each, such as windows,
            frames or the two inputs of a siamese network.
        parts_first: Whether it holds the first part of all examples, then the second; else all
            parts of the first example, then of the second.
        width: Numbers that are read of one example, which are 0 where a forward pass left the
            module out; None if that is not known.
    """

    module: str
    side: str
    channels_first: bool
    axis: int = 0
    parts_first: bool = False
    width: int | None = None

    def pool(self, activation: Tensor, mask: Tensor | None = None, n: int | None = None) -> Tensor:
        """Means, standard deviations and shares above zero of each channel, or the vector: (n, d).

        The share above zero is, before a ReLU, the share of positions that gradients pass.

        Args:
            activation: Shape (n, d), or (n, channels, *positions), or (n, *positions, channels),
                but for `axis`.
            mask: Zero at the positions that are padding and do not count, shape (n, positions).
            n: Number of examples; None takes the length of `axis`.
        """
        channels = self._channels_second(activation, n)
        if channels.ndim == 2:
            return channels
        flat = channels.flatten(2)
        if mask is not None:
            mask = fitted_mask(mask, flat.shape[-1])
        if mask is not None:
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

    def fits(self, activation: Tensor, n: int) -> bool:
        """Whether its axis can hold n examples."""
        shape = activation.shape
        return len(shape) > max(1, self.axis) and n > 0 and shape[self.axis] % n == 0

    def at_rows(self, activation: Tensor, rows: Rows, positions: tuple[int, ...]) -> Tensor:
        """Activations at positions of the outputs, shape (m, d); vectors are repeated.

        Args:
            activation: See `pool`.
            rows: Examples and positions.
            positions: Lengths of the axes of positions of the outputs. Activations on a coarser
                grid are those of the cell that a position lies in; those on none are pooled.
        """
        n = num_examples(rows.inputs)
        channels = self._channels_second(activation, n)
        if channels.ndim == 2 + len(positions):
            cells = grid_cells(rows.position, positions, tuple(channels.shape[2:]))
            return channels.flatten(2)[rows.example, :, cells]
        return self.pool(activation, attention_mask(rows), n)[rows.example]

    def _channels_second(self, activation: Tensor, n: int | None) -> Tensor:
        """Shape (n, d) or (n, channels, *positions); half precision is widened."""
        found = activation.movedim(self.axis, 0) if self.axis else activation
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        parts = 1 if n is None or found.shape[0] == n else found.shape[0] // n
        if parts > 1:
            shape = (parts, n or 1) if self.parts_first else (n or 1, parts)
            found = found.unflatten(0, shape)
            found = found.transpose(0, 1) if self.parts_first else found
            return found.movedim(2 if self.channels_first else -1, 1)
        return found if self.channels_first or found.ndim == 2 else found.movedim(-1, 1)


def fitted_mask(mask: Tensor, length: int) -> Tensor | None:
    """A mask (n, positions) for activations of another length.

    What a model pads further is padding; where it strides, a cell counts if it holds something
    that does. None if a length of 1 leaves nothing to tell apart.
    """
    n, own = mask.shape
    if length == own:
        return mask
    if length > own:
        return torch.cat([mask, mask.new_zeros(n, length - own)], dim=1)
    if length == 1:
        return None
    real = (mask != 0).to(torch.float32).unsqueeze(1)
    return nn.functional.adaptive_max_pool1d(real, length).squeeze(1)


def grid_cells(position: Tensor, fine: tuple[int, ...], coarse: tuple[int, ...]) -> Tensor:
    """Cells of a coarse grid that hold positions of a fine one, both counted through."""
    found, rest = torch.zeros_like(position), position
    stride = 1
    for wide, narrow in zip(reversed(fine), reversed(coarse), strict=True):
        along, rest = rest % wide, rest // wide
        found = found + (2 * along + 1) * narrow // (2 * wide) * stride
        stride *= narrow
    return found


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
                axis, width = found.get("axis", 0), found.get("width")
                if axis not in (0, 1, 2, 3) or not isinstance(width, (int, type(None))):
                    raise ValueError(f"{found!r} says of no activation where it is read")
                parts = bool(found.get("parts_first", False))
                taps.append(Tap(module, found["side"], first, axis, parts, width))
            case _:
                raise ValueError(f"{found!r} says of no activation where it is read")
    return taps


class FeatureTaps:
    """Logits and pooled activations of several depths, from one forward pass.

    Of padded sequences the padding does not count, if the inputs are a mapping that holds
    `attention_mask`, as Hugging Face's do. At `Rows` activations are read where the row is.

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
        self._places: dict[str, list[int]] = {}
        names = network.named(tap.module for tap in taps)
        for i, (tap, name) in enumerate(zip(taps, names, strict=True)):
            if name not in modules:
                raise ValueError(f"The model has no module named {tap.module!r} to read.")
            self._places.setdefault(name, []).append(i)

    def __call__(self, x: Inputs) -> tuple[Tensor, Tensor]:
        """Logits (n, c) and features (n, d): every tap, then the logits."""
        logits, pooled = self.each(x)
        return logits, torch.cat([*all_read(self.taps, pooled, logits), logits], dim=1)

    def each(self, x: Inputs) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits, and what was read by every tap whose module ran."""
        pooled: dict[int, Tensor] = {}
        mask, n = attention_mask(x), num_examples(model_inputs(x))
        positions = self.network.layout(x).positions if isinstance(x, Rows) else ()

        def reader(indices: list[int]) -> Reader:
            def read(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ANN401
                # Pooled at once: a later in-place operation may overwrite the activation.
                for i in indices:
                    tap = self.taps[i]
                    value = first_tensor(args if tap.side == "input" else output)
                    if value is None or not tap.fits(value, n):
                        pooled.pop(i, None)  # a module may run several times; the last counts
                        continue
                    if isinstance(x, Rows):
                        pooled[i] = tap.at_rows(value, x, positions)
                    else:
                        pooled[i] = tap.pool(value, mask, n)

            return read

        readers = {name: reader(indices) for name, indices in self._places.items()}
        return self.network(x, readers), pooled


def all_read(taps: Sequence[Tap], pooled: Mapping[int, Tensor], logits: Tensor) -> list[Tensor]:
    """What every tap read, by its number; zeros where a forward pass left its module out.

    Raises:
        ValueError: If a file of version 0.1 does not say how many.
    """
    return [pooled[i] if i in pooled else _nothing(tap, logits) for i, tap in enumerate(taps)]


def _nothing(tap: Tap, logits: Tensor) -> Tensor:
    if tap.width is None:
        raise ValueError(
            f"The model left out its module {tap.module!r}, whose activations are needed. Fit "
            f"again: newer files know what to put in their place."
        )
    return logits.new_zeros(logits.shape[0], tap.width)


def first_tensor(value: object) -> Tensor | None:
    """The tensor that a module returned or was given, or the first of several."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return next((found for each in value if (found := first_tensor(each)) is not None), None)
    return None
