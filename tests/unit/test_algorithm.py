"""Advantages and losses against numbers worked out by hand and against loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tempo.algorithm.advantages import final_values, token_advantages, whiten
from megatron_tempo.algorithm.jagged import row_mean, row_sum
from megatron_tempo.algorithm.policy_loss import ROW_METRICS, policy_loss
from megatron_tempo.algorithm.value_loss import mixed_groups, value_loss, value_targets
from megatron_tempo.config.schema import ActorUpdateConfig, Baseline, CriticTargets, Ratio

SOME_LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**31)

# Two responses, of 3 tokens and of 1: V(x), V(x, y_1:1), ... of each.
VALUES = torch.tensor([0.5, 0.25, 0.75, 1.0, 0.125, 0.375])
LENGTHS = torch.tensor([3, 1])


def split(flat: Tensor, lengths: Tensor) -> list[Tensor]:
    return list(flat.split(lengths.tolist()))


# Jagged rows


@given(SOME_LENGTHS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_row_sums_and_means_are_those_of_a_loop(lengths: list[int], seed: int) -> None:
    flat = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = flat.split(lengths)
    sums, means = row_sum(flat, torch.tensor(lengths)), row_mean(flat, torch.tensor(lengths))
    assert sums.tolist() == pytest.approx([math.fsum(row.tolist()) for row in rows], abs=1e-12)
    expected = [math.fsum(row.tolist()) / len(row) if len(row) else 0.0 for row in rows]
    assert means.tolist() == pytest.approx(expected, abs=1e-12)


# Advantages


@pytest.mark.parametrize(
    ("baseline", "rewards", "advantages"),
    [
        # R = V(x, y_1:T), baseline V(x, y_<t)
        (Baseline.before_token, [1.0, 0.375], [0.5, 0.75, 0.25, 0.25]),
        # R = V(x, y_1:T), baseline V(x, y_1:t): the last token of every response gets 0
        (Baseline.paper, [1.0, 0.375], [0.75, 0.25, 0.0, 0.0]),
        # R = V(x, y_<T), baseline V(x, y_<t): again the last token gets 0
        (Baseline.reference, [0.75, 0.125], [0.25, 0.5, 0.0, 0.0]),
    ],
)
def test_advantages_by_hand(baseline: Baseline, rewards: list[float], advantages: list[float]) -> None:
    found = final_values(VALUES, LENGTHS, baseline)
    assert found.tolist() == rewards
    assert token_advantages(VALUES, found, LENGTHS, baseline).tolist() == advantages


@pytest.mark.parametrize(
    ("baseline", "advantages"),
    [
        (Baseline.before_token, [0.5, 0.75, 0.25, -0.125]),
        (Baseline.paper, [0.75, 0.25, 0.0, -0.375]),
        (Baseline.reference, [0.5, 0.75, 0.25, -0.125]),
    ],
)
def test_advantages_of_verified_rewards_by_hand(baseline: Baseline, advantages: list[float]) -> None:
    assert token_advantages(VALUES, torch.tensor([1.0, 0.0]), LENGTHS, baseline).tolist() == advantages


@given(SOME_LENGTHS, SEEDS, st.sampled_from(list(Baseline)))
@settings(max_examples=60, deadline=None)
def test_advantages_are_those_of_a_loop(lengths: list[int], seed: int, baseline: Baseline) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths) + len(lengths), generator=generator)
    rewards, advantages = [], []
    for row in values.split([length + 1 for length in lengths]):
        v = row.tolist()  # v[t] = V(x, y_1:t)
        end = len(v) - 1
        rewards.append(v[max(end - 1, 0)] if baseline is Baseline.reference else v[end])
        for t in range(1, end + 1):
            advantages.append(rewards[-1] - (v[t] if baseline is Baseline.paper else v[t - 1]))
    found = final_values(values, torch.tensor(lengths), baseline)
    assert found.tolist() == rewards
    assert token_advantages(values, found, torch.tensor(lengths), baseline).tolist() == pytest.approx(advantages)


def test_whitening_gives_zero_mean_and_unit_variance() -> None:
    white = whiten(torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64))
    deviation = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert white.tolist() == pytest.approx([-2 / deviation, -1 / deviation, 0.0, 3 / deviation], abs=1e-7)


def test_whitening_equal_one_or_no_advantages_gives_no_nan() -> None:
    assert whiten(torch.full((3,), 0.7)).tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-3)
    assert whiten(torch.tensor([0.7])).tolist() == [0.0]
    assert whiten(torch.zeros(0)).tolist() == []


# Policy loss


def update(ratio: Ratio, **changes: float | None) -> ActorUpdateConfig:
    return ActorUpdateConfig(ratio=ratio, **({"clip_low": 0.1, "clip_high": 0.1} | changes))  # type: ignore[arg-type]


# Row 0: token ratios 0.6 / 0.5 and 0.2 / 0.25, so s = sqrt(0.96). Row 1: ratio 0.9 / 0.5 = 1.8.
NEW, OLD = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.6, 0.2, 0.9], [0.5, 0.25, 0.5]))
S = math.sqrt(0.96)


@pytest.mark.parametrize(
    ("ratio", "dual_clip", "last_advantage", "loss", "gradient"),
    [
        # row 0: s is inside the clip; row 1: 1.8 is clipped to 1.1
        (Ratio.sequence, None, 2.0, [0.0, -2.2], [-S / 2, S / 2, 0.0]),
        # row 1: a negative advantage is not clipped from above
        (Ratio.sequence, None, -2.0, [0.0, 3.6], [-S / 2, S / 2, 3.6]),
        # row 1: ... but bounded by 1.5 * 2
        (Ratio.sequence, 1.5, -2.0, [0.0, 3.0], [-S / 2, S / 2, 0.0]),
        (Ratio.sequence, 2.5, -2.0, [0.0, 3.6], [-S / 2, S / 2, 3.6]),
        # row 0: 1.2 clipped to 1.1 for A = 1, 0.8 clipped to 0.9 for A = -1
        (Ratio.token, None, 2.0, [-0.1, -2.2], [0.0, 0.0, 0.0]),
        (Ratio.token, None, -2.0, [-0.1, 3.6], [0.0, 0.0, 3.6]),
        (Ratio.token, 1.5, -2.0, [-0.1, 3.0], [0.0, 0.0, 0.0]),
    ],
)
def test_policy_loss_by_hand(
    ratio: Ratio, dual_clip: float | None, last_advantage: float, loss: list[float], gradient: list[float]
) -> None:
    logprobs = NEW.clone().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, last_advantage], dtype=torch.float64)
    found, _ = policy_loss(
        logprobs, torch.zeros(3), OLD, advantages, None, torch.tensor([2, 1]), update(ratio, dual_clip=dual_clip)
    )
    found.sum().backward()
    assert found.tolist() == pytest.approx(loss, abs=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(gradient, abs=1e-12)


def test_policy_metrics_by_hand() -> None:
    reference = torch.tensor([0.3, 0.2, 0.45], dtype=torch.float64).log()  # a half, the same, a half of the policy's
    entropy = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    _, metrics = policy_loss(
        NEW, entropy, OLD, advantages, reference, torch.tensor([2, 1]), update(Ratio.token, kl_coef=1.0)
    )
    k3_of_half = 0.5 - 1 + math.log(2)
    first = dict(zip(ROW_METRICS, metrics[0].tolist(), strict=True))
    assert first["entropy"] == pytest.approx(1.5)
    assert first["ratio"] == pytest.approx(1.0)
    assert first["clip_fraction"] == 1.0
    assert first["reference_kl"] == pytest.approx(k3_of_half / 2)
    assert first["approx_kl"] == pytest.approx((1.2 - 1 - math.log(1.2) + 0.8 - 1 - math.log(0.8)) / 2)
    assert first["loss"] == pytest.approx(-0.1 + k3_of_half / 2)
    assert metrics[1, ROW_METRICS.index("clip_fraction")] == 1.0


def test_kl_is_not_negative_and_not_noise_after_the_small_steps_of_sequence_clipping() -> None:
    """After a step the policies differ by 1e-4: exp(d) - 1 - d is 5e-9, far below fp32's rounding of exp(d)."""
    step = torch.tensor([1e-4, -1e-4, 3e-4, 2e-5])
    _, metrics = policy_loss(
        step, torch.zeros(4), torch.zeros(4), torch.ones(4), torch.zeros(4), torch.ones(4, dtype=torch.int64),
        update(Ratio.token),
    )  # fmt: skip
    expected = (step.double().square() / 2).tolist()
    assert metrics[:, ROW_METRICS.index("approx_kl")].tolist() == pytest.approx(expected, rel=1e-3)
    assert metrics[:, ROW_METRICS.index("reference_kl")].tolist() == pytest.approx(expected, rel=1e-3)


