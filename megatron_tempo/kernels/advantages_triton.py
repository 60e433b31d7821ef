"""Advantages in Triton: their moments, and helpers that the policy loss shares. Derivation in `advantages.py`."""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.kernels.advantages import EPS
from megatron_tempo.kernels.collectives import gather_over
from megatron_tempo.kernels.rows import BLOCK, Rows

_EPS = tl.constexpr(EPS)
WARPS = 4


def advantage_moments(
    values: Tensor, rewards: Tensor, rows: Rows, baseline: Baseline, group: dist.ProcessGroup | None = None
) -> Tensor:
    """`advantages.advantage_moments` in one launch."""
    blocks = len(rows.block_rows)
    moments = torch.empty(3, device=values.device) if blocks else torch.zeros(3, device=values.device)
    if blocks:
        partials = torch.empty(3, blocks, device=values.device)
        _moments[(blocks,)](
            values, rewards, rows.starts, rows.block_rows, rows.first_blocks, rows.tickets, len(rows), partials,
            moments, AFTER=baseline is Baseline.paper, BLOCK=BLOCK, PARTS=1024, num_warps=WARPS,
        )  # fmt: skip
    return gather_over(moments, group)


@triton.jit
def block_of(starts, block_rows, first_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """This program's row, the indices of its block's entries, and a mask of those that belong to the row."""
    block = tl.program_id(0)
    row = tl.load(block_rows + block)
    at = tl.load(starts + row) + (block - tl.load(first_blocks + row)) * BLOCK + tl.arange(0, BLOCK)
    return row, at, at < tl.load(starts + row + 1)


@triton.jit
def is_last_block(tickets, of, count):  # type: ignore[no-untyped-def]
    """Whether this program is the last of `count` to call this. The last one sees everything that the others stored.

    The barrier orders all of the program's stores before its ticket. Acquire and release order them before the reads of
    the last program, which resets the counter to zero.
    """
    tl.debug_barrier()
    last = tl.atomic_add(tickets + of, 1, sem="acq_rel", scope="gpu") == count - 1
    if last:
        tl.store(tickets + of, 0)
    return last


@triton.jit
def advantages_of(values, reward, at, row, mask, AFTER: tl.constexpr):  # type: ignore[no-untyped-def]
    """A_t of the tokens `at` of a row; 0 where `mask` is false."""
    value = tl.load(values + at + row + (1 if AFTER else 0), mask=mask, other=0.0)
    return tl.where(mask, reward - value, 0.0)


@triton.jit
def center_and_scale(moments, count, RANKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean, and 1 / (std + eps), from the `count` ranks' moments [count, 3]."""
    rank = tl.arange(0, RANKS)
    n = tl.load(moments + 3 * rank, mask=rank < count, other=0.0)
    mean = tl.load(moments + 3 * rank + 1, mask=rank < count, other=0.0)
    m2 = tl.load(moments + 3 * rank + 2, mask=rank < count, other=0.0)
    total = tl.sum(n, 0)
    center = tl.sum(n * mean, 0) / tl.maximum(total, 1.0)
    m2 = tl.sum(m2, 0) + tl.sum(n * (mean - center) * (mean - center), 0)
    return center, 1.0 / (tl.sqrt(m2 / tl.maximum(total - 1.0, 1.0)) + _EPS)


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    values, rewards, starts, block_rows, first_blocks, tickets, rows, partials, moments,
    AFTER: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    row, at, mask = block_of(starts, block_rows, first_blocks, BLOCK)
    advantage = advantages_of(values, tl.load(rewards + row), at, row, mask, AFTER)
    count = tl.sum(mask.to(tl.float32), 0)
    mean = tl.sum(advantage, 0) / tl.maximum(count, 1.0)
    deviation = tl.where(mask, advantage - mean, 0.0)
    tl.store(partials + block, count)
    tl.store(partials + blocks + block, mean)
    tl.store(partials + 2 * blocks + block, tl.sum(deviation * deviation, 0))
    if is_last_block(tickets, rows, blocks):
        total, center, m2 = 0.0, 0.0, 0.0
        for start in range(0, blocks, PARTS):
            part = start + tl.arange(0, PARTS)
            n = tl.load(partials + part, mask=part < blocks, other=0.0, cache_modifier=".cg")
            means = tl.load(partials + blocks + part, mask=part < blocks, other=0.0, cache_modifier=".cg")
            m2s = tl.load(partials + 2 * blocks + part, mask=part < blocks, other=0.0, cache_modifier=".cg")
            # Compute this chunk's moments, then merge them into the totals.
            size = tl.sum(n, 0)
            chunk_mean = tl.sum(n * means, 0) / tl.maximum(size, 1.0)
            square = tl.sum(m2s, 0) + tl.sum(n * (means - chunk_mean) * (means - chunk_mean), 0)
            difference = chunk_mean - center
            merged = tl.maximum(total + size, 1.0)
            m2 += square + difference * difference * total * size / merged
            center += difference * size / merged
            total += size
        tl.store(moments, total)
        tl.store(moments + 1, center)
        tl.store(moments + 2, m2)
