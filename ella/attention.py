"""Attention multiplied out, so that it can be differentiated in every way."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

FUSED = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules with a fast path that skips their parts, and with it the hooks of these."""


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
