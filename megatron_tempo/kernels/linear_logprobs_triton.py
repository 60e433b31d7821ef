"""Log-probability and entropy from hidden states in Triton. Derivation in `linear_logprobs.py`.

Forward, `_summed`: a program computes tiles of [rows, columns] logits in registers, one after another along its share
of the vocabulary. It accumulates each tile into M, L and W of its rows. Programs that run at the same time cover 12
tiles of rows and all shares, so that they read few rows of either matrix. With 11 shares, one wave of the 132
multiprocessors reads 12 MB of hidden states, which stay in the cache, and 11 tiles of weights at a time.

Backward, `_gradient`: given M, log2 L and H of each row, a tile's gradient depends on no other tile. The kernel writes
a block of rows and columns at a time, in the type of the hidden states, and cuBLAS multiplies it. The products of the
columns are summed in fp32 into the gradient of the hidden states. A block has all rows, up to _BLOCK_ROWS, so the
gradient of the weights is usually one product and is rounded once.

Peak memory beyond inputs and results: 16 T (shares + 1) bytes forward; 4 h min(T, _BLOCK_ROWS) + _BLOCK_BYTES backward,
and 4 V h more for the gradient of the weights if there are several blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_tempo.kernels.collectives import gather_over
from megatron_tempo.kernels.logprobs import LOG2_E, Shard
from megatron_tempo.kernels.logprobs_triton import (
    NO_PEAK,
    gradient_of,
    gradient_terms,
    merge_shards,
    online_softmax_update,
)

# Rows and columns of a tile, elements of the hidden size per step, warps, and pipeline stages. bfloat16: two warp
# groups with 64 x 256 accumulators each, and 48 KB of shared memory per stage. float32 is for checks, not for speed:
# its tiles do not use the matrix units.
_TILES = {torch.bfloat16: (128, 256, 64, 8, 4), torch.float32: (32, 64, 32, 4, 2)}
_MULTIPROCESSORS = 132  # of Hopper
_GROUP_ROWS, _MOST_SHARES = 12, 16
_BLOCK_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 29


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    temperature: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs.linear_logprobs_and_entropy`. h is a multiple of 8 in bfloat16, or of 4 in float32."""
    logprobs, entropy = _LinearLogprobsAndEntropy.apply(hidden, weight, targets, vocab, temperature, group)
    return logprobs, entropy


class _LinearLogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab: int,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        shard = Shard.of(len(weight), vocab, group)
        hidden, weight = hidden.contiguous(), weight.contiguous()
        parts = partial_sums(hidden, weight, targets, shard, temperature)
        logprobs, entropy, *normalizer = merge_shards(gather_over(parts, group).flatten(0, 1), temperature)
        ctx.save_for_backward(hidden, weight, targets, *normalizer, entropy)
        ctx.shard, ctx.temperature = shard, temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, *of_rows = ctx.saved_tensors
        of_rows += [grad.contiguous() for grad in grads]
        grad_hidden = torch.empty_like(hidden)
        blocks = range(0, len(hidden), _BLOCK_ROWS)
        # One block of rows takes one product per weight. Several blocks are accumulated in float32.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32 if len(blocks) > 1 else None)
        for start in blocks:
            at = slice(start, start + _BLOCK_ROWS)
            part = [x[at] for x in of_rows]
            grad_hidden[at] = _block(hidden[at], weight, part, grad_weight, ctx.shard, ctx.temperature)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _block(
    hidden: Tensor, weight: Tensor, of_rows: Sequence[Tensor], grad_weight: Tensor, shard: Shard, temperature: float
) -> Tensor:
    """The gradient of a block's hidden states, float32 [T, h]. Adds the gradient of the weights to `grad_weight`."""
    total = torch.zeros_like(hidden, dtype=torch.float32)
    for columns, grad_logits in _gradients(hidden, weight, of_rows, shard, temperature):
        _add_product(total, grad_logits, weight[columns])
        _add_product(grad_weight[columns], grad_logits.T, hidden)
    return total


