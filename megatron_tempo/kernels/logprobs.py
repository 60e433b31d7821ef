"""Log-probability and entropy of tokens from logits whose vocabulary is sharded over the tensor-parallel ranks.

For a row of logits x over the vocabulary, a target y and c = log2(e) / temperature, a shard of the columns is reduced
to four numbers:

    M = max_j x_j     L = sum_j 2^(c (x_j - M))     W = sum_j 2^(c (x_j - M)) c (x_j - M)     t = x_y, or -inf elsewhere

Shards are merged as in online softmax (Milakov & Gimelshein 2018). With M the maximum of all M_i, and d = c (M_i - M),

    L = sum_i 2^d L_i      W = sum_i 2^d (W_i + d L_i)      t = max_i t_i

    log p(y) = ln 2 (c (t - M) - log2 L)      H = ln 2 (log2 L - W / L)

So one pass over the logits is enough, and ranks exchange four numbers per row. The gradient reads the logits once more,
and may overwrite them. With log2 p_j = c (x_j - M) - log2 L,

    d / d x_j = (g [j = y] - p_j (g + h (log p_j + H))) / temperature,   g and h the gradients of log p(y) and H

M is stored separately from log2 L. Subtracting M from a large logit first is exact in fp32.

Columns beyond the vocabulary's end are padding: they have no probability and no gradient, whatever they contain. A
column whose probability is 0 in fp32 (a logit of -inf, for example) does not contribute to W and has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.kernels.collectives import gather_over

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
# 2^x is 0 in fp32 below this. In p log p, a lower logarithm, also -inf, is replaced by this one. Its magnitude is small
# enough that no incoming gradient makes it overflow.
LOWEST = -300.0


def logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    temperature: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """log pi(target) and the entropy of pi = softmax(logits / temperature), in nats, in fp32, with gradients.

    The Triton kernel overwrites the logits with their gradient. So on CUDA only one backward pass is possible, and the
    logits must not be read after it.

    Args:
        logits: [T, padded vocabulary / tensor], this rank's columns, float32 or bfloat16.
        targets: int64 [T], token ids in the whole vocabulary.
        vocab: size of the vocabulary; columns beyond it are padding.
        temperature: > 0.
        group: the tensor-parallel ranks, in the order of their columns.

    Returns: [T], [T], the same on every tensor rank.
    """
    logprobs, entropy = _LogprobsAndEntropy.apply(logits, targets, vocab, temperature, group)
    return logprobs, entropy


class _LogprobsAndEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, vocab: int, temperature: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        shard = Shard.of(logits.shape[1], vocab, group)
        parts = gather_over(partial_sums(logits, targets, shard, temperature), group)
        logprobs, entropy, *normalizer = merge_shards(parts, temperature)
        ctx.save_for_backward(logits, targets, *normalizer, entropy)
        ctx.shard, ctx.temperature = shard, temperature
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, *of_rows = ctx.saved_tensors
        return gradient(logits, [*of_rows, *grads], ctx.shard, ctx.temperature), None, None, None, None


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's columns of the vocabulary: the index of the first, and how many are not padding.

    >>> Shard(first=1024, size=1000)  # of 1024 columns; the last 24 are padding
    """

    first: int
    size: int

    @classmethod
    def of(cls, columns: int, vocab: int, group: dist.ProcessGroup | None) -> Shard:
        """The shard of `columns` that this rank of the tensor-parallel group holds."""
        first = columns * (0 if group is None else dist.get_rank(group))
        return cls(first, max(0, min(columns, vocab - first)))

    def columns_of(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each target is in this shard, and its column (0 if it is not)."""
        mine = (targets >= self.first) & (targets < self.first + self.size)
        return mine, torch.where(mine, targets - self.first, 0)


def partial_sums(logits: Tensor, targets: Tensor, shard: Shard, temperature: float) -> Tensor:
    """M, L, W and t of a shard: [T, columns] -> [4, T], at least fp32."""
    x = of_vocabulary(logits, shard)
    peak = x.amax(dim=1) if x.numel() else x.new_full((len(targets),), -torch.inf)
    peak = peak.clamp(min=torch.finfo(x.dtype).min)  # finite even if the row has only padding
    shifted = (x - peak[:, None]) * (LOG2_E / temperature)
    weights = shifted.exp2()
    mine, column = shard.columns_of(targets)
    at_target = torch.full_like(peak, -torch.inf)
    if shard.size:
        at_target = torch.where(mine, x.gather(1, column[:, None]).squeeze(1), at_target)
    return torch.stack([peak, weights.sum(1), (weights * shifted.clamp(min=LOWEST)).sum(1), at_target])


def merge_shards(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log p(y), H, M and log2 L from the shards' four numbers: [shards, 4, T] -> four tensors [T]."""
    peaks, sums, weighted, at_target = parts.unbind(1)
    peak = peaks.amax(dim=0)
    below = ((peaks - peak) * (LOG2_E / temperature)).clamp(min=LOWEST)
    share = below.exp2()
    total = (share * sums).sum(0)
    mean = (share * (weighted + below * sums)).sum(0) / total
    log_total = total.log2()
    logprobs = (at_target.amax(dim=0) - peak) / temperature - LN_2 * log_total
    return logprobs, LN_2 * (log_total - mean), peak, log_total


def gradient(logits: Tensor, of_rows: Sequence[Tensor], shard: Shard, temperature: float) -> Tensor:
    """The gradient of a shard's logits, in their type: [T, columns].

    `of_rows`, each [T]: the targets, M, log2 L, the entropy, and the gradients of log-probability and entropy.
    """
    targets, peak, log_total, entropy, grad_logprobs, grad_entropy = of_rows
    shifted = (of_vocabulary(logits, shard) - peak[:, None]) * (LOG2_E / temperature)
    log_p = (shifted - log_total[:, None]).clamp(min=LOWEST)
    inner = grad_logprobs[:, None] + grad_entropy[:, None] * (LN_2 * log_p + entropy[:, None])
    grad = -log_p.exp2() * inner
    mine, column = shard.columns_of(targets)
    if shard.size:
        grad.scatter_add_(1, column[:, None], torch.where(mine, grad_logprobs, 0.0)[:, None])
    whole = torch.zeros_like(logits)
    whole[:, : shard.size] = (grad / temperature).to(logits.dtype)
    return whole


def of_vocabulary(logits: Tensor, shard: Shard) -> Tensor:
    """The shard's logits without padding, in fp32 or wider: [T, shard.size]."""
    return logits[:, : shard.size].to(torch.promote_types(logits.dtype, torch.float32))