def loop_loss(
    logprobs: list[Tensor],
    entropy: list[Tensor],
    old: list[Tensor],
    advantages: list[Tensor],
    reference: list[Tensor] | None,
    config: ActorUpdateConfig,
) -> tuple[Tensor, list[list[bool]]]:
    """The same by cases, row by row and token by token; and where the clip binds."""
    losses, bound = [], []
    for i in range(len(logprobs)):
        total, row_bound = torch.zeros((), dtype=torch.float64), []
        length = len(logprobs[i])
        s = math.exp(sum((logprobs[i] - old[i]).tolist()) / max(length, 1))
        for t in range(length):
            pi, advantage = logprobs[i][t].exp(), advantages[i][t].item()
            ratio = s * pi / pi.item() if config.ratio is Ratio.sequence else pi / old[i][t].exp()
            r = ratio.item()
            if advantage >= 0:
                binds, at = r > 1 + config.clip_high, 1 + config.clip_high
            elif config.dual_clip is not None and r > config.dual_clip:
                binds, at = True, config.dual_clip
            else:
                binds, at = r < 1 - config.clip_low, 1 - config.clip_low
            objective = torch.tensor(at * advantage, dtype=torch.float64) if binds else ratio * advantage
            token = -objective - config.entropy_coef * entropy[i][t]
            if reference is not None:
                token = token + config.kl_coef * (reference[i][t].exp() / pi - 1 - reference[i][t] + logprobs[i][t])
            total = total + token / length
            row_bound.append(binds and advantage != 0)
        losses.append(total)
        bound.append(row_bound)
    return torch.stack(losses), bound


