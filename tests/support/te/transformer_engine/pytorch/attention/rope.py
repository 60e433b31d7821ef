"""Rotary embeddings in one kernel: angles in fp32, one row for each token, as TE's kernel reads them for "sbhd"."""

from __future__ import annotations

import torch
from torch import Tensor

from transformer_engine.pytorch.record import fused as noted


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    assert fused
    assert tensor_format == "sbhd"
    assert start_positions is None
    assert cu_seqlens is None
    assert not interleaved
    assert (cp_size, cp_rank) == (1, 0)
    assert freqs.dtype == torch.float32
    assert freqs.shape == (len(t), 1, 1, t.shape[-1])
    noted.add("rotary")
    first, second = t.float().chunk(2, dim=-1)
    turned = t.float() * freqs.cos() + torch.cat((-second, first), dim=-1) * freqs.sin()
    return turned.to(t.dtype)
