"""Rows, advantages and their moments against numbers worked out by hand and against loops in float64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.kernels.advantages import token_advantages, whiten
from megatron_tempo.kernels.rows import BLOCK, Rows
from tests.kernels.implementations import Implementation

SOME_LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**31)
SHARED = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Two responses, of 3 tokens and of 1: V(x), V(x, y_1:1), ... of each.
VALUES = torch.tensor([0.5, 0.25, 0.75, 1.0, 0.125, 0.375])
ROWS = Rows.of(torch.tensor([3, 1]))


# Rows


def test_rows_are_divided_into_blocks() -> None:
    rows = Rows.of(torch.tensor([3, 0, 2 * BLOCK, BLOCK + 1]))
    assert rows.total == 3 + 3 * BLOCK + 1
    assert rows.starts.tolist() == [0, 3, 3, 3 + 2 * BLOCK, 3 + 3 * BLOCK + 1]
    assert rows.block_rows.tolist() == [0, 1, 2, 2, 3, 3]
    assert rows.first_blocks.tolist() == [0, 1, 2, 4, 6]


def test_no_rows_are_no_blocks() -> None:
    rows = Rows.of(torch.zeros(0, dtype=torch.int64))
    assert len(rows) == rows.total == len(rows.block_rows) == 0


@given(SOME_LENGTHS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_sums_means_and_extremes_are_those_of_a_loop(lengths: list[int], seed: int) -> None:
    flat = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows, parts = Rows.of(torch.tensor(lengths)), [part.tolist() for part in flat.split(lengths)]
    assert rows.sum(flat).tolist() == pytest.approx([math.fsum(part) for part in parts], abs=1e-12)
    means = [math.fsum(part) / len(part) if part else 0.0 for part in parts]
    assert rows.mean(flat).tolist() == pytest.approx(means, abs=1e-12)
    least, greatest = rows.extremes(flat)
    assert least.tolist() == [min(part, default=math.inf) for part in parts]
    assert greatest.tolist() == [max(part, default=-math.inf) for part in parts]


# Advantages


@pytest.mark.parametrize(
    ("baseline", "advantages"),
    [
        (Baseline.before_token, [0.5, 0.75, 0.25, -0.125]),
        (Baseline.paper, [0.75, 0.25, 0.0, -0.375]),
        (Baseline.reference, [0.5, 0.75, 0.25, -0.125]),
    ],
)
def test_advantages_by_hand(baseline: Baseline, advantages: list[float]) -> None:
    assert token_advantages(VALUES, torch.tensor([1.0, 0.0]), ROWS, baseline).tolist() == advantages


@given(SOME_LENGTHS, SEEDS, st.sampled_from(list(Baseline)))
@settings(max_examples=60, deadline=None)
def test_advantages_are_those_of_a_loop(lengths: list[int], seed: int, baseline: Baseline) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths) + len(lengths), generator=generator)
    rewards = torch.randn(len(lengths), generator=generator)
    advantages = []
    for row, reward in zip(values.split([length + 1 for length in lengths]), rewards, strict=True):
        after = 1 if baseline is Baseline.paper else 0
        advantages += [(reward - row[t + after]).item() for t in range(len(row) - 1)]  # row[t] = V(x, y_1:t)
    actual = token_advantages(values, rewards, Rows.of(torch.tensor(lengths)), baseline)
    assert actual.tolist() == pytest.approx(advantages)


# Whitening


def moments_of(implementation: Implementation, advantages: list[list[float]]) -> torch.Tensor:
    """The moments of rows with these advantages: the rewards are 0, and the values before the tokens the negatives."""
    values = [value for row in advantages for value in (*(-a for a in row), 99.0)]
    rows = implementation.rows([len(row) for row in advantages])
    rewards = implementation([0.0] * len(advantages))
    return implementation.kernels.advantage_moments(implementation(values), rewards, rows, Baseline.before_token)


def test_moments_by_hand(implementation: Implementation) -> None:
    moments = moments_of(implementation, [[1.0, 2.0], [], [3.0, 6.0]])
    implementation.close(moments, [[4.0, 3.0, 4.0 + 1.0 + 0.0 + 9.0]])


@pytest.mark.parametrize("advantages", [[], [[]], [[0.7]], [[0.7] * 5, [0.7]]])
def test_few_or_equal_advantages_are_whitened_to_zero(
    implementation: Implementation, advantages: list[list[float]]
) -> None:
    flat = [a for row in advantages for a in row]
    white = whiten(implementation(flat), moments_of(implementation, advantages))
    assert white.abs().max().item() < 0.1 if flat else white.tolist() == []


@given(lengths=SOME_LENGTHS, seed=SEEDS, shift=st.sampled_from([0.0, 3.0, -50.0]))
@SHARED
def test_moments_are_those_of_statistics(
    implementation: Implementation, lengths: list[int], seed: int, shift: float
) -> None:
    numbers = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed)) + shift
    count, mean, m2 = moments_of(implementation, [part.tolist() for part in numbers.split(lengths)])[0].tolist()
    flat = numbers.double().tolist()
    assert count == len(flat)
    if len(flat) > 1:
        assert mean == pytest.approx(statistics.fmean(flat), rel=1e-6, abs=1e-6)
        assert m2 == pytest.approx(statistics.variance(flat) * (len(flat) - 1), rel=1e-4, abs=1e-5)


def test_moments_of_more_blocks_than_are_joined_at_a_time(implementation: Implementation) -> None:
    """A thousand blocks and more, most of them of little rows."""
    lengths = [3] * 1100 + [2500]
    numbers = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0)) + 0.5
    moments = moments_of(implementation, [part.tolist() for part in numbers.split(lengths)])
    wide = numbers.double()
    expected = [[len(wide), wide.mean().item(), (wide - wide.mean()).square().sum().item()]]
    torch.testing.assert_close(moments.cpu().double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-5)


@given(seed=SEEDS, cut=st.integers(0, 12))
@SHARED
def test_whitening_does_not_depend_on_how_a_batch_is_divided(
    implementation: Implementation, seed: int, cut: int
) -> None:
    """Over ranks: the parts' moments, put together, are those of the whole."""
    numbers = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    parts = [moments_of(implementation, [part.tolist()]) for part in (numbers[:cut], numbers[cut:])]
    white = whiten(implementation(numbers), torch.cat(parts))
    wide = numbers.double()
    implementation.close(white, (wide - wide.mean()) / (wide.std() + 1e-8))
