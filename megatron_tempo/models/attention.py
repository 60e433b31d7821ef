"""Attention on packed sequences, with or without a window, with or without context parallelism."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from megatron_tempo.models.context import gather_tokens
from megatron_tempo.models.grid import Grid, from_grid, to_grid
from megatron_tempo.models.megatron_compat.versions import config_of_attention
from megatron_tempo.models.packing import Packing
from megatron_tempo.models.rotary import rotate


class RotatedAttention(SelfAttention):
    """Megatron's self-attention. It gets what all rotary embeddings of the model rotate by (`Rotary`) and uses its own.

    Megatron rotates only where Transformer Engine fuses that.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        rope: int,
        **groups: Any,
    ) -> None:
        """`rope`: the index of this layer's rotary embedding in `ModelShape.ropes`."""
        super().__init__(config_of_attention(config, submodules), submodules, layer_number, attn_mask_type, **groups)
        self.rope = rope
        self._factors: Tensor | None = None  # of the pass that runs, if this class rotates

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *, rotary_pos_emb: Tensor, **others: Any
    ) -> tuple[Tensor, Tensor | None]:
        """`rotary_pos_emb`: what `Rotary` returns."""
        own = rotary_pos_emb[self.rope]
        if self.config.apply_rope_fusion:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=own, **others)
        self._factors = own
        try:
            return super().forward(hidden_states, attention_mask, rotary_pos_emb=None, **others)
        finally:
            self._factors = None

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, 1, heads, d], keys and values [S, 1, groups, d]."""
        query, key, value = super().get_query_key_value_tensors(*args, **kwargs)
        if self._factors is None:
            return query, key, value
        return rotate(query, self._factors), rotate(key, self._factors), value


class PackedAttention(nn.Module):
    """Causal attention on packed sequences with torch's scaled_dot_product_attention. Supports grouped queries.

    On CUDA, torch takes flash attention, or its memory-efficient one for a mask. It must not take cuDNN's, which builds
    a plan for each shape of the grid: `set_cuda_numerics` of models/device.py switches it off.

    With a `window`, a token attends to itself and the `window` - 1 tokens before it. `softmax_scale_multiplier`
    multiplies the scores.
    """

    def __init__(
        self,
        config: TransformerConfig,
        softmax_scale: float | None = None,
        window: int | None = None,
        softmax_scale_multiplier: float = 1.0,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ) -> None:
        """`pg_collection`: needed under context parallelism."""
        super().__init__()
        assert config.kv_channels is not None
        self.scale = (config.kv_channels**-0.5 if softmax_scale is None else softmax_scale) * softmax_scale_multiplier
        self.window = window
        self.context_ranks = None if pg_collection is None else pg_collection.cp

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
        """Query [S, 1, heads, d], key and value [S, 1, groups, d] -> [S, 1, heads * d].

        The packing defines the sequences. Under context parallelism, all tensors have this rank's S / c tokens.
        """
        assert packed_seq_params is not None, "every micro-batch carries its packing"
        if packed_seq_params.pieces is not None:
            return self._in_pieces(query, key, value, packed_seq_params)
        assert packed_seq_params.grids is not None
        grids = packed_seq_params.grids
        qkv = query[:, 0], key[:, 0], value[:, 0]
        if len(grids) == 1:
            return self._on_grid(*qkv, grids[0], len(query))[:, None]
        sizes = [len(grid.cells) for grid in grids]
        padding = len(query) - sum(sizes)
        parts = zip(*(x.split([*sizes, padding])[: len(grids)] for x in qkv), grids, sizes, strict=True)
        outputs = [self._on_grid(*part) for part in parts]
        return functional.pad(torch.cat(outputs), (0, 0, 0, padding))[:, None]

    def _on_grid(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid, size: int) -> Tensor:
        """Query [S, heads, d], key and value [S, groups, d] -> [`size`, heads * d]: the grid's rows, and padding."""
        q, k, v = (to_grid(x, grid.tokens, grid.cells).transpose(1, 2) for x in (query, key, value))
        out = _causal(q, k, v, self.scale) if self.window is None else _windowed(q, k, v, self.scale, self.window)
        return from_grid(out.transpose(1, 2).flatten(2), grid.tokens, grid.cells, size)

    def _in_pieces(self, query: Tensor, key: Tensor, value: Tensor, packing: Packing) -> Tensor:
        """Attend from this rank's queries to the keys and values of all ranks, one sequence at a time."""
        assert packing.pieces is not None
        assert packing.order is not None
        assert self.context_ranks is not None
        own = torch.cat([key, value], dim=2)
        both = gather_tokens(own, packing.order, self.context_ranks)[:, 0]  # [S, 2 * groups, d]
        keys, values = both.transpose(0, 1)[None].chunk(2, dim=1)
        queries = query[:, 0].transpose(0, 1)[None]  # [1, heads, S / c, d]
        if self.window is not None or not _groups_queries(queries, keys, values):
            keys, values = _for_all_heads(queries, keys, values)
        outputs = [
            _last_queries(queries[:, :, p.queries], keys[:, :, p.keys], values[:, :, p.keys], self.scale, self.window)
            for p in packing.pieces
        ]
        return torch.cat(outputs, dim=2)[0].transpose(0, 1).flatten(1)[:, None]


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[sequences, heads, tokens, d], and twice [sequences, groups, tokens, d] -> as the first."""
    if not _groups_queries(query, key, value):
        key, value = _for_all_heads(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def _groups_queries(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch has a kernel for grouped queries here that does not keep the scores of all pairs of tokens.

    On CUDA its flash attention takes them, its memory-efficient one does not. On a CPU its backward pass adds up the
    gradients of a group's heads in the type of the weights, so bf16 would lose digits.
    """
    if query.device.type != "cuda":
        return not torch.is_grad_enabled()
    params = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, False, True)
    return torch.backends.cuda.can_use_flash_attention(params)


