"""The policy loss against numbers worked out by hand, and against a loop over tokens in float64 and its autograd."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import ActorUpdateConfig, Ratio
from megatron_tempo.kernels.policy_loss import ROW_METRICS, Experience
from megatron_tempo.kernels.rows import BLOCK
from tests.kernels.implementations import Implementation, plain

SOME_LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=8)
SEEDS = st.integers(0, 2**31)


def update(ratio: Ratio, **changes: float | None) -> ActorUpdateConfig:
    return ActorUpdateConfig(ratio=ratio, **({"clip_low": 0.1, "clip_high": 0.1} | changes))  # type: ignore[arg-type]


def values_for(advantages: Tensor, lengths: list[int]) -> Tensor:
    """Values that give these advantages where the rewards are 0 and the baseline is read before the token."""
    parts = advantages.split(lengths)
    return torch.cat([x for part in parts for x in (-part, torch.full((1,), 99.0, dtype=part.dtype))])


def loss_of(
    implementation: Implementation,
    lengths: list[int],
    config: ActorUpdateConfig,
    logprobs: Tensor,
    entropy: Tensor,
    experience: Experience,
    baseline: Baseline = Baseline.before_token,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Loss and metrics by row, and the gradients of log-probabilities and entropy, each row's loss weighed its own."""
    mine = implementation(logprobs).requires_grad_(), implementation(entropy).requires_grad_()
    tensors = {field.name: getattr(experience, field.name) for field in fields(experience)}
    given = Experience(**{name: None if x is None else implementation(x) for name, x in tensors.items()})
    loss, metrics = implementation.kernels.policy_loss(*mine, given, implementation.rows(lengths), baseline, config)
    (loss * implementation(weights_of(lengths))).sum().backward()
    assert mine[0].grad is not None
    assert not metrics.requires_grad
    return loss, metrics, mine[0].grad, mine[1].grad


def weights_of(lengths: list[int]) -> Tensor:
    """A row's loss may not leak into another's: each has its own weight."""
    return torch.linspace(0.5, 1.5, len(lengths), dtype=torch.float64)


# By hand

# Row 0: token ratios 0.6 / 0.5 and 0.2 / 0.25, so s = sqrt(0.96). Row 1: ratio 0.9 / 0.5 = 1.8.
NEW, OLD = (torch.tensor(p, dtype=torch.float64).log() for p in ([0.6, 0.2, 0.9], [0.5, 0.25, 0.5]))
S = math.sqrt(0.96)


def by_hand(advantages: list[float]) -> Experience:
    wide = torch.tensor(advantages, dtype=torch.float64)
    return Experience(OLD, values_for(wide, [2, 1]), torch.zeros(2, dtype=torch.float64))


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
def test_loss_and_gradient_by_hand(
    implementation: Implementation,
    ratio: Ratio,
    dual_clip: float | None,
    last_advantage: float,
    loss: list[float],
    gradient: list[float],
) -> None:
    config = update(ratio, dual_clip=dual_clip)
    experience = by_hand([1.0, -1.0, last_advantage])
    actual, _, grad, _ = loss_of(implementation, [2, 1], config, NEW, torch.zeros(3), experience)
    implementation.close(actual, loss)
    implementation.close(grad, [g * weight for g, weight in zip(gradient, (0.5, 0.5, 1.5), strict=True)])


def test_metrics_by_hand(implementation: Implementation) -> None:
    reference = torch.tensor([0.3, 0.2, 0.45], dtype=torch.float64).log()  # a half, the same, a half of the policy's
    weights = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
    experience = replace(by_hand([1.0, -1.0, 2.0]), reference_logprobs=reference, weights=weights)
    config = update(Ratio.token, kl_coef=1.0)
    _, metrics, _, _ = loss_of(implementation, [2, 1], config, NEW, torch.tensor([1.0, 2.0, 4.0]), experience)
    k3_of_half = 0.5 - 1 + math.log(2)
    first, second = (dict(zip(ROW_METRICS, row, strict=True)) for row in metrics.tolist())
    expected = {
        "loss": (-2 * 1.1 + 0.9) / 2 + k3_of_half / 2,
        "entropy": 1.5,
        "ratio": 1.0,
        "clip_high": 0.5,
        "clip_low": 0.5,
        "approx_kl": (1.2 - 1 - math.log(1.2) + 0.8 - 1 - math.log(0.8)) / 2,
        "reference_kl": k3_of_half / 2,
        "advantage": 0.0,
        "advantage_square": 1.0,
        "token_ratio_min": 0.8,
        "token_ratio_max": 1.2,
    }
    assert first == pytest.approx(expected, abs=1e-6)
    assert second["loss"] == pytest.approx(-3.0 * 1.1 * 2.0 + k3_of_half, rel=1e-6)
    assert second["clip_high"] == 1.0
    assert second["clip_low"] == 0.0


