"""Off-policy correction: weights for responses of an engine whose policy is not the old policy of the update.

The tokens of a response come from pi_engine: another program, perhaps in another precision, perhaps with weights of
several updates ago, which may differ between the tokens of one response. The policy loss takes them as samples of
pi_old, the actor at the start of the update. With d_t = log pi_old(y_t) - log pi_engine(y_t), a token's ratio is

    token       r_t = exp(d_t)               Yao et al. 2025 (TIS), https://fengyao.notion.site/off-policy-rl
    sequence    r_t = exp(sum_t d_t)         that of the whole response
    geometric   r_t = exp(mean_t d_t)        as in GSPO (Zheng et al. 2025, arXiv 2507.18071): no growth with the length

and its weight, a constant of the update,

    truncate    w_t = min(max(r_t, low), high)      truncated importance sampling (Ionides 2008)
    mask        w_t = r_t if low <= r_t <= high, else 0      at token level IcePop's (Ling team 2025, arXiv 2510.18855)

A masked token has no term in the loss, and a masked response contributes zero. Both stay in the means: a response's
loss is divided by all its tokens, a mini-batch's by all its responses. So masking most of a batch makes a small step,
not a step of full size on the few tokens that are left.

Each d_t, and what is exponentiated, is clamped to +-20. All is computed in float64 from whole responses, so neither
packing nor the parallel layout matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel, OutOfBounds
from megatron_tempo.kernels.policy_loss import LOG_RATIO_BOUND
from megatron_tempo.kernels.rows import Rows

# What is summed over a response's tokens; then what is an extreme of its ratios.
_SUMS = ("log_ratio", "k3", "ratio", "ratio_square", "weight", "weight_square", "outside", "masked")
_COLUMNS = (*_SUMS, "least", "greatest")
_WINDOW = 1 << 20  # tokens that are worked on at a time, and those of the row that crosses the limit


@dataclass(frozen=True, slots=True)
class Correction:
    """Of m responses with T tokens. `by_row`: float64 [m, columns], for `metrics`."""

    weights: Tensor | None  # float32 [T]; None: all are 1
    by_row: Tensor


def correct(old: Tensor, engine: Tensor, lengths: Tensor, config: CorrectionConfig) -> Correction:
    """The weights of tokens and what `metrics` needs.

    Args:
        old, engine: [T], log-probabilities of the old policy and of the engine.
        lengths: int64 [m], tokens of each response.
        config: level and bounds.
    """
    if not len(lengths):
        return Correction(None if config.level is None else old.new_empty(0), torch.zeros(0, len(_COLUMNS)).double())
    # In windows of whole rows: the float64 numbers of all tokens at once would take ten times the room of the batch.
    _, counts = (lengths.cumsum(0) - 1).div(_WINDOW, rounding_mode="floor").unique_consecutive(return_counts=True)
    parts = lengths.split(counts.tolist())
    sizes = [int(part.sum()) for part in parts]
    done = [_of_rows(*window, config) for window in zip(old.split(sizes), engine.split(sizes), parts, strict=True)]
    weights = None if config.level is None else torch.cat([weight for weight, _ in done])
    return Correction(weights, torch.cat([by_row for _, by_row in done]))


def _of_rows(old: Tensor, engine: Tensor, lengths: Tensor, config: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """The weights of these rows' tokens, float32, and what is summed over each row."""
    rows = Rows.of(lengths)
    log_ratio = _bounded(old.double() - engine.double())
    own = log_ratio.exp()  # also without a correction: it says what one would do
    if config.level is None or config.level is CorrectionLevel.token:
        ratio = own
    else:
        total = rows.sum(log_ratio)
        of_row = total if config.level is CorrectionLevel.sequence else total / lengths.clamp(min=1)
        ratio = rows.spread(_bounded(of_row).exp())
    weight, outside = _weights(ratio, config)
    sums = (log_ratio, log_ratio.expm1() - log_ratio, own, own.square(), weight, weight.square())
    by_row = [rows.sum(x) for x in (*sums, outside.double(), (weight == 0).double())]
    return weight.float(), torch.stack([*by_row, *rows.extremes(ratio)], dim=1)


def metrics(by_row: Tensor, lengths: Tensor, level: CorrectionLevel | None) -> dict[str, float]:
    """How far the engine is from the old policy, and what the correction does. `by_row`: of all n responses.

    The effective sample size is (sum w)^2 / (n sum w^2), Kish's: the share of samples that would do as much with equal
    weights. That of the engine is over tokens with untruncated ratios; that of the correction over what has a weight.
    Responses without tokens do not count.
    """
    known = lengths > 0
    table = dict(zip(_COLUMNS, by_row[known].unbind(1), strict=True))
    counts = lengths[known].double()
    tokens, responses = float(counts.sum()), len(counts)
    if not responses:
        return {}
    total = {name: float(table[name].sum()) for name in _SUMS}
    found = {
        "engine/kl_k1": -total["log_ratio"] / tokens,
        "engine/kl_k3": total["k3"] / tokens,
        "engine/ess": _effective(total["ratio"], total["ratio_square"], tokens),
    }
    if level is None:
        return found
    if level is CorrectionLevel.token:
        effective = _effective(total["weight"], total["weight_square"], tokens)
    else:
        of_row = table["weight"] / counts
        effective = _effective(float(of_row.sum()), float(of_row.square().sum()), responses)
    return found | {
        "correction/weight_mean": total["weight"] / tokens,
        "correction/ratio_min": float(table["least"].min()),
        "correction/ratio_max": float(table["greatest"].max()),
        "correction/ess": effective,
        "correction/tokens_out_of_bounds": total["outside"] / tokens,
        "correction/responses_out_of_bounds": float((table["outside"] > 0).double().mean()),
        "correction/tokens_masked": total["masked"] / tokens,
        "correction/responses_masked": float((table["masked"] == counts).double().mean()),
    }


def by_staleness(by_row: Tensor, lengths: Tensor, staleness: Tensor) -> dict[str, float]:
    """The k3 estimate by the staleness of responses, int64 [n], where some are stale."""
    if not bool((staleness > 0).any()):
        return {}
    k3, found = by_row[:, _COLUMNS.index("k3")], {}
    for age in staleness.unique().tolist():
        rows = staleness == age
        tokens = max(int(lengths[rows].sum()), 1)
        found[f"engine/kl_k3_at_staleness_{age}"] = float(k3[rows].sum()) / tokens
    return found


def _weights(ratio: Tensor, config: CorrectionConfig) -> tuple[Tensor, Tensor]:
    """Each token's weight, and whether its ratio is out of bounds. NaN is not, so that it reaches the loss."""
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    if config.level is None:
        return torch.ones_like(ratio), outside
    weight = ratio
    if config.low is not None:
        outside = outside | (ratio < config.low)
    if config.high is not None:
        outside = outside | (ratio > config.high)
    if config.out_of_bounds is OutOfBounds.mask:
        return torch.where(outside, 0.0, weight), outside
    if config.low is not None or config.high is not None:
        weight = weight.clamp(config.low, config.high)
    return weight, outside


def _bounded(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _effective(total: float, squares: float, count: float) -> float:
    return total**2 / (count * squares) if squares else 0.0
