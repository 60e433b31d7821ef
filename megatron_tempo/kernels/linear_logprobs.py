"""Log-probability and entropy of tokens from hidden states, without keeping their logits.

`logprobs.py` works on the logits x = hidden weight^T. T rows over a vocabulary of 150,000 do not fit into memory. Both
of its passes only reduce a row's logits or multiply them by a matrix, so the logits are computed piece by piece and
discarded:

    forward    M, L, W and t of each piece, then merged
    backward   compute a piece of x again; G, its gradient, from M, log2 L and H;
               grad hidden += G weight,  grad weight += G^T hidden

Only O(T) numbers are kept. Each piece is computed twice, so with a gradient the head costs 8 T V hidden operations
instead of 6. Here a piece is some rows and all of the shard's columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.kernels.collectives import gather_over
from megatron_tempo.kernels.logprobs import Shard, gradient, merge_shards, partial_sums
from megatron_tempo.kernels.truncated import lowest_logits, truncate_
from megatron_tempo.kernels.truncation import Truncation

# Number of logits in memory at a time.
PIECE = 1 << 24


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab: int,
    temperature: float,
    group: dist.ProcessGroup | None = None,
    truncation: Truncation | None = None,
) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi = softmax(hidden weight^T / temperature), in nats, in fp32, with gradients.

    Args:
        hidden: [T, h], the same on every tensor rank.
        weight: [padded vocabulary / tensor, h], this rank's rows.
        targets: int64 [T], token ids in the whole vocabulary.
        vocab: size of the vocabulary; rows of `weight` beyond it are padding.
        temperature: > 0.
        group: the tensor-parallel ranks, in the order of their rows.
        truncation: pi is over the tokens that it leaves (`truncated.lowest_logits`); None: over all.

    Returns: [T], [T], the same on every tensor rank. The gradient of `hidden` is this rank's share. The caller sums it
    over the group, as Megatron's copy to the tensor-parallel region does.
    """
    logprobs, entropy = _LinearLogprobsAndEntropy.apply(hidden, weight, targets, vocab, temperature, group, truncation)
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
        truncation: Truncation | None,
    ) -> tuple[Tensor, Tensor]:
        shard = Shard.of(len(weight), vocab, group)
        parts, least = [], []
        for at in _pieces(hidden, weight):
            logits = hidden[at] @ weight.T
            if truncation is not None:
                least.append(lowest_logits(logits, targets[at], shard, temperature, truncation, group))
                truncate_(logits, least[-1], targets[at], shard)
            parts.append(partial_sums(logits, targets[at], shard, temperature))
        logprobs, entropy, *normalizer = merge_shards(gather_over(torch.cat(parts, dim=1), group), temperature)
        ctx.save_for_backward(hidden, weight, torch.cat(least) if least else None, targets, *normalizer, entropy)
        ctx.shard, ctx.temperature = shard, temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, least, *of_rows = ctx.saved_tensors
        # In fp32 at least: many pieces are added up.
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for at in _pieces(hidden, weight):
            rows = [x[at] for x in (*of_rows, *grads)]
            logits = hidden[at] @ weight.T
            if least is not None:
                truncate_(logits, least[at], rows[0], ctx.shard)
            grad_logits = gradient(logits, rows, ctx.shard, ctx.temperature)
            torch.mm(grad_logits, weight, out=grad_hidden[at])
            if grad_weight.dtype == weight.dtype:
                grad_weight.addmm_(grad_logits.T, hidden[at])
            else:
                grad_weight += grad_logits.T @ hidden[at]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _pieces(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of some rows each. At least one slice, so that an input without rows gives outputs without rows."""
    step = max(1, PIECE // max(1, len(weight)))
    return (slice(start, start + step) for start in range(0, max(1, len(hidden)), step))