def test_by_the_sequences_ratio_the_clip_holds_a_sign_of_a_row_as_a_whole(implementation: Implementation) -> None:
    """s = 1.8 is above the clip: of the row's tokens, those with a positive advantage are held, and those alone."""
    old, advantages = torch.tensor([0.5] * 4).log(), torch.tensor([1.0, -1.0, -2.0, 0.0])
    experience = Experience(old, values_for(advantages, [4]), torch.zeros(1))
    logprobs = torch.tensor([0.9] * 4).log()
    _, metrics, grad, _ = loss_of(implementation, [4], update(Ratio.sequence), logprobs, torch.zeros(4), experience)
    assert metrics[0, ROW_METRICS.index("clip_high")].item() == 0.25
    assert metrics[0, ROW_METRICS.index("clip_low")].item() == 0.0
    torch.testing.assert_close(grad.cpu().float(), 0.5 * torch.tensor([0.0, 0.45, 0.9, 0.0]))


def test_both_signs_clip_on_their_own_side_only(implementation: Implementation) -> None:
    """With A > 0 a ratio below the range still pulls, with A < 0 one above it."""
    logprobs = torch.tensor([0.5, -0.5, 0.5, -0.5])
    experience = Experience(torch.zeros(4), values_for(torch.tensor([1.0, 1.0, -1.0, -1.0]), [1] * 4), torch.zeros(4))
    _, _, grad, _ = loss_of(implementation, [1] * 4, update(Ratio.sequence), logprobs, torch.zeros(4), experience)
    expected = weights_of([1] * 4) * torch.tensor([0.0, -math.exp(-0.5), math.exp(0.5), 0.0])
    torch.testing.assert_close(grad.cpu().double(), expected, rtol=1e-6, atol=1e-6)


def test_kl_is_not_negative_and_not_noise_after_the_small_steps_of_sequence_clipping(
    implementation: Implementation,
) -> None:
    """After a step the policies differ by 1e-4: exp(d) - 1 - d is 5e-9, far below fp32's rounding of exp(d)."""
    step = torch.tensor([1e-4, -1e-4, 3e-4, 2e-5])
    experience = Experience(torch.zeros(4), torch.zeros(8), torch.ones(4), reference_logprobs=torch.zeros(4))
    config = update(Ratio.token, kl_coef=1.0)
    _, metrics, _, _ = loss_of(implementation, [1] * 4, config, step, torch.zeros(4), experience)
    for name in ("approx_kl", "reference_kl"):
        expected = (step.double().square() / 2).tolist()
        assert metrics[:, ROW_METRICS.index(name)].tolist() == pytest.approx(expected, rel=1e-3)


# Against a loop


def k3(x: Tensor) -> Tensor:
    return x.exp() - 1 - x


def loop(
    lengths: list[int],
    config: ActorUpdateConfig,
    logprobs: Tensor,
    entropy: Tensor,
    given: Experience,
    baseline: Baseline,
    moments: tuple[float, float] | None,
) -> tuple[Tensor, list[dict[str, float]]]:
    """The loss by cases, row by row and token by token, and the rows' metrics."""
    losses, row_metrics = [], []
    at = 0
    for i, length in enumerate(lengths):
        old = given.old_logprobs[at : at + length]
        difference = logprobs[at : at + length] - old
        s = math.exp(math.fsum(difference.tolist()) / max(length, 1))
        total, of_row = torch.zeros((), dtype=torch.float64), dict.fromkeys(ROW_METRICS, 0.0)
        ratios = []
        for t in range(length):
            j = at + t
            raw = (given.rewards[i] - given.values[j + i + (1 if baseline is Baseline.paper else 0)]).item()
            advantage = raw if moments is None else (raw - moments[0]) / (moments[1] + 1e-8)
            own = difference[t].exp()
            ratio = own if config.ratio is Ratio.token else s * (logprobs[j] - logprobs[j].detach()).exp()
            bound = held_at(ratio.item(), advantage, config)
            objective = ratio * advantage if bound is None else torch.tensor(bound * advantage, dtype=torch.float64)
            weight = 1.0 if given.weights is None else given.weights[j].item()
            term = -weight * objective - config.entropy_coef * entropy[j]
            if given.reference_logprobs is not None:
                kl = k3(given.reference_logprobs[j] - logprobs[j])
                term = term + config.kl_coef * kl
                of_row["reference_kl"] += kl.item() / length
            if weight != 0:  # otherwise the token is masked
                total = total + term / length
            of_row["entropy"] += entropy[j].item() / length
            of_row["ratio"] += ratio.item() / length
            of_row["clip_high"] += (bound is not None and advantage > 0) / length
            of_row["clip_low"] += (bound is not None and advantage < 0) / length
            of_row["approx_kl"] += k3(difference[t]).item() / length
            of_row["advantage"] += raw / length
            of_row["advantage_square"] += raw**2 / length
            ratios.append(own.item())
        of_row["token_ratio_min"], of_row["token_ratio_max"] = min(ratios, default=1.0), max(ratios, default=1.0)
        of_row["ratio"] = of_row["ratio"] if length else 1.0
        of_row["loss"] = total.item()
        losses.append(total)
        row_metrics.append(of_row)
        at += length
    return torch.stack(losses), row_metrics


