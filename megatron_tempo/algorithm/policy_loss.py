"""The clipped policy gradient: GSPO's sequence clip (Zheng et al. 2025; TEMPO, Eq. 12) or PPO's token clip."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tempo.algorithm.jagged import row_mean
from megatron_tempo.config.schema import ActorUpdateConfig, Ratio

ROW_METRICS = ("loss", "entropy", "ratio", "clip_fraction", "approx_kl", "reference_kl")


def policy_loss(
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    reference_logprobs: Tensor | None,
    lengths: Tensor,
    config: ActorUpdateConfig,
) -> tuple[Tensor, Tensor]:
    """The loss of each row, to be averaged over the rows of a mini-batch, and the row's figures.

    With s = exp(mean_t(logp - logp_old)) and the token form s_t = sg[s] * pi / sg[pi] (its value is s, its gradient
    each token's own), a row's loss is the mean over its tokens of -min(s_t A_t, clip(s_t) A_t), less the entropy bonus,
    plus the KL term. Metrics are those of `ROW_METRICS`: means over the row's tokens in nats or as fractions; for
    `Ratio.token`, `ratio` is the row's mean ratio.

    Args:
        logprobs, entropy: [T], of the policy in training, after temperature.
        old_logprobs, advantages: [T], constants.
        reference_logprobs: [T] for the KL term (k3 estimator, Schulman 2020), or None.
        lengths: int64 [n].
        config: clip range, dual clip (Ye et al. 2020), coefficients.

    Returns: loss [n] with gradient, metrics [n, len(ROW_METRICS)] without.
    """
    difference = logprobs - old_logprobs
    ratio = _ratio(difference, logprobs, lengths, config.ratio)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    binding = ratio * advantages > objective
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        binding = torch.where(advantages < 0, binding | (objective < floor), binding)
        objective = torch.where(advantages < 0, torch.maximum(objective, floor), objective)
    kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        away = reference_logprobs - logprobs
        kl = away.expm1() - away
    token_loss = -objective - config.entropy_coef * entropy + config.kl_coef * kl
    loss = row_mean(token_loss, lengths)
    # k3 again, of the old policy from the new: non-negative, 0 at the first mini-batch.
    moved = difference.expm1() - difference  # exp(d) - 1 would be rounding noise: the steps are of the size 1e-4
    figures = torch.stack([row_mean(x.detach(), lengths) for x in (entropy, ratio, binding.float(), moved, kl)], dim=1)
    return loss, torch.cat([loss.detach()[:, None], figures], dim=1)


def _ratio(difference: Tensor, logprobs: Tensor, lengths: Tensor, kind: Ratio) -> Tensor:
    """The importance ratio of each token, [T], with its gradient."""
    if kind is Ratio.token:
        return difference.exp()
    sequence = row_mean(difference, lengths).exp().detach()
    return torch.repeat_interleave(sequence, lengths) * (logprobs - logprobs.detach()).exp()
