"""Attention on packed sequences, a sequence at a time, by softmax written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transformer_engine.pytorch import record
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.record import attentions, packed

# What TE chose for the last pass: one of the three, and why not another it only logs.
_attention_backends: dict[str, Any] = {
    "attention_params": None,
    "use_flash_attention": None,
    "flash_attention_backend": None,
    "use_fused_attention": None,
    "fused_attention_backend": None,
    "use_unfused_attention": None,
    "backend_selection_requires_update": False,
}


class DotProductAttention(TransformerEngineBaseModule):
    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: dist.ProcessGroup | None = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert (attention_dropout, attn_mask_type, attention_type) == (0.0, "causal", "self")
        assert num_gqa_groups is not None
        assert tp_group is not None
        assert tp_size == tp_group.size()
        self.window_size = (-1, 0) if window_size is None else window_size
        assert self.window_size[1] == 0, "of a causal mask"
        self.kv_channels, self.groups = kv_channels, num_gqa_groups // tp_size
        self.heads = num_attention_heads // tp_size
        self.scale = kv_channels**-0.5 if softmax_scale is None else softmax_scale
        attentions.append((self.window_size, self.scale))

        def without_core_attention(_: Any, keys: Any) -> None:
            """As in TE: checkpoints need not have its extra state."""
            for key in [key for key in keys.missing_keys if "core_attention._extra_state" in key]:
                keys.missing_keys.remove(key)

        self.register_load_state_dict_post_hook(without_core_attention)

    def forward(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        pad_between_seqs: bool | None = None,
    ) -> Tensor:
        """[t, heads, d], [t, groups, d] twice -> [t, heads * d]."""
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding_causal", None)
        assert pad_between_seqs is None, "it follows from the padded lengths"
        assert cu_seqlens_q_padded is None
        assert cu_seqlens_kv_padded is None
        assert cu_seqlens_q is not None
        assert cu_seqlens_kv is not None
        assert cu_seqlens_q.dtype == cu_seqlens_kv.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_kv)
        tokens = query_layer.shape[0]
        assert query_layer.shape == (tokens, self.heads, self.kv_channels)
        assert key_layer.shape == value_layer.shape == (tokens, self.groups, self.kv_channels)
        assert query_layer.dtype == key_layer.dtype == value_layer.dtype
        ends = cu_seqlens_q.tolist()
        assert ends[0] == 0
        assert ends[-1] == tokens
        assert max(b - a for a, b in pairwise(ends)) == max_seqlen_q == max_seqlen_kv
        packed.append((len(ends) - 1, tokens))
        for backend in ("flash", "fused", "unfused"):
            _attention_backends[f"use_{backend}_attention"] = backend == record.backend
        if record.out_of_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.cat(
            [
                self._of_sequence(*(x[start:end] for x in (query_layer, key_layer, value_layer)))
                for start, end in pairwise(ends)
            ]
        )

    def _of_sequence(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query.float(), key.float()) * self.scale
        behind = torch.arange(len(query))[:, None] - torch.arange(len(query))[None, :]
        left = math.inf if self.window_size[0] < 0 else self.window_size[0]
        scores = scores.masked_fill((behind < 0) | (behind > left), -math.inf)
        out = torch.einsum("hij,jhd->ihd", scores.softmax(-1), value.float())
        return out.to(query.dtype).flatten(1)