def _for_all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each group, once for each of its heads."""
    times = query.shape[1] // key.shape[1]
    if times == 1:
        return key, value
    return _Repeated.apply(key, times), _Repeated.apply(value, times)


class _Repeated(torch.autograd.Function):
    """`repeat_interleave` over the heads. Its own backward pass is torch's sum over one inner dimension, which takes a
    CPU 20 times as long as these additions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, times: int) -> Tensor:
        ctx.times = times
        return x.repeat_interleave(times, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        first, *others = grad.unflatten(1, (-1, ctx.times)).unbind(2)
        total = first.to(torch.promote_types(grad.dtype, torch.float32)) + others[0]  # bf16 would lose digits
        for other in others[1:]:
            total += other
        return total.to(grad.dtype), None


def _last_queries(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of the last n of m tokens: queries [1, heads, n, d], keys and values [1, groups, m, d] -> as queries.

    With a window, there is a group for each head, and queries are processed in blocks. A block attends to at most its
    own keys and a window before them.
    """
    n, before = query.shape[2], key.shape[2] - query.shape[2]
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for start in range(0, n, window or n):
        end = min(start + (window or n), n)
        first = 0 if window is None else max(0, before + start - window + 1)
        seen = slice(first, before + end)
        shape = end - start, before + end - first
        if window is None:
            mask: Tensor = causal_lower_right(*shape)
        else:
            # Query i is at position i + offset of the keys, and attends to the last `window` keys up to itself.
            offset = before + start - first
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(offset).triu(offset - window + 1)
        parts = query[:, :, start:end], key[:, :, seen], value[:, :, seen]
        outputs.append(functional.scaled_dot_product_attention(*parts, attn_mask=mask, scale=scale, enable_gqa=grouped))
    return torch.cat(outputs, dim=2)


def _windowed(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """As `_causal`. A token attends to the last `window` tokens up to itself.

    A block of `window` queries needs the keys of its own block and of the previous one. So the first block is a causal
    attention. Each of the others is a sequence of `window` queries with twice as many keys. Work and memory grow with
    tokens * window. torch's kernel for a mask needs keys and values for each head.
    """
    key, value = _for_all_heads(query, key, value)
    tokens = query.shape[2]
    blocks = -(-tokens // window)
    first = _causal(query[:, :, :window], key[:, :, :window], value[:, :, :window], scale)
    if blocks == 1:
        return first

    def filled(x: Tensor) -> Tensor:
        return functional.pad(x, (0, 0, 0, blocks * window - tokens))  # the causal mask hides what is after the end

    def of_blocks(x: Tensor) -> Tensor:
        """[s, heads, blocks - 1, tokens of a block, d] -> [s * (blocks - 1), heads, tokens of a block, d]."""
        return x.transpose(1, 2).flatten(0, 1)

    queries = of_blocks(filled(query)[:, :, window:].unflatten(2, (blocks - 1, window)))
    keys, values = (of_blocks(filled(x).unfold(2, 2 * window, window).transpose(3, 4)) for x in (key, value))
    band = _band(window, query.dtype, query.device)
    others = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=band, scale=scale)
    others = others.unflatten(0, (-1, blocks - 1)).transpose(1, 2).flatten(2, 3)
    return torch.cat([first, others[:, :, : tokens - window]], dim=2)


@lru_cache(maxsize=2)  # torch keeps the mask for the backward pass, so all layers share one
def _band(window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask that is added to the scores of a block: [window, 2 * window], for the previous block's and its own keys.

    Query i is at position window + i of the keys, and attends to those from i + 1 up to itself.
    """
    seen = torch.ones(window, 2 * window, dtype=torch.bool, device=device).tril(window).triu(1)
    return torch.zeros(window, 2 * window, dtype=dtype, device=device).masked_fill(~seen, float("-inf"))
