"""Advantages of lambda-returns and of the best of k responses, against their definitions written out in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tempo.algorithm.calibration import calibration_error
from megatron_tempo.algorithm.entropy import entropy_weight
from megatron_tempo.algorithm.returns import best_of_k, lambda_values
from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import CriticTargets
from megatron_tempo.evaluation.calibration import calibration
from megatron_tempo.kernels.advantages import token_advantages
from megatron_tempo.kernels.rows import Rows


def numbers(count: int, seed: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))


# Lambda-returns


def generalised(values: list[float], reward: float, decay: float) -> list[float]:
    """A_t = sum over l of decay^l delta_t+l, term by term."""
    rest = [*values[:-1], reward]
    deltas = [after - before for before, after in itertools.pairwise(rest)]
    return [sum(decay**i * delta for i, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95, 1.0])
def test_lambda_values_give_the_generalised_advantage(decay: float) -> None:
    lengths = torch.tensor([5, 0, 1, 300, 2])
    values, rewards = numbers(int(lengths.sum()) + 5, 1), torch.tensor([0.7, 0.2, 1.0, -0.4, 0.0])
    made = lambda_values(values, rewards, lengths, decay)
    assert made.dtype is torch.float32
    found = token_advantages(made, rewards, Rows.of(lengths), Baseline.before_token)
    parts = zip(values.double().split((lengths + 1).tolist()), rewards.double().tolist(), strict=True)
    wanted = [a for part, reward in parts for a in generalised(part.tolist(), reward, decay)]
    assert found.tolist() == pytest.approx(wanted, abs=3e-7)


def test_lambda_by_hand() -> None:
    """Values .5 .6 .4 (.9) and the reward 1: deltas .1, -.2, .6; with one half, .6, -.2 + .3 = .1, .1 + .05."""
    made = lambda_values(torch.tensor([0.5, 0.6, 0.4, 0.9]), torch.tensor([1.0]), torch.tensor([3]), 0.5)
    assert made.tolist() == pytest.approx([0.85, 0.9, 0.4, 1.0])


def test_at_lambda_one_the_return_is_the_reward_and_at_zero_the_next_value() -> None:
    values, rewards, lengths = numbers(9, 2), torch.tensor([0.3]), torch.tensor([8])
    rows = Rows.of(lengths)
    plain = token_advantages(values, rewards, rows, Baseline.before_token)
    one = token_advantages(lambda_values(values, rewards, lengths, 1.0), rewards, rows, Baseline.before_token)
    assert one.tolist() == pytest.approx(plain.tolist(), abs=3e-7)
    zero = token_advantages(lambda_values(values, rewards, lengths, 0.0), rewards, rows, Baseline.before_token)
    assert zero.tolist() == pytest.approx((torch.cat([values[1:-1], rewards]) - values[:-1]).tolist(), abs=3e-7)


def test_a_value_that_is_not_a_number_reaches_the_loss() -> None:
    values = torch.tensor([0.1, float("nan"), 0.3])
    made = lambda_values(values, torch.tensor([1.0]), torch.tensor([2]), 0.9)
    assert made.isnan().any()


# The best of k


def brute(given: float, others: list[float], k: int) -> float:
    """k times the mean over all sets of k - 1 other responses of the maximum with them."""
    size = min(k, len(others) + 1) - 1
    sets = list(itertools.combinations(others, size))
    return (size + 1) * sum(max([given, *chosen]) for chosen in sets) / len(sets)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(0, 99), st.booleans())
@settings(max_examples=60, deadline=None)
def test_sets_are_counted_as_if_they_were_listed(size: int, k: int, seed: int, binary: bool) -> None:
    rewards = numbers(2 * size, seed)
    rewards = rewards.round() if binary else rewards  # ties
    group = torch.tensor([3, 7] * size)  # two prompts whose rows are mixed
    held, lengths = torch.tensor([2 * size - 1, 0]), torch.tensor([2, 1])
    values = numbers(5, seed + 1)
    values[1] = rewards[0]  # a value that is equal to a reward
    made, better = best_of_k(values, rewards, group, held, lengths, k)

    def others(row: int) -> list[float]:
        return [float(rewards[i]) for i in range(2 * size) if i != row and group[i] == group[row]]

    wanted = [brute(float(rewards[i]), others(i), k) for i in range(2 * size)]
    assert better.tolist() == pytest.approx(wanted, abs=1e-5)
    rows = [2 * size - 1] * 3 + [0] * 2
    assert made.tolist() == pytest.approx([brute(float(v), others(i), k) for v, i in zip(values, rows, strict=True)])


def test_one_response_counts_for_itself() -> None:
    values, rewards = numbers(7, 3), numbers(3, 4)
    group, held, lengths = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]), torch.tensor([1, 1, 2])
    made, better = best_of_k(values, rewards, group, held, lengths, 1)
    assert torch.equal(made, values)
    assert torch.equal(better, rewards)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("baseline", [0.0, 0.35, 0.8])
def test_the_policy_gradient_is_that_of_the_expected_maximum(k: int, baseline: float) -> None:
    """All draws of four responses from a policy over three, with their probabilities: the expectation is exact."""
    logits = torch.tensor([0.4, -0.3, 0.9], dtype=torch.float64, requires_grad=True)
    rewards, n = torch.tensor([0.2, 0.9, 0.5], dtype=torch.float64), 4
    logs = logits.log_softmax(0)

    def probability(draw: tuple[int, ...]) -> Tensor:
        return logs[list(draw)].sum().exp()

    best = sum(probability(draw) * rewards[list(draw)].max() for draw in itertools.product(range(3), repeat=k))
    (exact,) = torch.autograd.grad(torch.as_tensor(best), logits, retain_graph=True)
    surrogate = torch.zeros((), dtype=torch.float64)
    group, held, lengths = torch.zeros(n, dtype=torch.int64), torch.arange(n), torch.ones(n, dtype=torch.int64)
    estimated = 0.0
    for draw in itertools.product(range(3), repeat=n):
        values = torch.tensor([baseline, 0.0] * n, dtype=torch.float64)
        made, better = best_of_k(values, rewards[list(draw)], group, held, lengths, k)
        advantages = token_advantages(made, better, Rows.of(lengths), Baseline.before_token)
        surrogate = surrogate + probability(draw).detach() * (advantages * logs[list(draw)]).mean()
        estimated += float(probability(draw).detach() * better.mean()) / k
    (found,) = torch.autograd.grad(surrogate, logits)
    assert found.tolist() == pytest.approx(exact.tolist(), abs=1e-12)
    assert estimated == pytest.approx(float(torch.as_tensor(best).detach()), abs=1e-12), (
        "the mean of h / k estimates the maximum"
    )


def test_binary_rewards_are_those_of_pass_at_k() -> None:
    """PKPO's weights for verdicts, times n: k for a right one of n, k rho(n - 1, c, k - 1) for a wrong one."""
    rewards = torch.tensor([1.0, 0, 1, 0, 0, 0, 0, 0])
    group, none = torch.zeros(8, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    _, better = best_of_k(torch.zeros(0), rewards, group, none, none, 4)
    wrong = 1 - math.comb(7 - 2, 3) / math.comb(7, 3)
    assert better.tolist() == pytest.approx([4 if right else 4 * wrong for right in rewards.tolist()])


# Calibration error and entropy


@pytest.mark.parametrize("kind", list(CriticTargets))
def test_the_calibration_error_is_that_of_an_evaluation(kind: CriticTargets) -> None:
    values = 1.4 * numbers(200, 5) - 0.2  # some leave [0, 1]
    correct = (numbers(200, 6) < values).float()
    given = values if kind is CriticTargets.zero_one else 2 * values - 1
    wanted = calibration(values[:, None].numpy(), correct[:, None].numpy()).ece
    assert calibration_error(given, correct, kind) == pytest.approx(wanted, abs=1e-6)


def test_the_calibration_error_of_graded_verdicts_by_hand() -> None:
    """Two bins: values .1 .12 with verdicts .5 0 and a value 1 with the verdict .25: (|.22 - .5| + .75) / 3."""
    found = calibration_error(torch.tensor([0.1, 0.12, 1.0]), torch.tensor([0.5, 0.0, 0.25]), CriticTargets.zero_one)
    assert found == pytest.approx((0.28 + 0.75) / 3)
    assert math.isnan(calibration_error(torch.tensor([float("nan")]), torch.ones(1), CriticTargets.zero_one))


def test_the_entropy_bonus_falls_to_nothing_at_its_target() -> None:
    weights = [entropy_weight(entropy, 0.02, 0.5) for entropy in (0.0, 0.25, 0.4, 0.5, 3.0)]
    assert weights == pytest.approx([0.02, 0.01, 0.004, 0.0, 0.0])
    assert entropy_weight(0.1, 0.02, None) == 0.02
