"""The clipped policy gradient: GSPO's sequence clip (Zheng et al. 2025; TEMPO, Eq. 12) or PPO's token clip.

With d_t = log pi(y_t) - log pi_old(y_t), a row of T tokens has the ratio s = exp(mean_t d_t), and its token form
s_t = sg[s] pi / sg[pi] has the value s and each token's own gradient. The row's loss is the mean over its tokens of

    -w_t min(s_t A_t, clip(s_t) A_t)  -  entropy_coef H_t  +  kl_coef k3(log pi_ref - log pi)

where w_t is the token's weight for the off-policy correction (`algorithm/correction.py`), a constant of the update, or
1. A token with w_t = 0 is masked: its entropy and KL terms are 0 too, and T still counts it. Dual clip (Ye et al. 2020)
bounds the ratio of tokens with A_t < 0 by c.

The kernel uses a simpler form. The clip's range contains 1, and s is one number for the whole row, so

    A_t > 0:   min(s A_t, clip(s) A_t) = A_t u,   u = min(s, 1 + high)
    A_t < 0:   min(s A_t, clip(s) A_t) = A_t v,   v = max(s, 1 - low), with dual clip min(v, c)

    row's policy term = -(P u + N v) / T,   P = sum_t w_t max(A_t, 0),   N = sum_t w_t min(A_t, 0)

The loss depends on the advantages only through P and N. One pass over the row gives them, together with sum_t d_t, from
which s follows. The gradient is

    d / d log pi(y_t) = -w_t A_t s / T where the clip does not bind: s <= 1 + high for A_t > 0, v = s for A_t < 0
                        + kl_coef (1 - pi_ref / pi) / T

So one launch forward and one backward are enough. With PPO's ratio, exp(d_t), the same holds token by token. Whitening
adds one launch before, for the moments. A sequence that is spread over ranks adds one after the all-reduce of the sums.

Logarithms of ratios are clamped to +-20, so that no loss overflows. Outside this range a token's own ratio has no
gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig, Ratio
from megatron_tempo.kernels.advantages import token_advantages, whiten
from megatron_tempo.kernels.collectives import max_over, sum_over
from megatron_tempo.kernels.rows import Rows

# A row's metrics: means over its tokens, in nats or as fractions; the importance ratio that is clipped (with
# `Ratio.token` the row's mean); the extremes of its tokens' own ratios. Advantages are those before whitening.
ROW_METRICS = (
    "loss",
    "entropy",
    "ratio",
    "clip_high",  # fraction of tokens with A > 0 that are clipped from above
    "clip_low",  # fraction of tokens with A < 0 that are clipped from below or by dual clip
    "approx_kl",  # k3 estimate of KL(old || new): non-negative, 0 before the first step
    "reference_kl",
    "advantage",
    "advantage_square",
    "token_ratio_min",
    "token_ratio_max",
)

LOG_RATIO_BOUND = 20.0


@dataclass(frozen=True, slots=True)
class Experience:
    """The constant inputs of the policy loss: n rows with T tokens in total, without gradient, all float32.

    In an update, `rewards` has all rows of the batch, and the others the rows that the rank holds (`types.Batch`).

    >>> Experience(old_logprobs=[-.1, -.2, -.3], values=[.5, .6, .9, .5, .2], rewards=[.9, .2])  # rows of 2 and 1
    """

    old_logprobs: Tensor  # [T]: old log-probabilities, the denominator of the importance ratio
    values: Tensor  # [T + n]: row i holds V(x), V(x, y_1:1) ... V(x, y_1:T_i)
    rewards: Tensor  # [n]: from the verifier, or the critic's value of the whole response
    weights: Tensor | None = None  # [T]: weights of the off-policy correction, 0 for masked tokens; None: all are 1
    reference_logprobs: Tensor | None = None  # [T]: reference log-probabilities, for the KL term
    moments: Tensor | None = None  # [ranks, 3]: moments of the advantages, to whiten them (`advantage_moments`)


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    given: Experience,
    rows: Rows,
    baseline: Baseline,
    config: ActorUpdateConfig,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, to be averaged over the rows of a mini-batch, and the row's metrics.

    Args:
        logprobs, entropy: [T], of the policy in training, after temperature.
        given: the constant inputs.
        rows: n rows with T tokens in total.
        baseline: where the value of an advantage is read.
        config: ratio, clip range, coefficients.
        group: the ranks that sequences are spread over. Each rank holds one part of every row (it may be empty) and its
            values. All ranks get the losses of whole rows, and the gradients of their own tokens.

    Returns: loss [n] with gradient, metrics [n, len(ROW_METRICS)] without. An empty row has loss 0 and ratios 1.
    """
    lengths = sum_over(rows.lengths, group)

    def mean(flat: Tensor) -> Tensor:
        return sum_over(rows.sum(flat), group) / lengths.clamp(min=1)

    raw_advantages = token_advantages(given.values, given.rewards, rows, baseline)
    advantages = raw_advantages if given.moments is None else whiten(raw_advantages, given.moments)
    raw_log_ratio = logprobs - given.old_logprobs
    log_ratio = _bounded(raw_log_ratio)
    if config.ratio is Ratio.token:
        ratio = log_ratio.exp()
    else:
        sequence = _bounded(mean(raw_log_ratio)).exp().detach()
        ratio = rows.spread(sequence) * (logprobs - logprobs.detach()).exp()
    objective, binding = _clipped(ratio, advantages, config)
    weight = torch.ones_like(ratio) if given.weights is None else given.weights
    kl = torch.zeros_like(logprobs)
    if given.reference_logprobs is not None:
        kl = _k3(_bounded(given.reference_logprobs - logprobs))
    terms = -weight * objective - config.entropy_coef * entropy + config.kl_coef * kl
    if given.weights is not None:
        terms = torch.where(weight == 0, 0.0, terms)
    loss = mean(terms)

    means = (entropy, binding & (advantages > 0), binding & (advantages < 0), _k3(log_ratio), kl)
    of_entropy, *others = [mean(x.detach().to(loss.dtype)) for x in (*means, raw_advantages, raw_advantages.square())]
    least, greatest = rows.extremes(log_ratio.detach())
    log_extremes = -max_over(-least, group), max_over(greatest, group)
    ratios = [mean(ratio.detach()), *(x.exp() for x in log_extremes)]
    of_ratio, *extremes = [torch.where(lengths > 0, x, 1.0) for x in ratios]
    return loss, torch.stack([loss.detach(), of_entropy, of_ratio, *others, *extremes], dim=1)


def _clipped(ratio: Tensor, advantages: Tensor, config: ActorUpdateConfig) -> tuple[Tensor, Tensor]:
    """The clipped objective, min(ratio A, clip(ratio) A), and where the clip or the dual clip binds. All [T]."""
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - config.clip_low, 1 + config.clip_high) * advantages)
    binding = ratio * advantages > objective
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        binding = torch.where(advantages < 0, binding | (objective < floor), binding)
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
    return objective, binding


def _bounded(log_ratio: Tensor) -> Tensor:
    """Clamp to the bound. NaN passes with its gradient, so that the non-finite check before a step finds it."""
    return torch.where(log_ratio.isnan(), log_ratio, log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND))


def _k3(x: Tensor) -> Tensor:
    """e^x - 1 - x, the k3 estimate of a KL divergence (Schulman 2020). Near 1e-4, exp(x) - 1 is only rounding noise."""
    return x.expm1() - x
