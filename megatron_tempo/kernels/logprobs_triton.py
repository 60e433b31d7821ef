"""Log-probability and entropy from logits in Triton: one pass forward, one in-place pass backward. See `logprobs.py`.

A program reads one row. Each of its threads accumulates M, L and W of the columns that it reads, eight at a time. They
are merged at the end of the row, so no thread waits for another before that. A column costs a multiplication, a
maximum, an exponential and two additions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_tempo.kernels.collectives import gather_over
from megatron_tempo.kernels.logprobs import LN_2, LOG2_E, LOWEST, Shard

_LN_2 = tl.constexpr(LN_2)
_LOWEST = tl.constexpr(LOWEST)
NO_PEAK = tl.constexpr(-1e30)  # the peak before the first logit: finite, so that differences to it are not NaN
_LANES, _WIDTH = 512, 8  # columns that a program reads at a time; the width is 16 bytes of bfloat16
_WARPS = 8
_ROWS_PER_MERGE = 128  # rows of which a program merges the shards


def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, vocab: int, temperature: float, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """`logprobs.logprobs_and_entropy`. The backward pass overwrites `logits`, and runs only once."""
    logprobs, entropy = _LogprobsAndEntropy.apply(logits, targets, vocab, temperature, group)
    return logprobs, entropy


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocab: int, temperature: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        shard = Shard.of(logits.shape[1], vocab, group)
        logits = logits.contiguous()
        parts = torch.empty(4, len(logits), device=logits.device)
        if len(logits):
            _summed[(len(logits),)](
                logits, logits.stride(0), targets, parts, len(logits), shard.first, shard.size, LOG2_E / temperature,
                LANES=_LANES, WIDTH=_WIDTH, num_warps=_WARPS,
            )  # fmt: skip
        logprobs, entropy, *normalizer = merge_shards(gather_over(parts, group), temperature)
        ctx.save_for_backward(logits, targets, *normalizer, entropy)
        ctx.shard, ctx.temperature, ctx.used = shard, temperature, False
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.used:
            raise RuntimeError(
                "only one backward pass is possible: the first one overwrote the logits with their gradient. "
                "Do not use retain_graph."
            )
        ctx.used = True
        logits, *of_rows = ctx.saved_tensors
        grad_logprobs, grad_entropy = (grad.contiguous() for grad in grads)
        if len(logits):
            _gradient[(len(logits),)](
                logits, logits.stride(0), *of_rows, grad_logprobs, grad_entropy, logits.shape[1],
                ctx.shard.first, ctx.shard.size, LOG2_E / ctx.temperature, 1.0 / ctx.temperature,
                LANES=_LANES, WIDTH=_WIDTH, num_warps=_WARPS,
            )  # fmt: skip
        return logits, None, None, None, None


def merge_shards(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`logprobs.merge_shards`: [shards, 4, T] -> four tensors [T]."""
    shards, _, rows = parts.shape
    results = torch.empty(4, rows, device=parts.device)
    if rows:
        grid = (triton.cdiv(rows, _ROWS_PER_MERGE),)
        _join[grid](parts, results, shards, rows, LOG2_E / temperature, BLOCK=_ROWS_PER_MERGE, num_warps=4)
    logprobs, entropy, peak, log_total = results.unbind(0)
    return logprobs, entropy, peak, log_total


@triton.jit
def online_softmax_update(peak, total, weighted, x, scale):  # type: ignore[no-untyped-def]
    """Update M, L and W of each lane [N] with more columns [N, K]. `scale` is c."""
    above = tl.maximum(peak, tl.max(x, 1))  # finite, because the first peak is finite
    below = (peak - above) * scale
    share = tl.exp2(below)
    shifted = (x - above[:, None]) * scale
    weights = tl.exp2(shifted)
    weighted = share * (weighted + below * total) + tl.sum(weights * tl.maximum(shifted, _LOWEST), 1)
    return above, share * total + tl.sum(weights, 1), weighted


