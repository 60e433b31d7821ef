"""The critic's loss in Triton: one launch forward and one backward, one more with a clip. See `value_loss.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tempo.kernels.advantages_triton import WARPS, block_of, is_last_block
from megatron_tempo.kernels.rows import BLOCK, Rows
from megatron_tempo.kernels.value_loss import VALUE_METRICS

_METRICS = tl.constexpr(len(VALUE_METRICS))
_PARTS = 64  # blocks of a row that are merged at a time


def value_loss(
    values: Tensor, targets: Tensor, rows: Rows, *, clip: float | None = None, old_values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`value_loss.value_loss`, on float32 tensors."""
    loss, metrics = _ValueLoss.apply(values, targets, rows, clip, old_values)
    return loss, metrics


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, targets: Tensor, rows: Rows, clip: float | None, old_values: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        values, targets = values.contiguous(), targets.contiguous()
        n, blocks = len(rows), len(rows.block_rows)
        loss, metrics = values.new_empty(n), values.new_empty(n, len(VALUE_METRICS))
        shifts, slopes = values.new_empty(2, n).unbind(0)  # e and S of each row: used only with a clip
        tables = rows.starts, rows.block_rows, rows.first_blocks, rows.tickets
        if n:
            partials = values.new_empty(3, blocks)
            if clip is not None:
                _shift[(blocks,)](
                    values, old_values, *tables, partials, shifts, clip, BLOCK=BLOCK, PARTS=_PARTS, num_warps=WARPS
                )  # fmt: skip
            _forward[(blocks,)](
                values, targets, *tables, shifts, partials, slopes, loss, metrics,
                CLIP=clip is not None, BLOCK=BLOCK, PARTS=_PARTS, num_warps=WARPS,
            )  # fmt: skip
        ctx.save_for_backward(values, targets, shifts, slopes)
        ctx.rows, ctx.clip = rows, clip
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # the metrics have no gradient
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, targets, shifts, slopes = ctx.saved_tensors
        rows, gradient = ctx.rows, torch.empty_like(values)
        if len(rows):
            _backward[(len(rows.block_rows),)](
                values, targets, rows.starts, rows.block_rows, rows.first_blocks, shifts, slopes,
                grads[0].contiguous(), gradient, CLIP=ctx.clip is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        return gradient, None, None, None, None


@triton.jit
def _sum_of_blocks(partials, first, count, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of `count` blocks' numbers, starting at block `first`."""
    total = 0.0
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.sum(tl.load(partials + first + part, mask=part < count, other=0.0, cache_modifier=".cg"), 0)
    return total


@triton.jit
def _shift(  # type: ignore[no-untyped-def]
    values, old_values, starts, block_rows, first_blocks, tickets, partials, shifts, clip,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, at, mask = block_of(starts, block_rows, first_blocks, BLOCK)
    moved = tl.load(values + at, mask=mask, other=0.0) - tl.load(old_values + at, mask=mask, other=0.0)
    tl.store(partials + tl.program_id(0), tl.sum(moved, 0))
    first = tl.load(first_blocks + row)
    count = tl.load(first_blocks + row + 1) - first
    if is_last_block(tickets, row, count):
        length = tl.maximum(tl.load(starts + row + 1) - tl.load(starts + row), 1)
        mean = _sum_of_blocks(partials, first, count, PARTS) / length
        tl.store(shifts + row, tl.minimum(tl.maximum(mean, -clip), clip) - mean)


@triton.jit
def _errors(  # type: ignore[no-untyped-def]
    values, targets, starts, block_rows, first_blocks, shifts, CLIP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A block's row, indices and mask, and its values' v, error in the loss, and whether they are in K.

    The error in the loss is v + e - R for values in K, and v - R for the others.
    """
    row, at, mask = block_of(starts, block_rows, first_blocks, BLOCK)
    value = tl.load(values + at, mask=mask, other=0.0)
    error = tl.where(mask, value - tl.load(targets + row), 0.0)
    counted = error
    in_k = mask  # not used without a clip
    if CLIP:
        shifted = tl.where(mask, error + tl.load(shifts + row), 0.0)
        in_k = shifted * shifted > error * error
        counted = tl.where(in_k, shifted, error)
    return row, at, mask, value, counted, in_k


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    values, targets, starts, block_rows, first_blocks, tickets, shifts, partials, slopes, loss, metrics,
    CLIP: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, _at, _mask, value, counted, in_k = _errors(
        values, targets, starts, block_rows, first_blocks, shifts, CLIP, BLOCK
    )  # fmt: skip
    block, blocks = tl.program_id(0), tl.num_programs(0)
    tl.store(partials + block, tl.sum(counted * counted, 0))
    tl.store(partials + blocks + block, tl.sum(value, 0))
    if CLIP:
        tl.store(partials + 2 * blocks + block, tl.sum(tl.where(in_k, counted, 0.0), 0))
    first = tl.load(first_blocks + row)
    count = tl.load(first_blocks + row + 1) - first
    if is_last_block(tickets, row, count):
        length = tl.maximum(tl.load(starts + row + 1) - tl.load(starts + row), 1)
        mean = _sum_of_blocks(partials, first, count, PARTS) / length
        tl.store(loss + row, mean)
        tl.store(metrics + row * _METRICS, mean)
        tl.store(metrics + row * _METRICS + 1, _sum_of_blocks(partials + blocks, first, count, PARTS) / length)
        clipped = 0.0
        if CLIP:
            tl.store(slopes + row, _sum_of_blocks(partials + 2 * blocks, first, count, PARTS))
            clipped = tl.where(tl.load(shifts + row) != 0.0, 1.0, 0.0)
        tl.store(metrics + row * _METRICS + 2, clipped)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    values, targets, starts, block_rows, first_blocks, shifts, slopes, grad_loss, gradient,
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask, _value, counted, _in_k = _errors(
        values, targets, starts, block_rows, first_blocks, shifts, CLIP, BLOCK
    )  # fmt: skip
    length = tl.maximum(tl.load(starts + row + 1) - tl.load(starts + row), 1)
    if CLIP:
        counted -= tl.load(slopes + row) / length
    tl.store(gradient + at, counted * (2.0 * tl.load(grad_loss + row) / length), mask=mask)
