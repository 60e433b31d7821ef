"""The policy loss in Triton: one launch forward, one backward. Derivation and arguments in `policy_loss.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig, Ratio
from megatron_tempo.kernels.advantages_triton import WARPS, advantages_of, block_of, center_and_scale, is_last_block
from megatron_tempo.kernels.collectives import max_over, sum_over
from megatron_tempo.kernels.policy_loss import LOG_RATIO_BOUND, ROW_METRICS, Experience
from megatron_tempo.kernels.rows import BLOCK, Rows

# The sums of a block, and then of a row. Two meanings: with the sequence's ratio; with the token's ratio.
_RATIO = tl.constexpr(0)  # log-ratios; ratios
_UP = tl.constexpr(1)  # positive advantages, weighted; the objective
_DOWN = tl.constexpr(2)  # negative advantages, weighted; unused
_COUNT_UP = tl.constexpr(3)  # tokens with positive advantage; those of them that are clipped from above
_COUNT_DOWN = tl.constexpr(4)  # tokens with negative advantage; those clipped from below or by dual clip
_ENTROPY = tl.constexpr(5)
_OLD_KL = tl.constexpr(6)  # k3 to the old policy
_KL = tl.constexpr(7)  # k3 to the reference
_ADVANTAGE = tl.constexpr(8)
_SQUARE = tl.constexpr(9)
_KEPT_ENTROPY = tl.constexpr(10)  # of tokens that are not masked
_KEPT_KL = tl.constexpr(11)
_SUMS = tl.constexpr(12)  # the columns before this one are sums, the others maxima
_GREATEST = tl.constexpr(12)  # log-ratio
_LEAST = tl.constexpr(13)  # negative log-ratio
_COLUMNS = tl.constexpr(16)

_METRICS = tl.constexpr(len(ROW_METRICS))
_BOUND = tl.constexpr(LOG_RATIO_BOUND)
_LOWEST = tl.constexpr(-1e30)  # less than any log-ratio
_PARTS = 64  # blocks of a row that are merged at a time


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    given: Experience,
    rows: Rows,
    baseline: Baseline,
    config: ActorUpdateConfig,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """`policy_loss.policy_loss`, on float32 tensors."""
    loss, metrics = _PolicyLoss.apply(logprobs, entropy, given, rows, baseline, config, group)
    return loss, metrics


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        entropy: Tensor,
        given: Experience,
        rows: Rows,
        baseline: Baseline,
        config: ActorUpdateConfig,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = logprobs.contiguous(), entropy.contiguous()
        n, blocks = len(rows), len(rows.block_rows)
        loss, metrics = logprobs.new_empty(n), logprobs.new_empty(n, len(ROW_METRICS))
        lengths = sum_over(rows.lengths, group)
        settings = _settings(given, baseline, config)
        if n:
            sums = logprobs.new_empty(n, _COLUMNS.value)
            partials = logprobs.new_empty(blocks, _COLUMNS.value)
            _forward[(blocks,)](
                logprobs, entropy, *_pointers(given), _ranks(given), *_tables(rows), lengths,
                partials, sums, loss, metrics, *_numbers(config),
                **settings, WHOLE=group is None, BLOCK=BLOCK, PARTS=_PARTS, num_warps=WARPS,
            )  # fmt: skip
            if group is not None:
                sums = _over_ranks(sums, group)
                _finish[(n,)](
                    sums, lengths, loss, metrics, *_numbers(config),
                    SEQUENCE=settings["SEQUENCE"], DUAL=settings["DUAL"], WEIGHT=settings["WEIGHT"], num_warps=1,
                )  # fmt: skip
        ctx.save_for_backward(logprobs, metrics, lengths)
        ctx.given, ctx.rows, ctx.config, ctx.settings = given, rows, config, settings
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)  # the metrics have no gradient
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, metrics, lengths = ctx.saved_tensors
        grad_logprobs = torch.empty_like(logprobs)
        grad_entropy = torch.empty_like(logprobs) if ctx.config.entropy_coef else None
        if len(ctx.rows):
            _backward[(len(ctx.rows.block_rows),)](
                logprobs, *_pointers(ctx.given), _ranks(ctx.given), *_tables(ctx.rows)[:3], lengths, metrics,
                grads[0].contiguous(), grad_logprobs, grad_entropy, *_numbers(ctx.config),
                **ctx.settings, ENTROPY=grad_entropy is not None, BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
        return grad_logprobs, grad_entropy, None, None, None, None, None


def _over_ranks(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Combine the rows' sums and maxima over all ranks: [n, _COLUMNS]."""
    added, greatest = sums[:, : _SUMS.value].contiguous(), sums[:, _SUMS.value :].contiguous()
    dist.all_reduce(added, group=group)
    return torch.cat([added, max_over(greatest, group)], dim=1)


