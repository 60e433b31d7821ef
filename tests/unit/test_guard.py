"""What TTRL-Guard makes of the votes on a question so far, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_tempo.algorithm.guard import Guarded, flip_rate, guarded, question_weights
from megatron_tempo.config.method_settings import GuardSettings

T, F = True, False


def test_the_flip_rate_is_of_the_last_visits() -> None:
    flips = (T, T, F, F, T, F, F)
    assert flip_rate(flips, 5) == 1 / 5
    assert flip_rate(flips, 3) == 1 / 3
    assert flip_rate(flips, 9) == 3 / 7, "those that there were"
    assert flip_rate((), 5) == 0.0


# shares, flips, weight, beta, risky
CASES = [
    ((), (), 1.0, 0.0, False),
    ((0.5,), (), 1.0, 0.0, False),
    # FR = 1: 1 - 0.5. beta = 0.3 min(1 / 0.3, 1).
    ((0.5, 0.4), (T,), 0.5, 0.3, False),
    # As before, and the majority has more than 0.6: times 1 - 0.3.
    ((0.5, 0.7), (T,), 0.35, 0.3, False),
    # FR = 1/4 is below 0.3, so there was no contest: 1 - 0.5 / 4, times 1 - 0.3 / 2 as the mean share is 0.8 > 0.6.
    ((0.8,) * 5, (F, F, F, T), 0.875 * 0.85, 0.0, False),
    ((0.8,) * 4, (F, F, F), 1.0, 0.0, False),  # four visits are too few to say that there is none
    ((0.6,) * 5, (F, F, F, F), 1.0, 0.0, False),  # 0.6 is not above 0.6
    # FR was 1, 1/2, 1/3 and is 1/4, for one visit: beta = 0.3 (1/4) / 0.3. The mean share is 0.7 > 0.5.
    ((0.5, 0.6, 0.8, 0.8, 0.8), (T, F, F, F), 0.875, 0.25, True),
    ((0.5,) * 5, (T, F, F, F), 0.875, 0.25, False),  # 0.5 is not above 0.5
    # FR is 1/5 at the sixth visit and 0 at the seventh, the third without a high one.
    ((0.9,) * 6, (T, F, F, F, F), 0.9, 0.2, True),
    ((0.9,) * 7, (T, F, F, F, F, F), 1.0, 0.0, True),
]


@pytest.mark.parametrize(("shares", "flips", "weight", "beta", "risky"), CASES)
def test_a_question_by_hand(
    shares: tuple[float, ...], flips: tuple[bool, ...], weight: float, beta: float, risky: bool
) -> None:
    found = guarded(shares, flips, GuardSettings())
    assert (found.weight, found.minority) == pytest.approx((weight, beta))
    assert found.is_risky is risky


def test_the_least_weight() -> None:
    assert guarded((0.5, 0.9), (T,), GuardSettings(flip_penalty=1.0)).weight == 0.1


RISKY = ((0.9,) * 7, (T, F, F, F, F, F))


def test_at_most_a_quarter_of_the_questions_are_left_out() -> None:
    group, lost = torch.arange(8).repeat_interleave(2), torch.zeros(16)
    settings = GuardSettings(skip_probability=1.0)
    weight, beta = question_weights([RISKY] * 8, group, lost, settings, 0)
    assert weight.tolist() == [0.0, 0.0, *[1.0] * 6]
    assert beta.tolist() == [0.0] * 8
    few, _ = question_weights([RISKY] * 3, torch.arange(3), torch.zeros(3), settings, 0)
    assert few.tolist() == [0.0, 1.0, 1.0], "one at least"
    assert question_weights([RISKY] * 8, group, lost, GuardSettings(skip_probability=0.0), 0)[0].tolist() == [1.0] * 8


def test_risky_questions_are_left_out_by_chance_and_the_same_again() -> None:
    group, lost, settings = torch.arange(400), torch.zeros(400), GuardSettings(skipped_share=1.0)
    weight, _ = question_weights([RISKY] * 400, group, lost, settings, 5)
    left_out = int((weight == 0).sum())
    assert 240 < left_out < 320  # 280 in the mean, with a standard deviation of 9
    assert torch.equal(weight, question_weights([RISKY] * 400, group, lost, settings, 5)[0])
    assert not torch.equal(weight, question_weights([RISKY] * 400, group, lost, settings, 6)[0])


def test_a_minority_has_weight_only_where_there_is_one() -> None:
    """Group 1 is not there: all its responses are masked. Of the others one has a minority."""
    contested = ((0.5, 0.4), (T,))
    group, lost = torch.tensor([0, 0, 2, 2]), torch.tensor([0.0, 0, 0, 1])
    weight, beta = question_weights([contested] * 3, group, lost, GuardSettings(), 0)
    assert weight.tolist() == [0.5] * 3
    assert beta.tolist() == pytest.approx([0.0, 0.0, 0.3])
    nothing = question_weights(None, group, lost, GuardSettings(), 0)
    assert [of.tolist() for of in nothing] == [[1.0] * 3, [0.0] * 3]
    assert guarded((), (), GuardSettings()) == Guarded()