def held_at(ratio: float, advantage: float, config: ActorUpdateConfig) -> float | None:
    """What the clip holds the ratio at, if it binds."""
    if advantage >= 0:
        return 1 + config.clip_high if ratio > 1 + config.clip_high else None
    if config.dual_clip is not None and ratio > config.dual_clip:
        return config.dual_clip
    return 1 - config.clip_low if ratio < 1 - config.clip_low else None


def some_weights(normal: Tensor) -> Tensor:
    """Log-normal weights of tokens, truncated at 1.25; a fifth is masked."""
    weights = (0.3 * normal).exp().clamp(max=1.25).float().double()
    return torch.where(normal < -0.84, 0.0, weights)


def random_case(lengths: list[int], seed: int, spread: float, config: ActorUpdateConfig) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int) -> Tensor:
        # What fp32 can hold, so that all implementations are given the same.
        return torch.randn(count, generator=generator).double()

    size, rows = sum(lengths), len(lengths)
    old = -normal(size).abs() - 0.5
    logprobs = (old + spread * normal(size)).float().double()
    return {
        "logprobs": logprobs,
        "entropy": normal(size).abs(),
        "experience": Experience(
            old_logprobs=old,
            values=normal(size + rows),
            rewards=normal(rows),
            weights=some_weights(normal(size)) if config.kl_coef else None,
            reference_logprobs=(logprobs + 0.3 * normal(size)).float().double() if config.kl_coef else None,
        ),
    }


CONFIGS = [
    update(ratio, **changes)  # type: ignore[arg-type]
    for ratio in Ratio
    for changes in (
        {"clip_high": 0.2},
        {"clip_high": 0.2, "dual_clip": 1.5},
        {"dual_clip": 1.2, "entropy_coef": 0.3, "kl_coef": 0.7, "clip_low": 0.05},
        {"clip_low": 3e-4, "clip_high": 5e-4},
    )
]
IDS = [f"{c.ratio.name}-{c.dual_clip}-{c.kl_coef}-{c.clip_low}" for c in CONFIGS]


def assert_as_the_loop(
    implementation: Implementation,
    lengths: list[int],
    config: ActorUpdateConfig,
    case: dict,
    baseline: Baseline,
    *,
    whitened: bool,
) -> list[dict[str, float]]:
    experience, moments = case["experience"], None
    if whitened:
        rows, values, rewards = implementation.rows(lengths), experience.values, experience.rewards
        actual_moments = implementation.kernels.advantage_moments(
            implementation(values), implementation(rewards), rows, baseline
        )
        experience = replace(experience, moments=actual_moments)
        raw = [
            (reward - value).item()
            for row, reward in zip(values.split([n + 1 for n in lengths]), rewards, strict=True)
            for value in (row[1:] if baseline is Baseline.paper else row[:-1])
        ]
        wide = torch.tensor(raw, dtype=torch.float64)
        moments = wide.mean().item(), wide.std().item()
    inputs = case["logprobs"].clone().requires_grad_(), case["entropy"].clone().requires_grad_()
    expected, row_metrics = loop(lengths, config, *inputs, case["experience"], baseline, moments)
    (expected * weights_of(lengths)).sum().backward()
    loss, metrics, grad_logprobs, grad_entropy = loss_of(
        implementation, lengths, config, case["logprobs"], case["entropy"], experience, baseline
    )
    implementation.close(loss, expected.detach())
    assert inputs[0].grad is not None
    implementation.close(grad_logprobs, inputs[0].grad)
    if config.entropy_coef:
        assert grad_entropy is not None
        assert inputs[1].grad is not None
        implementation.close(grad_entropy, inputs[1].grad)
    implementation.close(metrics, [[row[name] for name in ROW_METRICS] for row in row_metrics])
    return row_metrics


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
@pytest.mark.parametrize("baseline", list(Baseline), ids=lambda b: b.name)
@pytest.mark.parametrize("whitened", [False, True], ids=["raw", "whitened"])
def test_loss_gradients_and_metrics_are_those_of_a_loop(
    implementation: Implementation, config: ActorUpdateConfig, baseline: Baseline, whitened: bool
) -> None:
    lengths = [3, 0, 1, 7, 0, 12, 5, 1, 9]
    spread = 0.5 if config.clip_low > 0.01 else 3e-3
    case = random_case(lengths, 5, spread, config)
    row_metrics = assert_as_the_loop(implementation, lengths, config, case, baseline, whitened=whitened)
    held = sum((row["clip_high"] + row["clip_low"]) * n for row, n in zip(row_metrics, lengths, strict=True))
    assert 0 < held < sum(lengths), "the case has tokens on both sides of the clip"


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[6]], ids=[IDS[2], IDS[6]])
def test_rows_about_a_blocks_length(implementation: Implementation, config: ActorUpdateConfig) -> None:
    lengths = [BLOCK - 1, BLOCK, BLOCK + 1, 0, 2 * BLOCK + 5, 1]
    case = random_case(lengths, 6, 0.5, config)
    assert_as_the_loop(implementation, lengths, config, case, Baseline.before_token, whitened=True)


