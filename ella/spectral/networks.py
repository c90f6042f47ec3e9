"""Small networks for eigenfunctions."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ella.spectral.laplacian import Jet

MAX_DEPTH = 64
"""Hidden layers that a file may ask for."""


class ResidualMLP(nn.Module):
    """A linear map plus a multi-layer perceptron, from vectors (n, d) to values (n, *shape).

    Inputs are standardised with statistics that `standardize` stores. The linear map and the
    perceptron share their first layer: with two, the one to the outputs would be most of the
    network. With a bottleneck they end in that many units, of which one more linear layer makes
    the outputs: b + 1 numbers an output instead of 2·width + 2.

    Args:
        num_inputs: d.
        shape: Shape of the output after the examples, such as (c, k).
        width: Hidden units per layer.
        depth: Hidden layers; 0 leaves a linear map alone.
        dropout: Dropout probability in the hidden layers while training.
        bottleneck: b, units before the outputs; None leaves them out.
        generator: Source of the initial weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        num_inputs: int,
        shape: Sequence[int],
        *,
        width: int = 256,
        depth: int = 2,
        dropout: float = 0.1,
        bottleneck: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.bottleneck = tuple(shape), bottleneck
        self.num_inputs, self.width, self.depth, self.dropout = num_inputs, width, depth, dropout
        num_outputs = int(torch.Size(self.shape).numel())
        narrow = num_outputs if bottleneck is None else bottleneck
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("scale", torch.ones(num_inputs))
        self.first = _linear(num_inputs, width, generator) if depth else None
        self.linear = _linear(width if depth else num_inputs, narrow, generator)
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [_linear(width, width, generator)] if i else []
            layers += [nn.GELU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        if depth:
            layers.append(_linear(width, narrow, generator))
        self.mlp = nn.Sequential(*layers) if depth else None
        self.head = None if bottleneck is None else _linear(narrow, num_outputs, generator)

    def standardize(self, features: Tensor) -> None:
        """Set the input mean and scale from examples (n, d); constant inputs keep scale 1."""
        with torch.no_grad():
            self.mean.copy_(features.mean(0))
            spread = features.std(0)
            self.scale.copy_(torch.where(spread > 1e-6 * spread.max(), spread, 1))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, for rebuilding the module before loading its weights."""
        names = ("num_inputs", "shape", "width", "depth", "dropout", "bottleneck")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "ResidualMLP":
        """The network of these `settings` with these weights, in their dtype.

        Nothing of a size that the settings claim is built before the tensors have shown it.

        Raises:
            TypeError: If a setting has another name or type.
            ValueError: If a size is out of range, or tensors are missing, misshaped or not finite.
        """
        known = {**settings, "shape": tuple(settings["shape"])}
        if not 0 <= known["depth"] <= MAX_DEPTH:
            raise ValueError(f"`depth` must lie in 0..{MAX_DEPTH}; got {known['depth']}")
        # On the meta device, too, some versions of torch draw first weights.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = cls(**known)
        for name, empty in network.state_dict().items():
            found = tensors.get(name)
            if found is None or found.shape != empty.shape or not found.is_floating_point():
                got = "none" if found is None else f"{tuple(found.shape)} of {found.dtype}"
                raise ValueError(f"{name!r} must be a tensor {tuple(empty.shape)}; got {got}")
            if not torch.isfinite(found).all():
                raise ValueError(f"{name!r} holds NaN or infinite values")
        if not (tensors["scale"] > 0).all():
            raise ValueError("'scale' must be above 0")
        network.load_state_dict(dict(tensors), assign=True)
        return network

    def forward(self, features: Tensor) -> Tensor:
        """Values of shape (n, *shape)."""
        parts = [F.linear(x, last.weight, last.bias) for x, last in self._read(features)]
        return _sum(parts).view(-1, *self.shape)

    def at_rows(self, features: Tensor, rows: Tensor) -> Tensor:
        """Values at some places of the first axis of the outputs, computed there alone.

        Args:
            features: Shape (n, d).
            rows: Places of each example, shape (n, q).

        Returns:
            Shape (n, q, *shape[1:]).
        """
        parts = [_linear_at(x, last, rows, self.shape[0]) for x, last in self._read(features)]
        return _sum(parts).view(*rows.shape, *self.shape[1:])

    def _read(self, features: Tensor) -> list[tuple[Tensor, nn.Linear]]:
        """The layers that give the outputs as their sum, each with what it reads."""
        x = (features - self.mean) / self.scale
        if self.first is not None:
            x = F.linear(x, self.first.weight, self.first.bias)
        read = [(x, self.linear)]
        if self.mlp is not None:
            for layer in self.mlp[:-1]:
                x = layer(x)
            read.append((x, _linear_layers(self)[-1]))
        if self.head is None:
            return read
        return [(_sum([F.linear(x, last.weight, last.bias) for x, last in read]), self.head)]


class SideBySide:
    """Trained `ResidualMLP`s on the same inputs, as batched products of stacked weights.

    For one example the calls of modules would cost more than their arithmetic. Narrow networks
    are filled up with units that stay 0. Dropout is off; later changes may not be seen.

    Args:
        networks: Of one number of inputs and depth, which is at least 1.
    """

    def __init__(self, networks: Sequence[ResidualMLP]) -> None:
        self.shapes = [network.shape for network in networks]
        self.mean = torch.stack([network.mean for network in networks]).unsqueeze(1)
        self.scale = torch.stack([network.scale for network in networks]).unsqueeze(1)
        width = max(network.width for network in networks)
        *hidden, linear, last = zip(*map(_linear_layers, networks), strict=True)
        self.hidden = [_stacked(layers, width, first=not i) for i, layers in enumerate(hidden)]
        # The linear map and the perceptron's last layer as one, on both of what they read.
        self.last = [
            (
                torch.cat([_wide(layer.weight, width) for layer in both], dim=1),
                sum(layer.bias.detach() for layer in both),
            )
            for both in zip(linear, last, strict=True)
        ]
        self.heads = [network.head for network in networks]

    @staticmethod
    def fitting(networks: Sequence[nn.Module]) -> "SideBySide | None":
        """These networks, if they can be evaluated so."""
        # Not `isinstance`: a class derived from it may do anything.
        known = [net for net in networks if type(net) is ResidualMLP and net.depth]
        sizes = {(net.num_inputs, net.depth) for net in known}
        return SideBySide(known) if len(known) == len(networks) and len(sizes) == 1 else None

    def __call__(self, features: Tensor) -> list[Tensor]:
        """What each network makes of inputs (n, d)."""
        (weight, bias), *others = self.hidden
        x = hidden = torch.baddbmm(bias, (features - self.mean) / self.scale, weight)
        for weight, bias in others:
            hidden = torch.baddbmm(bias, F.gelu(hidden), weight)
        read = torch.cat([x, F.gelu(hidden)], dim=-1)
        found = []
        for each, last, head, shape in zip(read, self.last, self.heads, self.shapes, strict=True):
            out = F.linear(each, *last)
            found.append((out if head is None else head(out)).view(-1, *shape))
        return found


def _sum(parts: list[Tensor]) -> Tensor:
    """Of one or two."""
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _linear_at(x: Tensor, layer: nn.Linear, rows: Tensor, count: int) -> Tensor:
    """What a layer makes of x (n, h) at rows (n, q) of its outputs in `count` groups: (n, q, m).

    Pairs of an example and a row are sorted by row, so that each row's weights are read once,
    however many examples ask for it, and no weight is copied for each pair.
    """
    n, q = rows.shape
    present, place, counts = rows.flatten().unique(return_inverse=True, return_counts=True)
    order, most = place.argsort(stable=True), int(counts.max())
    ahead = counts.cumsum(0) - counts
    slots = torch.empty_like(order)
    slots[order] = torch.arange(n * q, device=x.device) - ahead[place[order]]
    slots += place * most
    of_pair = x.repeat_interleave(q, dim=0)
    sorted_x = x.new_zeros(len(present) * most, x.shape[1]).index_copy(0, slots, of_pair)
    weight = layer.weight.view(count, -1, x.shape[1])[present]
    bias = layer.bias.view(count, 1, -1)[present]
    found = torch.baddbmm(bias, sorted_x.view(len(present), most, -1), weight.mT)
    return found.flatten(0, 1)[slots].view(n, q, -1)


def _linear_layers(network: ResidualMLP) -> list[nn.Linear]:
    """The first, those between hidden layers, the linear map's, and the perceptron's last."""
    layers = [layer for layer in network.mlp or () if isinstance(layer, nn.Linear)]
    first = [] if network.first is None else [network.first]
    return [*first, *layers[:-1], network.linear, *layers[-1:]]


def _stacked(layers: Sequence[nn.Linear], width: int, *, first: bool) -> tuple[Tensor, Tensor]:
    """Weights (m, inputs, width) and biases (m, 1, width) of m layers, zeros at missing units."""
    weights = [layer.weight if first else _wide(layer.weight, width) for layer in layers]
    biases = [_wide(layer.bias, width) for layer in layers]
    return (
        torch.stack([_wide(weight.T, width) for weight in weights]),
        torch.stack(biases).unsqueeze(1),
    )


def _wide(values: Tensor, width: int) -> Tensor:
    """Filled up with zeros to this many columns."""
    return F.pad(values.detach(), (0, width - values.shape[-1]))


def _linear(num_inputs: int, num_outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer whose weights come from `generator` and leave the global RNG alone."""
    device = torch.get_default_device()
    layer = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs, device=device)
    if layer.weight.is_meta:  # to be filled from a file
        return layer
    with torch.no_grad():
        layer.weight.normal_(0, num_inputs**-0.5, generator=generator)
        layer.bias.zero_()
    return layer


