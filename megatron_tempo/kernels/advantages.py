"""What a token was worth, A_t = R - V (TEMPO, Eq. 11), and the whitening of it: the plain form.

Row i of T_i tokens has T_i + 1 values, V(x), V(x, y_1:1) ... V(x, y_1:T_i). So in the flat tensor of values the one
before token t (from 0) of row i stands at start_i + i + t, and the one after it behind that.

Whitening takes A to (A - mean) / (std + 1e-8), over all tokens of a batch on all ranks. Its moments, count, mean and
sum of squared deviations M2, are put together from parts by the rule of Chan, Golub and LeVeque (1979):

    N = sum n_i,   mean = sum n_i mean_i / N,   M2 = sum M2_i + sum n_i (mean_i - mean)^2
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.stages import Baseline
from megatron_tempo.kernels.collectives import gather_over
from megatron_tempo.kernels.rows import Rows

EPS = 1e-8


def token_advantages(values: Tensor, rewards: Tensor, rows: Rows, baseline: Baseline) -> Tensor:
    """A_t = R - V, the value read before the token or, by `paper`, after it (Eq. 11).

    Before the token the baseline does not depend on the token, so the policy gradient stays unbiased.

    Args:
        values: [T + n], row after row V(x), V(x, y_1:1) ... V(x, y_1:T_i).
        rewards: [n], verified or the critic's.
        rows: n rows of T tokens in all.
        baseline: where V is read.

    Returns: [T]
    """
    row = rows.spread(torch.arange(len(rows), device=values.device))
    before = torch.arange(rows.total, device=values.device) + row
    return rewards[row] - values[before + 1 if baseline is Baseline.paper else before]


def advantage_moments(
    values: Tensor, rewards: Tensor, rows: Rows, baseline: Baseline, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Count, mean and M2 of the advantages of each rank's tokens: [ranks, 3], for `whiten` or a policy loss.

    Args as of `token_advantages`; `group` joins the ranks that hold parts of the batch.
    """
    advantages = token_advantages(values, rewards, rows, baseline)
    mean = advantages.mean() if rows.total else advantages.new_zeros(())
    mine = torch.stack([mean.new_tensor(float(rows.total)), mean, (advantages - mean).square().sum()])
    return gather_over(mine, group)


def whiten(advantages: Tensor, moments: Tensor) -> Tensor:
    """Zero mean and unit variance over what `moments` [ranks, 3] was taken from: [T] -> [T]."""
    count, mean, m2 = moments.unbind(1)
    total = count.sum()
    center = (count * mean).sum() / total.clamp(min=1)
    variance = (m2.sum() + (count * (mean - center).square()).sum()) / (total - 1).clamp(min=1)
    return (advantages - center) / (variance.sqrt() + EPS)