def _pointers(given: Experience) -> tuple[Tensor | None, ...]:
    return (
        given.old_logprobs,
        given.values,
        given.rewards,
        given.weights,
        given.reference_logprobs,
        given.moments,
    )


def _ranks(given: Experience) -> int:
    return 0 if given.moments is None else len(given.moments)


def _tables(rows: Rows) -> tuple[Tensor, ...]:
    return rows.starts, rows.block_rows, rows.first_blocks, rows.tickets


def _numbers(config: ActorUpdateConfig) -> tuple[float, ...]:
    high, low = 1 + config.clip_high, 1 - config.clip_low
    return high, low, config.dual_clip or 0.0, config.entropy_coef, config.kl_coef


def _settings(given: Experience, baseline: Baseline, config: ActorUpdateConfig) -> dict[str, Any]:
    return {
        "AFTER": baseline is Baseline.paper,
        "SEQUENCE": config.ratio is Ratio.sequence,
        "DUAL": config.dual_clip is not None,
        "WEIGHT": given.weights is not None,
        "REFERENCE": given.reference_logprobs is not None,
        "RANKS": triton.next_power_of_2(_ranks(given)),
    }


@triton.jit
def _bounded(x):  # type: ignore[no-untyped-def]
    """Clamp to the bound. NaN stays NaN; by default a GPU's minimum would return the other argument."""
    above = tl.maximum(x, -_BOUND, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(above, _BOUND, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _k3(x):  # type: ignore[no-untyped-def]
    """e^x - 1 - x. Near 0, where exp loses precision, by its series, whose ninth term is below fp32's rounding."""
    series = 1.0 + x / 10.0
    for i in tl.static_range(9, 2, -1):
        series = 1.0 + series * x / i
    return tl.where(tl.abs(x) < 0.5, 0.5 * x * x * series, tl.exp(x) - 1.0 - x)


@triton.jit
def _tokens(  # type: ignore[no-untyped-def]
    logprobs, old, values, rewards, weights, reference, moments, ranks, starts, block_rows, first_blocks,
    AFTER: tl.constexpr, WEIGHT: tl.constexpr, REFERENCE: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's row, indices and mask, and its tokens' log-ratio, raw and whitened advantage, weight, reference ratio.

    The reference ratio is the log-ratio to the reference. All are 0 where the mask is false.
    """
    row, at, mask = block_of(starts, block_rows, first_blocks, BLOCK)
    logprob = tl.load(logprobs + at, mask=mask, other=0.0)
    before = tl.load(old + at, mask=mask, other=0.0)
    raw = advantages_of(values, tl.load(rewards + row), at, row, mask, AFTER)
    advantage = raw
    if RANKS > 0:
        center, scale = center_and_scale(moments, ranks, RANKS)
        advantage = tl.where(mask, (raw - center) * scale, 0.0)
    weight = tl.where(mask, 1.0, 0.0)
    if WEIGHT:
        weight = tl.load(weights + at, mask=mask, other=0.0)
    to_reference = tl.zeros_like(logprob)
    if REFERENCE:
        to_reference = tl.load(reference + at, mask=mask, other=0.0) - logprob
    return row, at, mask, logprob - before, raw, advantage, weight, to_reference


@triton.jit
def _put(numbers, column, number):  # type: ignore[no-untyped-def]
    return tl.where(tl.arange(0, _COLUMNS) == column, number, numbers)


@triton.jit
def _take(numbers, column):  # type: ignore[no-untyped-def]
    return tl.sum(tl.where(tl.arange(0, _COLUMNS) == column, numbers, 0.0), 0)


@triton.jit
def _merge_blocks(partials, first, count, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums and maxima of a row from those of its `count` blocks: [_COLUMNS]."""
    columns = tl.arange(0, _COLUMNS)
    total = tl.where(columns < _SUMS, 0.0, _LOWEST)
    for start in range(0, count, PARTS):
        part = start + tl.arange(0, PARTS)
        at = partials + (first + part)[:, None] * _COLUMNS + columns[None, :]
        valid = (part < count)[:, None]
        numbers = tl.load(at, mask=valid, other=0.0, cache_modifier=".cg")
        greatest = tl.max(tl.where(valid, numbers, _LOWEST), 0)
        total = tl.where(columns < _SUMS, total + tl.sum(numbers, 0), tl.maximum(total, greatest))
    return total


@triton.jit
def _finished(  # type: ignore[no-untyped-def]
    numbers, row, lengths, loss, metrics, high, low, dual, entropy_coef, kl_coef,
    SEQUENCE: tl.constexpr, DUAL: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """Store a row's loss and its metrics, in the order of ROW_METRICS."""
    whole = tl.load(lengths + row)
    length = tl.maximum(whole, 1).to(tl.float32)
    ratio = _take(numbers, _RATIO) / length
    policy = _take(numbers, _UP)
    above = _take(numbers, _COUNT_UP)
    below = _take(numbers, _COUNT_DOWN)
    if SEQUENCE:
        ratio = tl.exp(_bounded(ratio))
        from_below = tl.maximum(ratio, low)
        bound = ratio < low
        if DUAL:
            from_below = tl.minimum(from_below, dual)
            bound = bound | (ratio > dual)
        policy = policy * tl.minimum(ratio, high) + _take(numbers, _DOWN) * from_below
        above = tl.where(ratio > high, above, 0.0)
        below = tl.where(bound, below, 0.0)
    ratio = tl.where(whole > 0, ratio, 1.0)
    entropy, kl = _take(numbers, _ENTROPY), _take(numbers, _KL)
    kept_entropy, kept_kl = entropy, kl
    if WEIGHT:
        kept_entropy, kept_kl = _take(numbers, _KEPT_ENTROPY), _take(numbers, _KEPT_KL)
    total = (-policy - entropy_coef * kept_entropy + kl_coef * kept_kl) / length
    tl.store(loss + row, total)
    to = metrics + row * _METRICS
    tl.store(to, total)
    tl.store(to + 1, entropy / length)
    tl.store(to + 2, ratio)
    tl.store(to + 3, above / length)
    tl.store(to + 4, below / length)
    tl.store(to + 5, _take(numbers, _OLD_KL) / length)
    tl.store(to + 6, kl / length)
    tl.store(to + 7, _take(numbers, _ADVANTAGE) / length)
    tl.store(to + 8, _take(numbers, _SQUARE) / length)
    tl.store(to + 9, tl.exp(tl.where(whole > 0, -_take(numbers, _LEAST), 0.0)))
    tl.store(to + 10, tl.exp(tl.where(whole > 0, _take(numbers, _GREATEST), 0.0)))


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    logprobs, entropy, old, values, rewards, weights, reference, moments, ranks,
    starts, block_rows, first_blocks, tickets, lengths, partials, sums, loss, metrics,
    high, low, dual, entropy_coef, kl_coef,
    AFTER: tl.constexpr, SEQUENCE: tl.constexpr, DUAL: tl.constexpr, WEIGHT: tl.constexpr, REFERENCE: tl.constexpr,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, at, mask, log_ratio, raw, advantage, weight, to_reference = _tokens(
        logprobs, old, values, rewards, weights, reference, moments, ranks, starts, block_rows, first_blocks,
        AFTER, WEIGHT, REFERENCE, RANKS, BLOCK,
    )  # fmt: skip
    difference = _bounded(log_ratio)
    positive, negative = advantage > 0.0, advantage < 0.0
    if SEQUENCE:
        first = log_ratio
        up = weight * tl.where(negative, 0.0, advantage)  # includes NaN, which must reach the loss
        down = weight * tl.where(negative, advantage, 0.0)
    else:
        ratio = tl.exp(difference)
        first = tl.where(mask, ratio, 0.0)
        clipped = tl.where(positive, tl.minimum(ratio, high), tl.maximum(ratio, low))
        bound = ratio < low
        if DUAL:
            clipped = tl.where(negative, tl.minimum(clipped, dual), clipped)
            bound = bound | (ratio > dual)
        up = weight * advantage * clipped
        down = tl.zeros_like(up)
        positive, negative = positive & (ratio > high), negative & bound
    numbers = tl.zeros([_COLUMNS], tl.float32)
    numbers = _put(numbers, _RATIO, tl.sum(first, 0))
    numbers = _put(numbers, _UP, tl.sum(up, 0))
    numbers = _put(numbers, _DOWN, tl.sum(down, 0))
    numbers = _put(numbers, _COUNT_UP, tl.sum(positive.to(tl.float32), 0))
    numbers = _put(numbers, _COUNT_DOWN, tl.sum(negative.to(tl.float32), 0))
    entropies, kl = tl.load(entropy + at, mask=mask, other=0.0), _k3(_bounded(to_reference))
    numbers = _put(numbers, _ENTROPY, tl.sum(entropies, 0))
    numbers = _put(numbers, _OLD_KL, tl.sum(_k3(difference), 0))
    numbers = _put(numbers, _KL, tl.sum(kl, 0))
    numbers = _put(numbers, _ADVANTAGE, tl.sum(raw, 0))
    numbers = _put(numbers, _SQUARE, tl.sum(raw * raw, 0))
    if WEIGHT:
        numbers = _put(numbers, _KEPT_ENTROPY, tl.sum(tl.where(weight == 0.0, 0.0, entropies), 0))
        numbers = _put(numbers, _KEPT_KL, tl.sum(tl.where(weight == 0.0, 0.0, kl), 0))
    numbers = _put(numbers, _GREATEST, tl.max(tl.where(mask, difference, _LOWEST), 0))
    numbers = _put(numbers, _LEAST, tl.max(tl.where(mask, -difference, _LOWEST), 0))
    columns = tl.arange(0, _COLUMNS)
    tl.store(partials + tl.program_id(0) * _COLUMNS + columns, numbers)

    first_block = tl.load(first_blocks + row)
    count = tl.load(first_blocks + row + 1) - first_block
    if is_last_block(tickets, row, count):
        total = _merge_blocks(partials, first_block, count, PARTS)
        if WHOLE:
            _finished(
                total, row, lengths, loss, metrics, high, low, dual, entropy_coef, kl_coef, SEQUENCE, DUAL, WEIGHT
            )  # fmt: skip
        else:
            tl.store(sums + row * _COLUMNS + columns, total)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    sums, lengths, loss, metrics, high, low, dual, entropy_coef, kl_coef,
    SEQUENCE: tl.constexpr, DUAL: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    numbers = tl.load(sums + row * _COLUMNS + tl.arange(0, _COLUMNS))
    _finished(numbers, row, lengths, loss, metrics, high, low, dual, entropy_coef, kl_coef, SEQUENCE, DUAL, WEIGHT)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    logprobs, old, values, rewards, weights, reference, moments, ranks, starts, block_rows, first_blocks,
    lengths, metrics, grad_loss, grad_logprobs, grad_entropy, high, low, dual, entropy_coef, kl_coef,
    AFTER: tl.constexpr, SEQUENCE: tl.constexpr, DUAL: tl.constexpr, WEIGHT: tl.constexpr, REFERENCE: tl.constexpr,
    RANKS: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, at, mask, log_ratio, _raw, advantage, weight, to_reference = _tokens(
        logprobs, old, values, rewards, weights, reference, moments, ranks, starts, block_rows, first_blocks,
        AFTER, WEIGHT, REFERENCE, RANKS, BLOCK,
    )  # fmt: skip
    share = tl.load(grad_loss + row) / tl.maximum(tl.load(lengths + row), 1).to(tl.float32)
    if SEQUENCE:
        ratio = tl.zeros_like(advantage) + tl.load(metrics + row * _METRICS + 2)
        has_gradient = mask
    else:
        ratio = tl.exp(_bounded(log_ratio))
        has_gradient = (tl.abs(log_ratio) <= _BOUND) | (log_ratio != log_ratio)
    unclipped = (advantage < 0.0) & (ratio >= low)
    if DUAL:
        unclipped = unclipped & (ratio <= dual)
    unclipped = unclipped | ((advantage > 0.0) & (ratio <= high))
    unclipped = unclipped | (advantage != advantage) | (ratio != ratio)  # NaN reaches the gradient
    gradient = tl.where(unclipped & has_gradient, -weight * advantage * ratio, 0.0)
    if REFERENCE:
        bounded = _bounded(to_reference)
        beyond = (tl.abs(to_reference) > _BOUND) | (weight == 0.0)
        gradient -= tl.where(beyond, 0.0, kl_coef * (_k3(bounded) + bounded))  # e^x - 1
    tl.store(grad_logprobs + at, share * gradient, mask=mask)
    if ENTROPY:
        tl.store(grad_entropy + at, tl.where(weight == 0.0, 0.0, -share * entropy_coef), mask=mask)
