"""What a response came to, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_tempo.algorithm.outcomes import final_values, mixed_groups, value_targets
from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import CriticTargets

# Two responses, of 3 tokens and of 1: V(x), V(x, y_1:1), ... of each.
VALUES = torch.tensor([0.5, 0.25, 0.75, 1.0, 0.125, 0.375])
LENGTHS = torch.tensor([3, 1])


@pytest.mark.parametrize(
    ("baseline", "rewards"),
    [
        (Baseline.before_token, [1.0, 0.375]),  # V(x, y_1:T)
        (Baseline.paper, [1.0, 0.375]),
        (Baseline.reference, [0.75, 0.125]),  # V(x, y_<T)
    ],
)
def test_final_values_by_hand(baseline: Baseline, rewards: list[float]) -> None:
    assert final_values(VALUES, LENGTHS, baseline).tolist() == rewards


def test_an_empty_response_is_worth_the_value_of_its_prompt() -> None:
    for baseline in Baseline:
        assert final_values(torch.tensor([0.5, 0.25, 0.75]), torch.tensor([0, 1]), baseline)[0] == 0.5


def test_value_targets() -> None:
    correct = torch.tensor([0.0, 1.0, 1.0])
    assert value_targets(correct, CriticTargets.zero_one).tolist() == [0.0, 1.0, 1.0]
    assert value_targets(correct, CriticTargets.plus_minus_one).tolist() == [-1.0, 1.0, 1.0]


def test_mixed_groups_by_hand() -> None:
    #                      mixed  right  wrong  mixed
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3])
    correct = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 0, 1])
    assert mixed_groups(correct, group).tolist() == [0, 1, 6, 7, 8]
    shuffled = torch.tensor([7, 0, 2, 4, 8, 1, 3, 5, 6])
    assert mixed_groups(correct[shuffled], group[shuffled]).tolist() == [0, 1, 4, 5, 8]
    assert mixed_groups(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).tolist() == []
    assert mixed_groups(torch.tensor([1.0]), torch.tensor([5])).tolist() == []
