"""Token advantages, A_t = R - V (TEMPO, Eq. 11), and their whitening, in plain PyTorch.

Row i of T_i tokens has T_i + 1 values, V(x), V(x, y_1:1) ... V(x, y_1:T_i). In the flat tensor of values, the value
before token t (from 0) of row i is at start_i + i + t. The value after that token is the next entry.

Whitening maps A to (A - mean) / (std + 1e-8), over all tokens of a batch on all ranks. It needs three moments: count,
mean and M2, the sum of squared deviations. Moments of parts are combined by the rule of Chan, Golub and LeVeque (1979):

    N = sum n_i,   mean = sum n_i mean_i / N,   M2 = sum M2_i + sum n_i (mean_i - mean)^2
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.kernels.collectives import gather_over
from megatron_tempo.kernels.rows import Rows

EPS = 1e-8


def token_advantages(values: Tensor, rewards: Tensor, rows: Rows, baseline: Baseline) -> Tensor:
    """A_t = R - V. V is read before the token or, with `Baseline.paper`, after it (Eq. 11).

    A value read before the token does not depend on the token, so the policy gradient stays unbiased.

    Args:
        values: [T + n]. Row i holds V(x), V(x, y_1:1) ... V(x, y_1:T_i).
        rewards: [n], from the verifier or the critic.
        rows: n rows with T tokens in total.
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

    Arguments as in `token_advantages`. `group`: the ranks that hold parts of the batch.
    """
    advantages = token_advantages(values, rewards, rows, baseline)
    mean = advantages.mean() if rows.total else advantages.new_zeros(())
    mine = torch.stack([mean.new_tensor(float(rows.total)), mean, (advantages - mean).square().sum()])
    return gather_over(mine, group)


def whiten(advantages: Tensor, moments: Tensor) -> Tensor:
    """Whiten with the mean and variance of `moments` [ranks, 3]: [T] -> [T]."""
    count, mean, m2 = moments.unbind(1)
    total = count.sum()
    center = (count * mean).sum() / total.clamp(min=1)
    variance = (m2.sum() + (count * (mean - center).square()).sum()) / (total - 1).clamp(min=1)
    return (advantages - center) / (variance.sqrt() + EPS)
