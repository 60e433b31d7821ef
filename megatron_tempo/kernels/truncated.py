"""Truncated sampling in the trainer: log-probabilities over the tokens that top-k, top-p and min-p leave.

The engine samples from a truncated distribution, and reports log-probabilities of that distribution. So the trainer
computes the same: for each row the lowest logit that is kept, from its own logits (`truncation.lowest_kept`). Logits
below it become -inf, which `logprobs.py` and its Triton twin read as tokens without probability or gradient. The
lowest logit counts as a constant in the gradient.

The sampled token is always kept, also where the trainer's logits differ a little from the engine's, or the policy has
changed since. The engine kept all tokens that were more probable, so the lowest kept logit is then its own.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.kernels.collectives import gather_over, max_over, sum_over
from megatron_tempo.kernels.logprobs import Shard, of_vocabulary
from megatron_tempo.kernels.truncation import Shards, Truncation, lowest_kept

# Number of logits that are looked at at a time.
PIECE = 1 << 24


@torch.no_grad()
def lowest_logits(
    logits: Tensor,
    targets: Tensor,
    shard: Shard,
    temperature: float,
    truncation: Truncation,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """The lowest logit that is kept, of each row, at most the target's: [T], at least fp32. Collective.

    Arguments as those of `logprobs.logprobs_and_entropy`.
    """
    x = of_vocabulary(logits, shard)
    mine, column = shard.columns_of(targets)
    at_target = x.new_full((len(x),), torch.inf)
    if shard.size:
        at_target = torch.where(mine, x.gather(1, column[:, None]).squeeze(1), at_target)
    group = None if group is None or dist.get_world_size(group) == 1 else group
    over = partial(max_over, group=group), partial(sum_over, group=group), partial(gather_over, group=group)
    least = lowest_kept(x, temperature, truncation, Shards(logits.shape[1], *over))
    return torch.minimum(least, -max_over(-at_target, group))


@torch.no_grad()
def truncate_(logits: Tensor, least: Tensor, targets: Tensor, shard: Shard) -> None:
    """Overwrite a shard's logits below `least` (float [T]) with -inf, except the target's."""
    x = logits[:, : shard.size]
    dropped = x < least[:, None]
    mine, column = shard.columns_of(targets)
    if shard.size:
        column = column[:, None]
        dropped.scatter_(1, column, dropped.gather(1, column) & ~mine[:, None])
    x.masked_fill_(dropped, -torch.inf)


@torch.no_grad()
def truncate_logits_(
    logits: Tensor,
    targets: Tensor,
    vocab: int,
    temperature: float,
    group: dist.ProcessGroup | None,
    truncation: Truncation,
) -> None:
    """Overwrite the logits of the tokens that are not kept with -inf, piece by piece. Collective.

    Arguments as those of `logprobs.logprobs_and_entropy`, which then gives the truncated distribution's numbers.
    """
    shard, step = Shard.of(logits.shape[1], vocab, group), max(1, PIECE // max(1, logits.shape[1]))
    for start in range(0, len(logits), step):
        piece, of_piece = logits[start : start + step], targets[start : start + step]
        truncate_(piece, lowest_logits(piece, of_piece, shard, temperature, truncation, group), of_piece, shard)
