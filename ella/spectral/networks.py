"""Small networks for eigenfunctions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MANY_OUTPUTS = 8
"""See `ResidualMLP`."""


class ResidualMLP(nn.Module):
    """A linear map plus a multi-layer perceptron, from vectors (n, d) to values (n, *shape).

    Inputs are standardised with statistics that `standardize` stores. The linear map goes through
    `width` numbers where there are more than `MANY_OUTPUTS` times as many outputs as that: in full
    it would be most of the network.

    Args:
        num_inputs: d.
        shape: Shape of the output after the examples, such as (c, k).
        width: Hidden units per layer.
        depth: Hidden layers; 0 leaves the linear map alone.
        dropout: Dropout probability in the hidden layers while training.
        generator: Source of the initial weights.
    """

    mean: Tensor
    scale: Tensor

    def __init__(
        self,
        num_inputs: int,
        shape: Sequence[int],
        *,
        width: int = 512,
        depth: int = 2,
        dropout: float = 0.1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.num_inputs, self.width, self.depth, self.dropout = num_inputs, width, depth, dropout
        num_outputs = int(torch.Size(self.shape).numel())
        self.register_buffer("mean", torch.zeros(num_inputs))
        self.register_buffer("scale", torch.ones(num_inputs))
        self.linear: nn.Module
        if depth and num_inputs > width and num_outputs > MANY_OUTPUTS * width:
            narrow = _linear(num_inputs, width, generator)
            self.linear = nn.Sequential(narrow, _linear(width, num_outputs, generator))
        else:
            self.linear = _linear(num_inputs, num_outputs, generator)
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [_linear(width if i else num_inputs, width, generator), nn.GELU()]
            layers += [nn.Dropout(dropout)] if dropout else []
        if depth:
            layers.append(_linear(width, num_outputs, generator))
        self.mlp = nn.Sequential(*layers) if depth else None

    def standardize(self, features: Tensor) -> None:
        """Set the input mean and scale from examples (n, d); constant inputs keep scale 1."""
        with torch.no_grad():
            self.mean.copy_(features.mean(0))
            spread = features.std(0)
            self.scale.copy_(torch.where(spread > 1e-6 * spread.max(), spread, 1))

    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, for rebuilding the module before loading its weights."""
        names = ("num_inputs", "shape", "width", "depth", "dropout")
        return {name: getattr(self, name) for name in names}

    def forward(self, features: Tensor) -> Tensor:
        """Values of shape (n, *shape)."""
        x = (features - self.mean) / self.scale
        out = self.linear(x)
        if self.mlp is not None:
            out = out + self.mlp(x)
        return out.unflatten(-1, self.shape)


def _linear(num_inputs: int, num_outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer whose weights come from `generator` and leave the global RNG alone."""
    layer = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs)
    with torch.no_grad():
        layer.weight.normal_(0, num_inputs**-0.5, generator=generator)
        layer.bias.zero_()
    return layer
