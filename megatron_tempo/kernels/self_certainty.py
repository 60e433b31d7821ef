"""Self-certainty of a distribution over the vocabulary: KL(U || p), of the uniform distribution U from p.

    KL(U || p) = -1/V sum_j log(V p_j)                       (Intuitor, arXiv 2505.19590, "Self-certainty")

Logits are linear in the hidden state h, x_j = w_j h, so their mean needs no logits. With any token a,

    log p_j = log p_a + (x_j - x_a) / temperature
    KL(U || p) = -log V - log p_a - (w - w_a) h / temperature,   w = 1/V sum_j w_j

So the kernel for log-probabilities gives log p_a, in pieces and over the tensor ranks, and one vector w - w_a the rest.
Here a is token 0. In float32 the error is a few units in the last place of the largest logit. In bfloat16 the plain
kernel rounds logits, and the Triton kernel does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.kernels.collectives import sum_over
from megatron_tempo.kernels.logprobs import Shard

# Number of weights in memory at a time in a wider type.
PIECE = 1 << 24


def self_certainty(
    hidden: Tensor,
    weight: Tensor,
    vocab: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    logprobs: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    """KL(U || p) of p = softmax(hidden weight^T / temperature) over the whole vocabulary, in nats. Without gradient.

    Args:
        hidden: [T, h], the same on every tensor rank.
        weight: [padded vocabulary / tensor, h], this rank's rows.
        vocab: size of the vocabulary; rows of `weight` beyond it are padding.
        temperature: > 0.
        group: the tensor-parallel ranks, in the order of their rows.
        logprobs: `Kernels.linear_logprobs_and_entropy`.

    Returns: float32 [T] (float64 if `hidden` is), at least 0 up to rounding, the same on every tensor rank.
    """
    with torch.no_grad():
        first = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        of_first, _ = logprobs(hidden, weight, first, vocab, temperature, group)
        direction = sum_over(_mean_less_first(weight, vocab, group), group)
        return -math.log(vocab) - of_first - hidden.to(direction.dtype) @ direction / temperature


def _mean_less_first(weight: Tensor, vocab: int, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's part of w - w_0: [h], in float32 or wider. Summed over the tensor ranks it is w - w_0."""
    shard = Shard.of(len(weight), vocab, group)
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = torch.zeros(weight.shape[1], dtype=wide, device=weight.device)
    for part in weight[: shard.size].split(max(1, PIECE // weight.shape[1])):
        total += part.sum(0, dtype=wide)
    return total / vocab - (weight[0].to(wide) if shard.first == 0 else 0.0)