@triton.jit
def _summed(  # type: ignore[no-untyped-def]
    logits, stride, targets, parts, rows, first, size, scale, LANES: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    at_row = logits + row.to(tl.int64) * stride
    columns = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    peak = tl.full([LANES], NO_PEAK, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    full = size // (LANES * WIDTH) * (LANES * WIDTH)
    for start in range(0, full, LANES * WIDTH):
        x = tl.load(at_row + start + columns).to(tl.float32)
        peak, total, weighted = online_softmax_update(peak, total, weighted, x, scale)
    if full < size:
        x = tl.load(at_row + full + columns, mask=full + columns < size, other=float("-inf")).to(tl.float32)
        peak, total, weighted = online_softmax_update(peak, total, weighted, x, scale)
    top = tl.max(peak, 0)
    below = tl.maximum((peak - top) * scale, _LOWEST)
    share = tl.exp2(below)
    target = tl.load(targets + row) - first
    mine = (target >= 0) & (target < size)
    at_target = tl.load(at_row + target, mask=mine, other=float("-inf")).to(tl.float32)
    tl.store(parts + row, top)
    tl.store(parts + rows + row, tl.sum(share * total, 0))
    tl.store(parts + 2 * rows + row, tl.sum(share * (weighted + below * total), 0))
    tl.store(parts + 3 * rows + row, at_target)


@triton.jit
def _join(parts, results, shards, rows, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    peak = tl.full([BLOCK], NO_PEAK, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    at_target = tl.full([BLOCK], float("-inf"), tl.float32)
    for shard in range(shards):
        at = parts + shard * 4 * rows + row
        other = tl.load(at, mask=mask, other=0.0)
        of_total = tl.load(at + rows, mask=mask, other=1.0)
        of_weighted = tl.load(at + 2 * rows, mask=mask, other=0.0)
        above = tl.maximum(peak, other)
        mine, theirs = tl.maximum((peak - above) * scale, _LOWEST), tl.maximum((other - above) * scale, _LOWEST)
        my_share, their_share = tl.exp2(mine), tl.exp2(theirs)
        weighted = my_share * (weighted + mine * total) + their_share * (of_weighted + theirs * of_total)
        total = my_share * total + their_share * of_total
        peak = above
        at_target = tl.maximum(at_target, tl.load(at + 3 * rows, mask=mask, other=0.0))
    log_total = tl.log2(total)
    tl.store(results + row, ((at_target - peak) * scale - log_total) * _LN_2, mask=mask)
    tl.store(results + rows + row, (log_total - weighted / total) * _LN_2, mask=mask)
    tl.store(results + 2 * rows + row, peak, mask=mask)
    tl.store(results + 3 * rows + row, log_total, mask=mask)


@triton.jit
def gradient_terms(entropy, grad_logprob, grad_entropy, inverse):  # type: ignore[no-untyped-def]
    """`first`, `second` and `third` of a row: a logit's gradient is [j = y] first - p_j (second + third log2 p_j)."""
    first = inverse * grad_logprob
    return first, first + inverse * grad_entropy * entropy, inverse * grad_entropy * _LN_2


@triton.jit
def gradient_of(x, is_target, peak, log_total, first, second, third, scale):  # type: ignore[no-untyped-def]
    """The gradient of logits from M, log2 L and the terms of their rows. `scale` is c."""
    log_p = tl.maximum((x - peak) * scale - log_total, _LOWEST)
    return tl.where(is_target, first, 0.0) - tl.exp2(log_p) * (second + third * log_p)


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits, stride, targets, peaks, log_totals, entropies, grads_logprob, grads_entropy, width, first, size,
    scale, inverse, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    at_row = logits + row.to(tl.int64) * stride
    columns = tl.arange(0, LANES * WIDTH)
    target = (tl.load(targets + row) - first).to(tl.int32)
    peak, log_total, entropy = tl.load(peaks + row), tl.load(log_totals + row), tl.load(entropies + row)
    first_term, second, third = gradient_terms(
        entropy, tl.load(grads_logprob + row), tl.load(grads_entropy + row), inverse
    )  # fmt: skip
    full = size // (LANES * WIDTH) * (LANES * WIDTH)
    for start in range(0, full, LANES * WIDTH):
        column = start + columns
        x = tl.load(at_row + column).to(tl.float32)
        gradient = gradient_of(x, column == target, peak, log_total, first_term, second, third, scale)
        tl.store(at_row + column, gradient.to(logits.dtype.element_ty))
    for start in range(full, width, LANES * WIDTH):
        column = start + columns
        x = tl.load(at_row + column, mask=column < size, other=float("-inf")).to(tl.float32)
        gradient = gradient_of(x, column == target, peak, log_total, first_term, second, third, scale)
        tl.store(at_row + column, gradient.to(logits.dtype.element_ty), mask=column < width)
