"""Votes, shares and advantages within a prompt's responses, by hand and against counting in plain Python."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tempo.algorithm.groups import first_of_each, group_advantages, pseudo_labels, shares, votes

LN2 = math.log(2)


def test_advantages_by_hand() -> None:
    """Rewards 1 0 0 1: mean 1/2, variance 4 (1/4) / 3, so A = +-(1/2) / sqrt(1/3). Rewards 1 0 0: 2/3 and sqrt(1/3)."""
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 1, 1])
    group = torch.tensor([4, 4, 4, 4, 7, 7, 7, 9, 9])
    half, third = 0.5 / (math.sqrt(1 / 3) + 1e-6), 1 / 3 / (math.sqrt(1 / 3) + 1e-6)
    wanted = [half, -half, -half, half, 2 * third, -third, -third, 0.0, 0.0]
    advantages = group_advantages(rewards, group, divide=True)
    assert advantages.dtype == torch.float32
    assert advantages.tolist() == pytest.approx(wanted, abs=1e-7)
    assert half == pytest.approx(0.8660239)
    centred = [0.5, -0.5, -0.5, 0.5, 2 / 3, -1 / 3, -1 / 3, 0.0, 0.0]
    assert group_advantages(rewards, group, divide=False).tolist() == pytest.approx(centred, abs=1e-7)
    shuffled = torch.tensor([8, 0, 4, 2, 6, 1, 3, 7, 5])
    again = group_advantages(rewards[shuffled], group[shuffled], divide=True)
    assert again.tolist() == pytest.approx([wanted[i] for i in shuffled.tolist()], abs=1e-7)


def test_a_lone_response_and_no_response_teach_nothing() -> None:
    assert group_advantages(torch.tensor([1.0]), torch.tensor([3]), divide=True).tolist() == [0.0]
    nothing = torch.zeros(0, dtype=torch.int64)
    assert group_advantages(torch.zeros(0), nothing, divide=True).tolist() == []
    assert votes(nothing, nothing)[0].tolist() == []
    assert shares(nothing, nothing)[0].tolist() == []


def test_votes_by_hand() -> None:
    classes = torch.tensor([0, 1, 1, -1, 2, 0, 1, -1, 1, 0, -1, -1, -1, -1, 0])
    group = torch.arange(3).repeat_interleave(5)
    won, share = votes(classes, group)
    # 1 has two of five; 0 and 1 have two each, and 0 came first; the one answer wins against four without.
    assert won.view(3, 5).tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 1]]
    assert share.tolist() == pytest.approx([0.4, 0.4, 0.2])
    won, share = votes(torch.tensor([-1, -1, 0, 0]), torch.tensor([0, 0, 1, 1]))
    assert won.tolist() == [0, 0, 1, 1], "where none has an answer, none wins"
    assert share.tolist() == [0, 1]


def test_shares_by_hand() -> None:
    classes = torch.tensor([0, 1, 1, -1, 0, 0, 0, 0, 0, 1, 2, 3, -1, -1, 0, 0])
    group = torch.arange(4).repeat_interleave(4)
    share, entropy = shares(classes, group)
    assert share.tolist() == [0.25, 0.5, 0.5, 0.25] + [1] * 4 + [0.25] * 4 + [0.25, 0.25, 0.5, 0.5]
    # 1/4 ln 4 + 1/2 ln 2 + 1/4 ln 4; 0; ln 4; two without an answer are two clusters.
    wanted = [1.5 * LN2, 0.0, 2 * LN2, 1.5 * LN2]
    assert entropy.tolist() == pytest.approx([x for x in wanted for _ in range(4)])


PAPER = {"positive": 0.375, "margin": 0.125, "negative": 0.125}


def labels_of(classes: list[int], entropy: list[float], **changes: float) -> tuple[list[bool], list[bool]]:
    right, wrong, _, _ = pseudo_labels(
        torch.tensor(classes), torch.zeros(len(classes), dtype=torch.int64), torch.tensor(entropy), **(PAPER | changes)
    )
    return right.tolist(), wrong.tolist()


@pytest.mark.parametrize(
    ("classes", "label"),
    [
        ([0] * 6 + list(range(1, 11)), 0),  # 6/16 = 0.375, the others 1/16
        ([0] * 5 + list(range(1, 12)), None),  # 5/16 < 0.375
        ([0] * 8 + [1] * 6 + [2, 3], None),  # 8/16 - 6/16 is not more than 0.125
        ([0] * 9 + [1] * 6 + [2], 0),  # 9/16 - 6/16 is
        ([1, *[0] * 6, *[-1] * 9], 0),  # those without an answer count among the 16, and are no second answer
        ([-1] * 16, None),
    ],
)
def test_clear_majorities(classes: list[int], label: int | None) -> None:
    right, _ = labels_of(classes, [0.5] * 16)
    assert right == [c == label for c in classes]


def test_rare_answers_are_wrong_where_they_are_uncertain() -> None:
    """1 and 2 have 1/16 < 0.125, 3 has 2/16. The mean entropy is 8.8 / 16 = 0.55: that of 1 is above it, of 2 below."""
    classes = [*[0] * 10, 1, 2, 3, 3, -1, -1]
    entropy = [*[0.5] * 10, 0.6, 0.4, 0.7, 0.7, 0.7, 0.7]
    right, wrong, share, excess = pseudo_labels(
        torch.tensor(classes), torch.zeros(16, dtype=torch.int64), torch.tensor(entropy), **PAPER
    )
    assert right.tolist() == [c == 0 for c in classes]
    assert wrong.tolist() == [c == 1 for c in classes]
    assert share.tolist() == [10 / 16] * 10 + [1 / 16] * 2 + [2 / 16] * 4
    wanted = [-0.05] * 10 + [0.05, -0.15] + [0.15] * 4
    assert excess.tolist() == pytest.approx(wanted, abs=1e-7)
    assert labels_of(classes, [0.3] * 16)[1] == [c in (1, 2) for c in classes], "where all are as uncertain"
    assert not any(labels_of(classes, entropy, negative=0.0)[1])


CLASSES = st.lists(st.lists(st.integers(-1, 4), min_size=1, max_size=9), min_size=1, max_size=5)


@given(CLASSES)
@settings(max_examples=80, deadline=None)
def test_against_counting(prompts: list[list[int]]) -> None:
    prompts = [renumbered(row) for row in prompts]
    classes = torch.tensor([c for row in prompts for c in row])
    group = torch.tensor([i for i, row in enumerate(prompts) for _ in row])
    won, share, own, entropy = [], [], [], []
    for row in prompts:
        answered = Counter(c for c in row if c >= 0).most_common(1)  # of equals the first met, as published
        winner, count = answered[0] if answered else (None, 0)
        won += [float(c == winner) for c in row]
        share.append(count / len(row))
        named = [(i, "none") if c < 0 else c for i, c in enumerate(row)]
        clusters = Counter(named)
        own += [clusters[c] / len(row) for c in named]
        entropy += [-sum(n / len(row) * math.log(n / len(row)) for n in clusters.values())] * len(row)
    actual = (*votes(classes, group), *shares(classes, group))
    for mine, wanted in zip(actual, (won, share, own, entropy), strict=True):
        assert mine.tolist() == pytest.approx(wanted, abs=1e-6)


def renumbered(row: list[int]) -> list[int]:
    """The classes counted from 0 in the order of first appearance."""
    numbers: dict[int, int] = {}
    return [c if c < 0 else numbers.setdefault(c, len(numbers)) for c in row]


def test_the_first_of_each() -> None:
    group = torch.tensor([5, 5, 2, 5, 2, 2, 9])
    assert first_of_each(group, 2).tolist() == [0, 1, 2, 4, 6]
    assert first_of_each(group, 9).tolist() == list(range(7))