class ParallelMLP(nn.Module):
    """k separate perceptrons for k scalar functions of x ∈ R^d, evaluated together.

    Function j is envelope(x) · MLP_j(features(x)). Separate networks do not trade one function's
    accuracy for another's; the layout (k, width, n) makes them one batched product.

    Args:
        num_inputs: d.
        num_functions: k.
        width: Hidden units of each.
        depth: Hidden layers, at least 1.
        activation: A smooth elementwise function; with `torch.sin` the first biases are phases.
        features: Maps x (n, d) to (n, m), row by row; None leaves x as it is.
        envelope: Maps x (n, d) to (n,), row by row: boundary conditions or decay; None is 1.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        num_inputs: int,
        num_functions: int,
        *,
        width: int = 32,
        depth: int = 2,
        activation: Callable[[Tensor], Tensor] = torch.sin,
        features: Callable[[Tensor], Tensor] | None = None,
        envelope: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.features, self.envelope = activation, features, envelope
        m = num_inputs if features is None else features(torch.zeros(1, num_inputs)).shape[1]
        widths = [m, *[width] * depth, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in itertools.pairwise(widths):
            weight = torch.empty(num_functions, fan_out, fan_in)
            self.weights.append(
                nn.Parameter(weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator))
            )
            self.biases.append(nn.Parameter(torch.zeros(num_functions, fan_out, 1)))
        if activation is torch.sin:
            with torch.no_grad():
                self.biases[0].uniform_(0, 2 * math.pi, generator=generator)

    def hidden(self, x: Tensor) -> Tensor:
        """All units of the last hidden layer at points (n, d): shape (n, k·width)."""
        return self._units(x).flatten(0, 1).T

    def forward(self, x: Tensor) -> Tensor:
        """Values (n, 1, k) of points (n, d)."""
        values = (self.weights[-1] @ self._units(x) + self.biases[-1])[:, 0].T
        if self.envelope is not None:
            values = values * self.envelope(x).unsqueeze(1)
        return values.unsqueeze(1)

    def _units(self, x: Tensor) -> Tensor:
        """The last hidden layer, shape (k, width, n)."""
        hidden = (x if self.features is None else self.features(x)).T
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            hidden = self.activation(weight @ hidden + bias)
        return hidden

    def jet(self, x: Tensor) -> Jet:
        """Value, gradient and Laplacian, each with trailing axes (n, 1, k)."""
        if self.features is None:
            axes = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
            jet = Jet(x, axes.unsqueeze(1).expand(-1, len(x), -1), torch.zeros_like(x))
        else:
            jet = Jet.of(self.features, x)
        jet = Jet(*(part.mT.unsqueeze(-3) for part in jet))
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            jet = jet.elementwise(self.activation) if i else jet
            jet = jet.linear(weight.matmul, bias)
        jet = Jet(*(part[..., 0, :].mT for part in jet))
        if self.envelope is not None:
            jet = jet * Jet(*(part.unsqueeze(-1) for part in Jet.of(self.envelope, x)))
        return Jet(*(part.unsqueeze(-2) for part in jet))


class LinearHead(nn.Module):
    """k linear combinations ψ = h W of the hidden units h of perceptrons, all units together.

    The outputs are linear in W, so the best W for given units has a closed form: see `ritz_head`.

    Args:
        body: Whose hidden units; its own last layer and its envelope are not used.
        weight: W, shape (units, k).
    """

    def __init__(self, body: ParallelMLP, weight: Tensor) -> None:
        super().__init__()
        self.body, self.weight = body, nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Values (n, 1, k) of points (n, d)."""
        return (self.body.hidden(x) @ self.weight).unsqueeze(1)
