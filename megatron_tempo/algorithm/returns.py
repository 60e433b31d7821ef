"""Values and rewards that make A_t = R - V_t another advantage: of a lambda-return, or of the best of k responses.

Both functions take and return values and rewards in the form of the policy loss (`kernels/policy_loss.py`), so losses
and kernels stay as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lambda_values(values: Tensor, rewards: Tensor, lengths: Tensor, gae_lambda: float) -> Tensor:
    """Values U with R - U_t = A_t, the generalised advantage (Schulman et al. 2016, Eq. 16, gamma = 1).

        delta_t = V_t+1 - V_t for t < T - 1,   delta_T-1 = R - V_T-1
        A_t     = sum over l of lambda^l delta_t+l = delta_t + lambda A_t+1

    V_t is the value before token t, from 0. The reward is all that is paid, at the end, so with lambda = 1 the sum is
    R - V_t. With lambda = 0 a token's advantage is the change of the value that it makes. A smaller lambda has less
    variance, and is biased by as much as the values are wrong.

    Args:
        values: [T + n]. Row i holds V_0 ... V_T_i.
        rewards: [n], the R of each row.
        lengths: int64 [n], the T_i.
        gae_lambda: from 0 to 1.

    Returns: [T + n]; a row's last entry is its R.
    """
    from scipy.signal import lfilter  # takes half a second to import, so only when needed

    rows = []
    for row, reward in zip(values.double().split((lengths + 1).tolist()), rewards.double(), strict=True):
        steps = torch.cat([row[:-1], reward[None]]).diff()
        advantages = lfilter([1.0], [1.0, -gae_lambda], steps.flip(0).numpy()) if len(steps) else steps
        rows.append(torch.cat([reward - torch.as_tensor(advantages).flip(0), reward[None]]))
    return torch.cat(rows).to(values.dtype) if rows else values


def best_of_k(
    values: Tensor, rewards: Tensor, group: Tensor, held: Tensor, lengths: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Values and rewards with which the policy gradient is that of E[max of k responses' rewards], without bias.

    PKPO (arXiv 2505.15201), whose rewards may be any numbers ("maxg@k"). With n responses to a prompt, response i is
    weighted by the sum, over all sets I of k of them that contain it, of max over I of g, divided by C(n, k). A set's
    maximum without i does not depend on i, and is the baseline ("leave one out minus one"). So for each response

        h_i(g) = k * mean over sets S of k - 1 other responses of max(g, max over S of their rewards)

    up to that constant, and PKPO's advantage is h_i(R_i) less its baseline. h_i(V) with a value V of a prefix depends
    on the prefix and on the other responses, and not on the token. So it is a baseline too, and token t has

        A_t = h_i(R_i) - h_i(V(x, y_<t))

    The sets are counted, not listed: with the others' rewards in ascending order, C(j - 1, k - 2) sets have the j-th
    as the maximum. A prompt with fewer than k responses takes all of them. k = 1: h_i(g) = g.

    Args:
        values: [T + m], of the held rows. Row i holds V(x), V(x, y_1:1) ... V(x, y_1:T_i).
        rewards: [n], of all rows: verdicts, or values of whole responses.
        group: int64 [n], the prompt of each row.
        held: int64 [m], which of the rows have values here.
        lengths: int64 [m], the T_i.

    Returns: values [T + m], rewards [n]. The mean of h_i(R_i) / k over a prompt's rows estimates E[max] without bias.
    """
    _, prompt, sizes = group.unique(return_inverse=True, return_counts=True)
    exact, better = rewards.double(), torch.empty_like(rewards)
    others: list[Tensor] = [exact] * len(rewards)
    for rows in prompt.argsort(stable=True).split(sizes.tolist()):
        for place, row in enumerate(rows.tolist()):
            others[row] = torch.cat([exact[rows[:place]], exact[rows[place + 1 :]]]).sort().values
            better[row] = _best_with(exact[row : row + 1], others[row], k)[0]
    parts = values.double().split((lengths + 1).tolist())
    best = [_best_with(part, others[row], k) for part, row in zip(parts, held.tolist(), strict=True)]
    return torch.cat(best).to(values.dtype) if best else values, better


def _best_with(given: Tensor, others: Tensor, k: int) -> Tensor:
    """h_i of `best_of_k` at each of the numbers `given`: float64 [m], and the others' rewards, ascending, -> [m]."""
    size = min(k, len(others) + 1) - 1
    if size == 0:
        return given
    sets = math.comb(len(others), size)
    share = torch.tensor([math.comb(j, size - 1) / sets for j in range(len(others))], dtype=torch.float64)
    start = torch.zeros(1, dtype=torch.float64)
    below = torch.cat([start, share.cumsum(0)])
    above = torch.cat([start, (share * others).flip(0).cumsum(0)]).flip(0)
    at = torch.searchsorted(others, given)
    return (size + 1) * (given * below[at] + above[at])
