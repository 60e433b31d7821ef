"""The tokens that top-k, top-p and min-p leave, from logits whose vocabulary may be sharded over ranks.

A row's tokens are those with the largest logits, so one number describes them: the lowest logit that is kept. For
logits x and a temperature T, p = softmax(x / T). The three are applied one after another, as in vLLM 0.32, and each to
what the one before it leaves:

    min-p   keeps j with p_j >= min_p max_i p_i,             that is x_j >= max_i x_i + T ln min_p
    top-k   keeps the k largest x_j; with ties, all that equal the k-th
    top-p   keeps the largest x_j until their share of what is left reaches top_p; with ties, all or none

The order matters to top-p alone, whose shares are of what the others leave. A row always keeps its largest logit.

This file imports nothing of the package: the trainer, the embedded engine and SGLang's servers, which get a copy
(`rollout/sglang_truncation.py`), run the same function. vLLM has its own; tests compare all four with transformers'.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_BITS = {torch.float32: (torch.int32, 32), torch.float64: (torch.int64, 64)}


@dataclass(frozen=True, slots=True)
class Truncation:
    """Which tokens may be sampled. At least one of the three restricts them.

    >>> Truncation(top_p=0.95, top_k=20)
    """

    top_p: float = 1.0  # above 0; 1: all
    top_k: int | None = None  # None: all
    min_p: float = 0.0  # 0: all


def _alone(tensor: Tensor) -> Tensor:
    return tensor


def _itself(tensor: Tensor) -> Tensor:
    return tensor[None]


@dataclass(frozen=True, slots=True)
class Shards:
    """Reductions over the ranks that share the vocabulary: maximum, sum, and all ranks' tensors in a new dimension.

    `columns`: the most columns that a rank has.
    """

    columns: int
    largest: Callable[[Tensor], Tensor] = _alone
    total: Callable[[Tensor], Tensor] = _alone
    gathered: Callable[[Tensor], Tensor] = _itself


@torch.no_grad()
def lowest_kept(x: Tensor, temperature: float, truncation: Truncation, shards: Shards | None = None) -> Tensor:
    """The lowest logit that is kept, of each row: [T].

    `x`: [T, columns], this rank's columns without padding, float32 or float64. `temperature`: > 0. `shards`: None if
    `x` has the whole vocabulary; else collective over them. A row with a NaN gives NaN or any number.
    """
    shards = shards or Shards(x.shape[1])
    peak = shards.largest(x.amax(dim=1) if x.shape[1] else x.new_full((len(x),), -torch.inf))
    least = torch.full_like(peak, -torch.inf)
    if truncation.min_p > 0:
        least = peak + temperature * math.log(truncation.min_p)
    if truncation.top_k is None:
        return least if truncation.top_p >= 1 else _by_share(x, peak, least, temperature, truncation.top_p, shards)
    best = _largest(x, truncation.top_k, shards)
    least = torch.maximum(least, best[:, -1])
    if truncation.top_p >= 1:
        return least
    # The candidates are sorted: a running sum says where the share is reached.
    weights = ((best - peak[:, None]) / temperature).exp().masked_fill(best < least[:, None], 0.0)
    before = weights.cumsum(dim=1) - weights
    kept = (before < truncation.top_p * weights.sum(dim=1, keepdim=True)) & (weights > 0)
    return best.masked_fill(~kept, torch.inf).amin(dim=1).minimum(peak)


def _largest(x: Tensor, k: int, shards: Shards) -> Tensor:
    """The k largest logits of each row, in descending order: [T, k]; fewer if the shards have fewer in all."""
    own = x.topk(min(k, x.shape[1]), dim=1).values
    own = functional.pad(own, (0, min(k, shards.columns) - own.shape[1]), value=-torch.inf)
    every = shards.gathered(own).transpose(0, 1).flatten(1)
    return every.topk(min(k, every.shape[1]), dim=1).values


def _by_share(x: Tensor, peak: Tensor, least: Tensor, temperature: float, share: float, shards: Shards) -> Tensor:
    """The largest number whose logits at or above it have this share of the logits at or above `least`: [T].

    A binary search over the numbers themselves, in the order of their bits, so it is exact. Sorting a vocabulary costs
    a GPU several times as much, and would need the vocabulary of all ranks in one place.
    """
    weights = ((x - peak[:, None]) / temperature).exp().masked_fill(x < least[:, None], 0.0)
    wanted = share * shards.total(weights.sum(dim=1))
    bits, (whole, steps) = _ordered(x), _BITS[x.dtype]
    low = _ordered(torch.where(least.isfinite(), least, torch.finfo(x.dtype).min))
    high = _ordered(peak) + 1
    for _ in range(steps):
        middle = low // 2 + high // 2 + (low % 2 + high % 2) // 2  # their sum may not fit
        mass = shards.total(weights.masked_fill(bits < middle[:, None], 0.0).sum(dim=1))
        is_enough = mass >= wanted
        low, high = torch.where(is_enough, middle, low), torch.where(is_enough, high, middle)
    return _unordered(low.to(whole), x.dtype).minimum(peak)


def _ordered(x: Tensor) -> Tensor:
    """Whole numbers in the order of these numbers, of as many bits."""
    whole, bits = _BITS[x.dtype]
    view = x.contiguous().view(whole)
    return view ^ ((view >> (bits - 1)) & torch.iinfo(whole).max)


def _unordered(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    whole, bits = _BITS[dtype]
    return (numbers ^ ((numbers >> (bits - 1)) & torch.iinfo(whole).max)).view(dtype)
