"""The KV cache of the embedded engine, and its attention on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import sdpa_mask

from megatron_tempo.config.sizes import CACHE_ROOM

GROUPED = "megatron_tempo_grouped_sdpa"


def new_cache() -> Cache:
    """An empty cache for any model."""
    return Cache(layer_class_to_replicate=RoomyLayer)


class RoomyLayer(DynamicLayer):
    """The keys and values of a layer, [rows, groups, tokens, d]: views of buffers that have room for more tokens."""

    keys: Tensor
    values: Tensor

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the states of new tokens. Returns those of all tokens."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = _appended(self.keys, key_states), _appended(self.values, value_states)
        return self.keys, self.values


def _appended(held: Tensor, new: Tensor) -> Tensor:
    """`held` is written past its end, if it is a view of a buffer that has room; else both are copied to such a one."""
    tokens = held.shape[-2] if held.numel() else 0
    total = tokens + new.shape[-2]
    buffer = held._base
    if buffer is None or buffer.shape[:-2] != new.shape[:-2] or buffer.shape[-2] < total:
        buffer = new.new_empty(*new.shape[:-2], total + CACHE_ROOM, new.shape[-1])
        if tokens:
            buffer[..., :tokens, :] = held
    buffer[..., tokens:total, :] = new
    return buffer[..., :total, :]


def attention_for(device: torch.device) -> str:
    """The attention of transformers' models on a device. On a CPU, keys are not repeated for the heads of a group."""
    if device.type != "cpu":
        return "sdpa"
    AttentionInterface.register(GROUPED, _grouped_sdpa)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)
    return GROUPED


def _grouped_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Queries [rows, heads, n, d], keys and values [rows, groups, m, d] -> [rows, n, heads, d].

    A single query's heads of a group attend as the group's queries, to keys that are read once. Without a mask, the
    rows are whole: n is m or 1.
    """
    rows, heads, queries, size = query.shape
    if queries == 1:
        query = query.reshape(rows, key.shape[1], -1, size)
    out = functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and queries > 1,
        scale=options.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.reshape(rows, heads, queries, size).transpose(1, 2).contiguous(), None