def random_rows(lengths: list[int], seed: int, spread: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(sum(lengths), generator=generator, dtype=torch.float64)

    old = -normal().abs() - 0.5
    return {
        "logprobs": old + spread * normal(),
        "entropy": normal().abs(),
        "old": old,
        "advantages": normal(),
        "reference": old + 0.3 * normal(),
    }


def loss_of(rows: dict[str, Tensor], lengths: Tensor, config: ActorUpdateConfig) -> tuple[Tensor, Tensor]:
    reference = rows["reference"] if config.kl_coef else None
    return policy_loss(
        rows["logprobs"], rows["entropy"], rows["old"], rows["advantages"], reference, lengths, config
    )  # fmt: skip


CONFIGS = [
    update(ratio, dual_clip=dual_clip, entropy_coef=entropy, kl_coef=kl, clip_low=low, clip_high=high)
    for ratio in Ratio
    for dual_clip, entropy, kl, low, high in [
        (None, 0.0, 0.0, 0.1, 0.2),
        (1.5, 0.0, 0.0, 0.1, 0.2),
        (1.2, 0.3, 0.7, 0.05, 0.1),
        (None, 0.0, 0.0, 3e-4, 5e-4),
    ]
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.ratio.name}-{c.dual_clip}-{c.kl_coef}-{c.clip_low}")
def test_policy_loss_and_gradient_are_those_of_a_loop(config: ActorUpdateConfig) -> None:
    lengths = [3, 0, 1, 7, 0, 12, 5, 1, 9]
    spread = 0.5 if config.clip_low > 0.01 else 3e-3
    rows = random_rows(lengths, seed=5, spread=spread)
    mine = {name: tensor.clone().requires_grad_() for name, tensor in rows.items()}
    theirs = {name: tensor.clone().requires_grad_() for name, tensor in rows.items()}
    loss, metrics = loss_of(mine, torch.tensor(lengths), config)
    parts = {name: list(tensor.split(lengths)) for name, tensor in theirs.items()}
    expected, bound = loop_loss(
        parts["logprobs"], parts["entropy"], parts["old"], parts["advantages"],
        parts["reference"] if config.kl_coef else None, config,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)

    weights = torch.linspace(0.5, 1.5, len(lengths), dtype=torch.float64)  # a row's loss may not leak into another's
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine["logprobs"].grad, theirs["logprobs"].grad, rtol=1e-12, atol=1e-12)
    if config.entropy_coef:
        torch.testing.assert_close(mine["entropy"].grad, theirs["entropy"].grad, rtol=1e-12, atol=1e-12)

    binds = torch.tensor([b for row in bound for b in row])
    assert 0 < binds.sum() < len(binds), "the case has tokens on both sides of the clip"
    if not config.kl_coef:
        assert mine["logprobs"].grad is not None
        assert torch.equal(mine["logprobs"].grad.eq(0), binds)
    share = [sum(row) / max(len(row), 1) for row in bound]
    assert metrics[:, ROW_METRICS.index("clip_fraction")].tolist() == pytest.approx(share)
    assert not metrics.requires_grad
    assert metrics.isfinite().all()


