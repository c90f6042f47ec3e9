"""Last-layer eigenfunctions: the kernel of the final linear layer alone."""

from dataclasses import dataclass

import torch

from ella.activations import FeatureTaps
from ella.batches import Batches, Loader, as_batches
from ella.choosing import input_of, is_linear, last_linear
from ella.eigenfunctions.base import check_product_residual
from ella.inputs import Inputs
from ella.linearize import Linearized
from ella.network import Network
from ella.predictive import LogitGaussian
from ella.saving import State


@dataclass(frozen=True)
class LastLayer:
    r"""φ(x) = [h(x), 1] ⊗ I_c, h being the penultimate features: exact last-layer Laplace.

    k = c·(d + 1). With a residual, the rest of the network adds its prior variance
    κ(x, x) − φφᵀ, which last-layer Laplace leaves out.

    Attributes:
        residual: "diag", "exact" (full c×c blocks) or "none".
    """

    residual: str = "diag"

    def __post_init__(self) -> None:
        check_product_residual(self.residual)

    def fit(
        self, linearized: Linearized, loader: Loader | Batches, *, seed: int, progress: bool
    ) -> "LastLayerFeatures":
        """See `EigenfunctionMethod.fit`. One batch is looked at, to find the layer.

        Raises:
            ValueError: If the model's outputs are not those of a trainable linear layer, or half
                of the memory budget does not hold the k×k matrix G.
        """
        batches = as_batches(loader, linearized.network)
        first = batches.first()
        seen = None if first is None else (last_linear(linearized.network, first[0]),)
        (name,) = batches.processes.agreed(seen)
        if name is None:
            raise ValueError(
                "LastLayer needs a model whose outputs come straight from an nn.Linear, or from a "
                "convolution of size 1. Use NeuralEF or Nystrom instead."
            )
        found = LastLayerFeatures(linearized, name, self.residual)
        if 16 * found.rank**2 > linearized.memory_budget:
            raise ValueError(
                f"LastLayer has k = c·(d + 1) = {found.rank:,} eigenfunctions here, and a k×k "
                f"matrix of {8 * found.rank**2 / 2**30:.1f} GiB exceeds half of the memory "
                f"budget. Raise `memory_budget`, or use NeuralEF, Nystrom, or "
                f'baselines.LastLayerLaplace(structure="kron").'
            )
        return found

    def restore(
        self, network: Network, state: State, *, trainable: tuple[str, ...], memory_budget: int
    ) -> "LastLayerFeatures":
        """See `EigenfunctionMethod.restore`."""
        linearized = Linearized(network, memory_budget=memory_budget, trainable=trainable)
        return LastLayerFeatures(linearized, state.text("layer"), state.text("residual"))


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
        linear = dict(linearized.network.model.named_modules()).get(layer)
        dot = f"{layer}." if layer else ""
        if not is_linear(linear) or f"{dot}weight" not in linearized.trainable:
            raise ValueError(f"LastLayer needs a trainable linear layer at {layer!r}.")
        weight = linearized.network.parameters((f"{dot}weight",))[f"{dot}weight"]
        self.num_features, self.num_inputs = weight.shape[:2]
        self.has_bias = f"{dot}bias" in linearized.trainable
        self.taps = FeatureTaps(linearized.network, [input_of(linearized.network.model, layer)])

    @property
    def rank(self) -> int:
        """K = c·(d + 1), or c·d without a bias."""
        return self.num_features * (self.num_inputs + self.has_bias)

    def __call__(self, x: Inputs) -> LogitGaussian:
        """Evaluate at n inputs; a residual costs c row gradients each, in chunks."""
        logits, tapped = self.taps(x)
        n, c = logits.shape
        h = tapped[:, :-c]
        if self.has_bias:
            h = torch.cat([h, h.new_ones(n, 1)], dim=1)
        eye = torch.eye(c, dtype=h.dtype, device=h.device)
        phi = torch.einsum("nd,oc->nocd", h, eye).flatten(2)
        if self.residual == "none":
            return LogitGaussian(logits, phi, None)
        inside = h.square().sum(-1)
        if self.residual == "diag":
            outside = self.linearized.kernel_diagonal(x) - inside.unsqueeze(1)
            return LogitGaussian(logits, phi, outside.clamp_min(0))
        return LogitGaussian(
            logits, phi, self.linearized.kernel_blocks(x) - inside[:, None, None] * eye
        )

    def state(self) -> State:
        """See `Eigenfunctions.state`."""
        return State({}, {"residual": self.residual, "layer": self.layer})
