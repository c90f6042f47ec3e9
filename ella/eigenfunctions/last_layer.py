"""Last-layer eigenfunctions: the kernel of the final linear layer alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ella.activations import FeatureTaps, Tap, last_linear
from ella.eigenfunctions.base import Features, check_product_residual
from ella.inputs import Inputs, batches
from ella.linearize import Linearized


@dataclass(frozen=True)
class LastLayer:
    r"""φ(x) = [h(x), 1] ⊗ I_c, h being the penultimate features: exact last-layer Laplace.

    k = c·(d + 1). With a residual, the rest of the network adds its prior variance
    κ(x, x) − φφᵀ, which last-layer Laplace leaves out.
    """

    def fit(
        self,
        linearized: Linearized,
        loader: Iterable[Any],
        *,
        residual: str,
        seed: int,
        progress: bool,
    ) -> "LastLayerFeatures":
        """See `EigenfunctionMethod.fit`. One batch is looked at, to find the layer.

        Raises:
            ValueError: If the model's outputs are not those of a trainable `nn.Linear`.
        """
        x, _ = next(batches(loader, linearized.device))
        name = last_linear(linearized, x)
        if name is None:
            raise ValueError(
                "LastLayer needs a model whose outputs come straight from an nn.Linear. Use "
                "NeuralEF or Nystrom instead."
            )
        return LastLayerFeatures(linearized, name, residual)

    def restore(
        self, linearized: Linearized, tensors: dict[str, Tensor], settings: dict[str, Any]
    ) -> "LastLayerFeatures":
        """See `EigenfunctionMethod.restore`."""
        return LastLayerFeatures(linearized, settings["layer"], settings["residual"])


class LastLayerFeatures:
    """The Jacobian of the last linear layer, written down without differentiating.

    Args:
        linearized: The model.
        layer: Name of the last linear layer.
        residual: "diag", "exact" or "none".
    """

    def __init__(self, linearized: Linearized, layer: str, residual: str) -> None:
        check_product_residual(residual)
        self.linearized = linearized
        self.layer = layer
        self.residual = residual
        linear = linearized.model.get_submodule(layer)
        if not isinstance(linear, nn.Linear) or not linear.weight.requires_grad:
            raise ValueError(f"LastLayer needs a trainable nn.Linear at {layer!r}.")
        self.has_bias = linear.bias is not None and linear.bias.requires_grad
        self.taps = FeatureTaps(linearized, [Tap(layer, "input", channels_first=True)])

    def __call__(self, x: Inputs) -> Features:
        """Evaluate at n inputs; a residual costs c row gradients each, in chunks."""
        logits, tapped = self.taps(x)
        n, c = logits.shape
        h = tapped[:, :-c]
        if self.has_bias:
            h = torch.cat([h, h.new_ones(n, 1)], dim=1)
        eye = torch.eye(c, dtype=h.dtype, device=h.device)
        phi = torch.einsum("nd,oc->nocd", h, eye).flatten(2)
        if self.residual == "none":
            return Features(logits, phi, None)
        inside = h.square().sum(-1)
        if self.residual == "diag":
            outside = self.linearized.kernel_diagonal(x) - inside.unsqueeze(1)
            return Features(logits, phi, outside.clamp_min(0))
        return Features(
            logits, phi, self.linearized.kernel_blocks(x) - inside[:, None, None] * eye
        )

    def tensors(self) -> dict[str, Tensor]:
        """See `Eigenfunctions.tensors`."""
        return {}

    def settings(self) -> dict[str, Any]:
        """See `Eigenfunctions.settings`."""
        return {"residual": self.residual, "layer": self.layer}
