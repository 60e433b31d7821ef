"""The layers that Megatron-Core's own spec lacks: a norm for sequence parallelism, an attention on packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional

from megatron_tempo.models.packing import Packing


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 (Zhang & Sennrich 2019), scaled by a weight.

    Under sequence parallelism each tensor rank sees a part of the tokens, so the weight is marked for Megatron to sum
    its gradient over the tensor ranks; its own torch norm refuses that case.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension, in the type of `x`."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class PackedAttention(nn.Module):
    """Causal attention on packed sequences by torch's scaled_dot_product_attention, grouped queries included."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> Tensor:
        """Query [S, 1, heads, d], key and value [S, 1, groups, d] -> [S, 1, heads * d]; the packing parts sequences."""
        assert packed_seq_params is not None, "every micro-batch carries its packing"
        grid = packed_seq_params.grid.clamp(min=0)  # behind a sequence's end any token will do: causality hides it
        repeats = query.shape[2] // key.shape[2]

        def on_grid(x: Tensor, times: int) -> Tensor:
            return x[grid, 0].repeat_interleave(times, dim=2).transpose(1, 2)

        out = functional.scaled_dot_product_attention(
            on_grid(query, 1), on_grid(key, repeats), on_grid(value, repeats), is_causal=True, scale=self.scale
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)[packed_seq_params.cells, None]