def test_both_signs_clip_on_their_own_side_only() -> None:
    """With A > 0 a ratio below the range still pulls, with A < 0 one above it."""
    old = torch.zeros(4)
    logprobs = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, _ = policy_loss(
        logprobs, torch.zeros(4), old, advantages, None, torch.ones(4, dtype=torch.int64), update(Ratio.sequence)
    )
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, -math.exp(-0.5), math.exp(0.5), 0.0])


@given(SOME_LENGTHS, SEEDS, st.sampled_from(CONFIGS))
@settings(max_examples=60, deadline=None)
def test_a_row_has_the_same_loss_in_any_company(lengths: list[int], seed: int, config: ActorUpdateConfig) -> None:
    """In any order of the rows, and when the batch is cut in two."""
    rows = random_rows(lengths, seed, spread=0.3)
    loss, metrics = loss_of(rows, torch.tensor(lengths), config)
    assert loss.isfinite().all()
    assert metrics.isfinite().all()

    def of(chosen: list[int]) -> tuple[Tensor, Tensor]:
        parts = {name: split(tensor, torch.tensor(lengths)) for name, tensor in rows.items()}
        empty = torch.zeros(0, dtype=torch.float64)
        part = {name: torch.cat([tensors[i] for i in chosen] or [empty]) for name, tensors in parts.items()}
        return loss_of(part, torch.tensor([lengths[i] for i in chosen], dtype=torch.int64), config)

    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    permuted_loss, permuted_metrics = of(order)
    torch.testing.assert_close(permuted_loss, loss[order])
    torch.testing.assert_close(permuted_metrics, metrics[order])
    cut = seed % (len(lengths) + 1)
    halves = of(list(range(cut)))[0], of(list(range(cut, len(lengths))))[0]
    torch.testing.assert_close(torch.cat(halves), loss)


# Value loss


def test_value_loss_by_hand() -> None:
    """Row 0 is drawn to 1: (0.25 + 0.5625 + 0.0625 + 0) / 4; row 1 to 0: (0.015625 + 0.140625) / 2."""
    loss = value_loss(VALUES, torch.tensor([1.0, 0.0]), LENGTHS)
    assert loss.tolist() == [0.21875, 0.078125]


@given(SOME_LENGTHS, SEEDS)
@settings(max_examples=50, deadline=None)
def test_value_loss_and_gradient_are_those_of_a_loop(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths) + len(lengths), generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 2, (len(lengths),), generator=generator).double()
    loss = value_loss(values, targets, torch.tensor(lengths))
    (gradient,) = torch.autograd.grad(loss.sum(), values)
    expected_loss, expected_gradient = [], []
    for row, target in zip(values.detach().split([n + 1 for n in lengths]), targets.tolist(), strict=True):
        errors = [v - target for v in row.tolist()]
        expected_loss.append(sum(e * e for e in errors) / len(errors))
        expected_gradient += [2 * e / len(errors) for e in errors]
    assert loss.tolist() == pytest.approx(expected_loss)
    assert gradient.tolist() == pytest.approx(expected_gradient)


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