@pytest.mark.parametrize("ratio", list(Ratio))
def test_rows_of_65536_and_of_more_blocks_than_are_joined_at_a_time(
    implementation: Implementation, ratio: Ratio
) -> None:
    lengths = [65536, 1, 0, 70000]
    config = update(ratio, clip_low=1e-4, clip_high=1e-4)
    case = random_case(lengths, 7, 0.05, config)
    wanted = loss_of(plain(), lengths, config, **case)
    for actual, expected in zip(loss_of(implementation, lengths, config, **case)[:3], wanted, strict=False):
        implementation.close(actual, expected)


# Whatever the company


@given(lengths=SOME_LENGTHS, seed=SEEDS, config=st.sampled_from(CONFIGS))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_has_the_same_loss_in_any_company(
    implementation: Implementation, lengths: list[int], seed: int, config: ActorUpdateConfig
) -> None:
    """In any order of the rows, and when the batch is cut in two, as over ranks."""
    case = random_case(lengths, seed, 0.3, config)
    loss, metrics, grad, _ = loss_of(implementation, lengths, config, **case)
    grads = (grad.cpu().double() / torch.repeat_interleave(weights_of(lengths), torch.tensor(lengths))).split(lengths)
    assert all(x.isfinite().all() for x in (loss, metrics, grad))

    def alone(chosen: list[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
        part = [lengths[i] for i in chosen]
        one = {name: pick(case[name], lengths, chosen) for name in ("logprobs", "entropy")}
        loss, metrics, grad, _ = loss_of(implementation, part, config, **one, experience=taken(case, lengths, chosen))
        weights = torch.repeat_interleave(weights_of(part), torch.tensor(part, dtype=torch.int64))
        return loss, metrics, list((grad.cpu().double() / weights).split(part))

    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = seed % (len(lengths) + 1)
    for chosen in (order, list(range(cut)), list(range(cut, len(lengths)))):
        part_loss, part_metrics, part_grads = alone(chosen)
        implementation.close(part_loss, loss[chosen].detach())
        implementation.close(part_metrics, metrics[chosen])
        for i, part_grad in zip(chosen, part_grads, strict=True):
            implementation.close(part_grad, grads[i])


def pick(flat: Tensor, lengths: list[int], rows: list[int]) -> Tensor:
    parts = flat.split(lengths)
    return torch.cat([parts[i] for i in rows]) if rows else flat[:0]


def taken(case: dict, lengths: list[int], rows: list[int]) -> Experience:
    whole: Experience = case["experience"]

    def optional(flat: Tensor | None) -> Tensor | None:
        return None if flat is None else pick(flat, lengths, rows)

    return Experience(
        old_logprobs=pick(whole.old_logprobs, lengths, rows),
        values=pick(whole.values, [n + 1 for n in lengths], rows),
        rewards=whole.rewards[rows],
        weights=optional(whole.weights),
        reference_logprobs=optional(whole.reference_logprobs),
    )


# What is out of the ordinary


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_no_tokens_give_no_loss(implementation: Implementation, lengths: list[int]) -> None:
    config = CONFIGS[2]
    loss, metrics, grad, _ = loss_of(implementation, lengths, config, **random_case(lengths, 0, 0.1, config))
    assert loss.tolist() == [0.0] * len(lengths)
    assert metrics.shape == (len(lengths), len(ROW_METRICS))
    assert grad.tolist() == []


@pytest.mark.parametrize("ratio", list(Ratio))
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_extreme_log_ratios_overflow_nothing(
    implementation: Implementation, ratio: Ratio, dual_clip: float | None
) -> None:
    """Tokens that the old policy, the engine or the reference took for impossible, and the other way round."""
    away = torch.tensor([500.0, -500.0, math.inf, 0.0, 25.0, -30.0])
    config = update(ratio, dual_clip=dual_clip, kl_coef=0.1)
    for advantages in (torch.tensor([1.0, -1.0, 0.0, 0.0, -1.0, 1.0]), torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.0, 0.0])):
        experience = Experience(
            old_logprobs=-away,
            values=values_for(advantages, [3, 2, 1]),
            rewards=torch.zeros(3),
            weights=torch.tensor([0.0, 2.0, 1e-9, 1.0, 0.0, 2.0]),
            reference_logprobs=away.clamp(max=1e4),
        )
        for actual in loss_of(implementation, [3, 2, 1], config, torch.zeros(6), torch.zeros(6), experience)[:3]:
            assert actual.isfinite().all()