def partial_sums(hidden: Tensor, weight: Tensor, targets: Tensor, shard: Shard, temperature: float) -> Tensor:
    """M, L, W and t of each share of the columns: [shares, 4, T]."""
    rows, columns, inner, warps, stages = _TILES[hidden.dtype]
    tiles = triton.cdiv(len(weight), columns)
    splits = _shares(triton.cdiv(max(1, len(hidden)), rows), tiles)
    parts = torch.empty(splits, 4, len(hidden), device=hidden.device)
    if len(hidden):
        _summed[(triton.cdiv(len(hidden), rows) * splits,)](
            TensorDescriptor.from_tensor(hidden, [rows, inner]), TensorDescriptor.from_tensor(weight, [columns, inner]),
            targets, parts, len(hidden), hidden.shape[1], shard.first, shard.size, LOG2_E / temperature,
            triton.cdiv(tiles, splits), SPLITS=splits, GROUP=_GROUP_ROWS, ROWS=rows, COLUMNS=columns, INNER=inner,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return parts


def _shares(row_tiles: int, tiles: int) -> int:
    """The number of shares of the column tiles that keeps most multiprocessors busy."""

    def busy(shares: int) -> float:
        rounds = triton.cdiv(row_tiles * shares, _MULTIPROCESSORS) * triton.cdiv(tiles, shares)
        return row_tiles * tiles / (rounds * _MULTIPROCESSORS)

    return max(range(1, min(tiles, _MOST_SHARES) + 1), key=busy)


def _gradients(
    hidden: Tensor, weight: Tensor, of_rows: Sequence[Tensor], shard: Shard, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """The gradient of the logits, a block of columns at a time: [T, columns]. All blocks use the same memory.

    `of_rows`: as in `logprobs.gradient`. Columns beyond the vocabulary's end are cut off, so the kernel does not need
    to know where it ends.
    """
    rows, columns, inner, warps, stages = _TILES[hidden.dtype]
    width = max(1, _BLOCK_BYTES // (len(hidden) * hidden.element_size() * columns)) * columns
    width = min(width, triton.cdiv(max(1, shard.size), columns) * columns)
    block = torch.empty(len(hidden), width, dtype=hidden.dtype, device=hidden.device)
    for start in range(0, shard.size, width):
        end = min(start + width, shard.size)
        tiles = triton.cdiv(end - start, columns)
        _gradient[(triton.cdiv(len(hidden), rows) * tiles,)](
            TensorDescriptor.from_tensor(hidden, [rows, inner]), TensorDescriptor.from_tensor(weight, [columns, inner]),
            TensorDescriptor.from_tensor(block, [rows, columns]), *of_rows, len(hidden), hidden.shape[1],
            start, tiles, shard.first, LOG2_E / temperature, 1.0 / temperature,
            GROUP=_GROUP_ROWS, ROWS=rows, COLUMNS=columns, INNER=inner, num_warps=warps, num_stages=stages - 1,
        )  # fmt: skip
        yield slice(start, end), block[:, : end - start]


def _add_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """to += left right, in the type of `to`. On CUDA this may be a wider type than the factors have."""
    if to.dtype == left.dtype:
        to.addmm_(left, right)
    else:
        torch.addmm(to, left, right, out_dtype=to.dtype, out=to)


@triton.jit
def _tile_of_program(program, row_tiles, column_tiles, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's tile of rows and tile of columns. GROUP tiles of rows cover all columns before the next GROUP."""
    group = program // (GROUP * column_tiles)
    inside = program % (GROUP * column_tiles)
    size = tl.minimum(row_tiles - group * GROUP, GROUP)
    return group * GROUP + inside % size, inside // size


@triton.jit
def _logits(  # type: ignore[no-untyped-def]
    hidden, weight, row, column, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    x = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, inner, INNER):
        x = tl.dot(hidden.load([row, k]), weight.load([column, k]).T, x, input_precision="ieee")
    return x


@triton.jit(do_not_specialize=["tiles"])
def _summed(  # type: ignore[no-untyped-def]
    hidden, weight, targets, parts, rows, inner, first, size, scale, tiles, SPLITS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row_tile, split = _tile_of_program(tl.program_id(0), tl.cdiv(rows, ROWS), SPLITS, GROUP)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    target = (tl.load(targets + row, mask=mask, other=-1) - first).to(tl.int32)
    peak = tl.full([ROWS], NO_PEAK, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    weighted = tl.zeros([ROWS], tl.float32)
    at_target = tl.full([ROWS], float("-inf"), tl.float32)
    for tile in range(tiles):
        start = (split * tiles + tile) * COLUMNS
        x = _logits(hidden, weight, row_tile * ROWS, start, inner, ROWS, COLUMNS, INNER)
        column = start + tl.arange(0, COLUMNS)
        x = tl.where((column < size)[None, :], x, float("-inf"))
        at_target = tl.maximum(at_target, tl.max(tl.where(column[None, :] == target[:, None], x, float("-inf")), 1))
        peak, total, weighted = online_softmax_update(peak, total, weighted, x, scale)
    at = parts + split.to(tl.int64) * 4 * rows + row
    tl.store(at, peak, mask=mask)
    tl.store(at + rows, total, mask=mask)
    tl.store(at + 2 * rows, weighted, mask=mask)
    tl.store(at + 3 * rows, at_target, mask=mask)


@triton.jit(do_not_specialize=["column_tiles"])
def _gradient(  # type: ignore[no-untyped-def]
    hidden, weight, gradients, targets, peaks, log_totals, entropies, grads_logprob, grads_entropy, rows, inner, start,
    column_tiles, first, scale, inverse,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = _tile_of_program(tl.program_id(0), tl.cdiv(rows, ROWS), column_tiles, GROUP)
    x = _logits(hidden, weight, row_tile * ROWS, start + column_tile * COLUMNS, inner, ROWS, COLUMNS, INNER)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    column = start + column_tile * COLUMNS + tl.arange(0, COLUMNS)
    target = (tl.load(targets + row, mask=mask, other=-1) - first).to(tl.int32)
    peak = tl.load(peaks + row, mask=mask, other=0.0)[:, None]
    log_total = tl.load(log_totals + row, mask=mask, other=0.0)[:, None]
    first_term, second, third = gradient_terms(
        tl.load(entropies + row, mask=mask, other=0.0),
        tl.load(grads_logprob + row, mask=mask, other=0.0),
        tl.load(grads_entropy + row, mask=mask, other=0.0),
        inverse,
    )
    is_target = column[None, :] == target[:, None]
    gradient = gradient_of(
        x, is_target, peak, log_total, first_term[:, None], second[:, None], third[:, None], scale
    )  # fmt: skip
    gradients.store([row_tile * ROWS, column_tile * COLUMNS], gradient.to(gradients.dtype))
