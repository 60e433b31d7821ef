"""What TTRL-Guard (arXiv 2605.19444) makes of the votes on the questions so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tempo.config.method_settings import GuardSettings


@dataclass(frozen=True, slots=True)
class Guarded:
    """Of one question at its last visit."""

    weight: float = 1.0  # of its update (FRS)
    minority: float = 0.0  # weight of the minority's answers in it (MPS)
    is_risky: bool = False  # its update may be skipped (RCSU)


def flip_rate(flips: Sequence[bool], window: int) -> float:
    """FR: the share of the last `window` visits, or of those there were, whose majority's answer is new; 0 of none."""
    recent = flips[-window:]
    return sum(recent) / len(recent) if recent else 0.0


def guarded(shares: Sequence[float], flips: Sequence[bool], settings: GuardSettings) -> Guarded:
    """With FR and MR of the last visit, and MR' the mean of MR over the last W visits (W: `flip_window`):

        w = max(least_weight, a b c),  a = 1 - flip_penalty FR
            b = 1 - confident_penalty        if FR > flip_threshold and MR > agreement_threshold, else 1
            c = 1 - confident_penalty / 2    if FR was never above flip_threshold, there were W visits, and
                                             MR' > agreement_threshold, else 1
        beta = minority_weight min(FR / flip_threshold, 1)   from FR > flip_threshold until `calm_visits` visits without
        risky    FR was above flip_threshold once, there were W visits, and MR' > risk_threshold

    Args:
        shares: MR of each visit, the share of the majority's answer, oldest first.
        flips: of each visit but the first, whether the majority's answer is another.
    """
    if not shares:
        return Guarded()
    window, rate, competed, calm = settings.flip_window, 0.0, False, settings.calm_visits
    for visit in range(len(shares)):
        rate = flip_rate(flips[:visit], window)
        flips_often = rate > settings.flip_threshold
        competed, calm = competed or flips_often, 0 if flips_often else calm + 1
    mean, settled = sum(shares[-window:]) / len(shares[-window:]), len(shares) >= window
    weight = 1 - settings.flip_penalty * rate
    if rate > settings.flip_threshold and shares[-1] > settings.agreement_threshold:
        weight *= 1 - settings.confident_penalty
    if not competed and settled and mean > settings.agreement_threshold:
        weight *= 1 - settings.confident_penalty / 2
    beta = settings.minority_weight * min(rate / settings.flip_threshold, 1.0)
    return Guarded(
        weight=max(settings.least_weight, weight),
        minority=beta if calm < settings.calm_visits else 0.0,
        is_risky=competed and settled and mean > settings.risk_threshold,
    )


def question_weights(
    visits: Sequence[tuple[Sequence[float], Sequence[bool]]] | None,
    group: Tensor,
    lost: Tensor,
    settings: GuardSettings,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """w and beta of each question, by the number of its prompt group: float32 [groups] each.

    w is 0 for the questions that are left out (R), beta for those without a minority.

    Args:
        visits: of each group `shares` and `flips`, as in `guarded`; None: nothing is known of the questions.
        group: int64 [n], of the responses that vote.
        lost: float32 [n], 1 for the responses with a minority's answer.
        seed: of the choice among risky questions.
    """
    known = [((), ())] * (int(group.max()) + 1) if visits is None else visits
    found = [guarded(*one, settings) for one in known]
    present, rivals = group.unique().tolist(), set(group[lost > 0].tolist())
    risky = [number for number in present if found[number].is_risky]
    coins = torch.rand(len(risky), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [number for number, coin in zip(risky, coins, strict=True) if coin < settings.skip_probability]
    left_out = set(chosen[: max(1, int(settings.skipped_share * len(present)))])
    weight = torch.tensor([0.0 if number in left_out else one.weight for number, one in enumerate(found)])
    return weight, torch.tensor([one.minority if number in rivals else 0.0 for number, one in enumerate(found)])