@pytest.mark.parametrize("ratio", list(Ratio))
@pytest.mark.parametrize("name", ["old_logprobs", "values", "rewards", "weights"])
def test_nan_reaches_the_loss_and_the_gradient(implementation: Implementation, ratio: Ratio, name: str) -> None:
    """The trainer refuses a gradient that is not finite, so a number gone wrong must not be lost on the way."""
    config = update(ratio)
    case = random_case([4, 3], 1, 0.1, config)
    case["experience"] = replace(case["experience"], weights=torch.ones(7, dtype=torch.float64))
    getattr(case["experience"], name)[1] = math.nan  # of the first row, but for the rewards
    loss, _, grad, _ = loss_of(implementation, [4, 3], config, **case)
    row = 1 if name == "rewards" else 0
    assert loss[row].isnan()
    assert loss[1 - row].isfinite()
    of_rows = grad.split([4, 3])
    assert of_rows[row].isnan().any()
    assert of_rows[1 - row].isfinite().all()


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[6]], ids=[IDS[2], IDS[6]])
def test_a_row_whose_tokens_are_all_masked_contributes_zero(
    implementation: Implementation, config: ActorUpdateConfig
) -> None:
    """And a masked token has no gradient, neither of the policy nor of entropy and KL. The other rows stay."""
    lengths = [3, 5, 2]
    case = random_case(lengths, 8, 0.3, config)
    weights = torch.ones(10, dtype=torch.float64)
    before = loss_of(
        implementation, lengths, config, **case | {"experience": replace(case["experience"], weights=weights)}
    )
    weights[3:8] = 0.0  # the second row
    weights[9] = 0.0
    experience = replace(case["experience"], weights=weights)
    loss, metrics, *grads = loss_of(implementation, lengths, config, **case | {"experience": experience})
    assert loss[1] == 0.0
    assert metrics[1, ROW_METRICS.index("loss")] == 0.0
    for grad, was in zip(grads, before[2:], strict=True):
        assert grad is not None
        assert was is not None
        assert grad[3:8].tolist() == [0.0] * 5
        assert grad[9] == 0.0
        assert torch.equal(grad[:3], was[:3])
    assert loss[0] == before[0][0]
    # What is measured of the policy does not depend on what is masked.
    measured = [ROW_METRICS.index(name) for name in ("entropy", "ratio", "approx_kl", "reference_kl", "clip_high")]
    assert torch.equal(metrics[:, measured], before[1][:, measured])


def test_one_pass_may_follow_another_on_the_same_rows(implementation: Implementation) -> None:
    """The blocks' tickets are back at zero after each launch."""
    config, lengths = CONFIGS[2], [5, 2 * BLOCK, 0]
    case = random_case(lengths, 3, 0.3, config)
    rows = implementation.rows(lengths)
    given = Experience(**{
        field.name: None if (x := getattr(case["experience"], field.name)) is None else implementation(x)
        for field in fields(Experience)
    })  # fmt: skip
    args = implementation(case["logprobs"]), implementation(case["entropy"]), given, rows, Baseline.paper, config
    first, second = (implementation.kernels.policy_loss(*args) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert rows.tickets.abs().max() == 0
