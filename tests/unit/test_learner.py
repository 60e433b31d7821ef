"""Mini-batches, and the order in which the methods ask for updates, with actor and critic that record their calls."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tempo.algorithm.truncation import length_penalty
from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel
from megatron_tempo.config.method_settings import NEEDS, Baseline, Method, ValueTiming
from megatron_tempo.config.stages import StageConfig, settings_of
from megatron_tempo.config.truncation import TruncatedResponses
from megatron_tempo.config.updates import CriticTargets
from megatron_tempo.kernels.advantages import token_advantages
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.kernels.rows import Rows
from megatron_tempo.methods import METHODS
from megatron_tempo.methods.learner import Learner, Rollouts, Visits, mini_batches
from megatron_tempo.types import Batch
from tests.support.tiny import ragged_batch

# Mini-batches


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 13), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_mini_batches_hold_whole_prompts_and_every_row_once_an_epoch(
    prompts: int, per_prompt: int, size: int, epochs: int
) -> None:
    batch = ragged_batch(prompts * per_prompt, per_prompt=per_prompt)
    order = mini_batches(batch.group, size, epochs, "seed")
    per_epoch = -(-prompts // size)
    assert len(order) == epochs * per_epoch
    for epoch in range(epochs):
        part = order[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(torch.cat(part).tolist()) == list(range(len(batch)))
        counts = [len(set(batch.group[rows].tolist())) for rows in part]
        assert counts[:-1] == [size] * (per_epoch - 1)
        for rows, count in zip(part, counts, strict=True):
            assert len(rows) == count * per_prompt
            assert rows.dtype == torch.int64


def test_mini_batches_are_shuffled_by_seed_and_epoch() -> None:
    batch = ragged_batch(40)
    one, again, other = (
        [rows.tolist() for rows in mini_batches(batch.group, 5, 2, seed)] for seed in ("a", "a", "b")
    )  # fmt: skip
    assert one == again
    assert one != other
    assert one[:4] != one[4:]
    assert torch.cat(mini_batches(batch.group, 5, 1, "a")).tolist() != list(range(40))


def test_mini_batches_of_chosen_rows() -> None:
    """A batch whose groups are not counted from 0, as after `drop_uniform_groups`."""
    batch = ragged_batch(12).select(torch.tensor([4, 5, 10, 11, 8, 9]))
    order = mini_batches(batch.group, 2, 1, "seed")
    assert [len(rows) for rows in order] == [4, 2]
    assert sorted(torch.cat(order).tolist()) == list(range(6))


# The methods

LIMIT = 20  # of the tokens of a response


@dataclass
class Fakes:
    """A critic whose values tell how often it was fitted: 0.1 * t for the t-th value of a row, and 10 a fit."""

    calls: list[str] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)
    fits: int = 0
    labelled_ids: tuple[str, ...] = ()

    def values(self, batch: Batch) -> Tensor:
        self.calls.append("values")
        return torch.cat([10 * self.fits + 0.1 * torch.arange(n + 1) for n in batch.response_lengths.tolist()])

    agreement: float | None = None  # of the routers with recorded experts

    def logprobs(self, batch: Batch) -> Tensor:
        self.calls.append("logprobs")
        return batch.engine_logprobs - 0.25

    of_responses: list[float] = field(default_factory=list)  # the mean entropy of each response; empty: 0.5

    def entropies(self, batch: Batch) -> Tensor:
        """They rise by 0.01 a token."""
        self.calls.append("entropies")
        lengths, means = batch.response_lengths.tolist(), self.of_responses or [0.5] * len(batch)
        steps = [0.01 * (torch.arange(n) - (n - 1) / 2) for n in lengths]
        return torch.cat([mean + step for mean, step in zip(means, steps, strict=True)])

    def self_certainty(self, batch: Batch) -> Tensor:
        """t for the t-th token of a response, so (T + 1) / 2 for a response of T tokens."""
        self.calls.append("certainty")
        return torch.cat([1.0 + torch.arange(n) for n in batch.response_lengths.tolist()])

    def reference(self, batch: Batch) -> Tensor:
        self.calls.append("reference")
        return batch.engine_logprobs - 0.5

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def learner(self, *, critic: bool = True) -> Learner:
        fakes = self

        class Critic:
            values = staticmethod(fakes.values)

            def update(
                self, batch: Batch, targets: Tensor, config: Any, order: list[Tensor], iteration: int
            ) -> dict[str, float]:
                assert iteration == 5
                fakes.calls.append("fit")
                fakes.fits += 1
                fakes.given["fit"] = {"batch": batch, "targets": targets, "config": config, "order": order}
                return {"critic/loss": 0.5}

        class Actor:
            logprobs = staticmethod(fakes.logprobs)
            entropies = staticmethod(fakes.entropies)
            self_certainty = staticmethod(fakes.self_certainty)

            def gather(self, batch: Batch, of_held: Tensor) -> Tensor:
                return of_held

            def routing_agreement(self) -> float | None:
                return fakes.agreement

            def gap_to_engine(self, batch: Batch, logprobs: Tensor) -> tuple[float, float]:
                gap = (logprobs - batch.engine_logprobs).abs()
                return float(gap.mean()), float(gap.max())

            def update(
                self,
                batch: Batch,
                experience: Experience,
                baseline: Baseline,
                config: Any,
                order: list[Tensor],
                iteration: int,
            ) -> dict[str, float]:
                assert iteration == 5
                fakes.calls.append("improve")
                rows = Rows.of(batch.response_lengths)
                fakes.given["improve"] = {
                    "batch": batch, "old": experience.old_logprobs, "reference": experience.reference_logprobs,
                    "weights": experience.weights, "config": config, "order": order,
                    "advantages": token_advantages(experience.values, experience.rewards, rows, baseline),
                }  # fmt: skip
                return {"actor/loss": 0.25}

        judge = Critic() if critic else None
        return Learner(
            Actor(),  # type: ignore[arg-type]
            judge,  # type: ignore[arg-type]
            self.reference,
            self.phase,
            seed="7/stage2/3",
            iteration=5,
            max_response_tokens=LIMIT,
        )


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


def stage_of(method: Method, **changes: Any) -> StageConfig:
    stage = StageConfig(settings_of(method), labelled_prompts=4, unlabelled_prompts=3, responses_per_prompt=2)
    stage.actor.mini_batch_prompts = stage.critic.mini_batch_prompts = 2
    for name, value in changes.items():
        setattr(stage if hasattr(stage, name) else stage.settings, name, value)
    return stage


def rollouts_of(*, labelled: bool = True, unlabelled: bool = True) -> Rollouts:
    return Rollouts(
        ragged_batch(8, seed=1) if labelled else None, ragged_batch(6, seed=2, correct=False) if unlabelled else None
    )


def expected(batch: Batch, rewards: list[float] | None, fits: int) -> list[float]:
    """R - V(x, y_<t) for the fake critic after so many fits; R = V(x, y_1:T) where no rewards are given."""
    advantages = []
    for i, length in enumerate(batch.response_lengths.tolist()):
        values = [10 * fits + 0.1 * t for t in range(length + 1)]
        reward = values[-1] if rewards is None else rewards[i]
        advantages += [reward - value for value in values[:-1]]
    return advantages


def test_the_agreement_of_routers_is_in_the_metrics_where_experts_are_recorded(fakes: Fakes) -> None:
    fakes.agreement = 0.75
    metrics = METHODS[Method.ppo](fakes.learner(), rollouts_of(unlabelled=False), stage_of(Method.ppo), 0)
    assert metrics["engine/routing_agreement"] == 0.75


def test_ppo_reads_the_values_before_the_critic_sees_the_rollouts(fakes: Fakes) -> None:
    rollouts, stage = rollouts_of(unlabelled=False), stage_of(Method.ppo)
    metrics = METHODS[Method.ppo](fakes.learner(), rollouts, stage, 0)
    assert fakes.calls == ["values", "fit", "logprobs", "improve"]
    batch = rollouts.labelled
    assert batch is not None
    assert batch.correct is not None
    fit, improve = fakes.given["fit"], fakes.given["improve"]
    assert fit["batch"] is improve["batch"] is batch
    assert fit["targets"].tolist() == batch.correct.tolist()
    assert improve["advantages"].tolist() == pytest.approx(expected(batch, batch.correct.tolist(), 0), abs=1e-5)
    assert improve["reference"] is None
    assert torch.equal(improve["old"], batch.engine_logprobs - 0.25)
    assert (fit["config"], improve["config"]) == (stage.critic, stage.actor)
    assert metrics["engine/logprob_gap_mean"] == pytest.approx(0.25)
    assert {"critic/loss", "actor/loss", "critic/rows"} <= metrics.keys()
    assert "engine/routing_agreement" not in metrics
    # Actor and critic see the rows in orders of their own.
    assert [rows.tolist() for rows in fit["order"]] != [rows.tolist() for rows in improve["order"]]


def test_ppo_warms_up_the_critic_alone(fakes: Fakes) -> None:
    stage = stage_of(Method.ppo)
    stage.critic.warmup_iterations = 2
    METHODS[Method.ppo](fakes.learner(), rollouts_of(unlabelled=False), stage, 1)
    assert fakes.calls == ["fit"]
    METHODS[Method.ppo](fakes.learner(), rollouts_of(unlabelled=False), stage, 2)
    assert fakes.calls == ["fit", "values", "fit", "logprobs", "improve"]


@pytest.mark.parametrize("timing", list(ValueTiming))
def test_tempo_fits_on_labelled_and_improves_on_unlabelled(fakes: Fakes, timing: ValueTiming) -> None:
    rollouts = rollouts_of()
    assert rollouts.labelled is not None
    assert rollouts.unlabelled is not None
    assert rollouts.labelled.correct is not None
    metrics = METHODS[Method.tempo](fakes.learner(), rollouts, stage_of(Method.tempo, value_timing=timing), 0)
    early = timing is ValueTiming.before_estep
    estep = ["values", "fit"] if early else ["fit", "values"]
    assert fakes.calls == [*estep, "logprobs", "improve"]
    assert fakes.given["fit"]["batch"] is rollouts.labelled
    assert fakes.given["fit"]["targets"].tolist() == rollouts.labelled.correct.tolist()
    improve = fakes.given["improve"]
    assert improve["batch"] is rollouts.unlabelled
    fits = 0 if early else 1
    assert improve["advantages"].tolist() == pytest.approx(expected(rollouts.unlabelled, None, fits), abs=1e-5)
    rewards = [10 * fits + 0.1 * length for length in rollouts.unlabelled.response_lengths.tolist()]
    assert metrics["reward/unlabelled_value"] == pytest.approx(sum(rewards) / len(rewards))


def test_tempo_with_a_frozen_critic_and_between_esteps(fakes: Fakes) -> None:
    for stage, iteration in [
        (stage_of(Method.tempo, estep_every=0), 0),
        (stage_of(Method.tempo, estep_every=3), 4),
    ]:
        fakes.calls.clear()
        METHODS[Method.tempo](fakes.learner(), rollouts_of(labelled=False), stage, iteration)
        assert fakes.calls == ["values", "logprobs", "improve"]
    fakes.calls.clear()
    METHODS[Method.tempo](fakes.learner(), rollouts_of(), stage_of(Method.tempo, estep_every=3), 6)
    assert fakes.calls == ["fit", "values", "logprobs", "improve"]


def test_tempo_warms_up_by_esteps_alone(fakes: Fakes) -> None:
    stage = stage_of(Method.tempo, estep_every=3)
    stage.critic.warmup_iterations = 2
    METHODS[Method.tempo](fakes.learner(), rollouts_of(unlabelled=False), stage, 1)
    assert fakes.calls == ["fit"]


@pytest.mark.parametrize("timing", list(ValueTiming))
@pytest.mark.parametrize("targets", list(CriticTargets))
def test_labelled_rows_in_the_actors_batch_carry_verified_rewards(
    fakes: Fakes, timing: ValueTiming, targets: CriticTargets
) -> None:
    rollouts = rollouts_of()
    assert rollouts.labelled is not None
    assert rollouts.unlabelled is not None
    assert rollouts.labelled.correct is not None
    stage = stage_of(Method.tempo, actor_on_labelled=True, value_timing=timing)
    stage.critic.targets = targets
    metrics = METHODS[Method.tempo](fakes.learner(), rollouts, stage, 0)
    fits = 0 if timing is ValueTiming.before_estep else 1  # of all rows that the actor learns from
    verified = [2 * c - 1 if targets is CriticTargets.plus_minus_one else c for c in rollouts.labelled.correct.tolist()]
    improve = fakes.given["improve"]
    wanted = expected(rollouts.unlabelled, None, fits) + expected(rollouts.labelled, verified, fits)
    assert improve["advantages"].tolist() == pytest.approx(wanted, abs=1e-5)
    batch = improve["batch"]
    assert batch.prompt_ids == rollouts.unlabelled.prompt_ids + rollouts.labelled.prompt_ids
    assert batch.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert batch.correct is None
    assert fakes.given["fit"]["targets"].tolist() == verified
    rewards = [10 * fits + 0.1 * length for length in rollouts.unlabelled.response_lengths.tolist()]
    assert metrics["reward/unlabelled_value"] == pytest.approx(sum(rewards) / len(rewards)), "of unlabelled rows alone"


@pytest.mark.parametrize("baseline", list(Baseline))
def test_the_stages_baseline_is_used(fakes: Fakes, baseline: Baseline) -> None:
    """The fake critic's values rise by 0.1 a token, so the advantages count the tokens that are left."""
    rollouts = rollouts_of()
    assert rollouts.unlabelled is not None
    METHODS[Method.tempo](fakes.learner(), rollouts, stage_of(Method.tempo, baseline=baseline), 0)
    left = {Baseline.before_token: 0, Baseline.paper: 1, Baseline.reference: 1}[baseline]
    lengths = rollouts.unlabelled.response_lengths.tolist()
    wanted = [0.1 * (length - t - left) for length in lengths for t in range(length)]
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_uniform_groups_are_dropped_when_asked(fakes: Fakes) -> None:
    labelled = ragged_batch(8, seed=1)
    assert labelled.correct is not None
    labelled.correct[:] = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 1])
    stage = stage_of(Method.tempo)
    stage.critic.drop_uniform_groups = True
    metrics = METHODS[Method.tempo](fakes.learner(), Rollouts(labelled, rollouts_of().unlabelled), stage, 0)
    fit = fakes.given["fit"]
    assert fit["batch"].prompt_ids == ("p0", "p0", "p3", "p3")
    assert fit["targets"].tolist() == [1.0, 0.0, 0.0, 1.0]
    assert sorted(torch.cat(fit["order"]).tolist()) == [0, 1, 2, 3]
    assert metrics["critic/rows"] == 4.0
    whole = list(labelled.rows())
    for row, i in zip(fit["batch"].rows(), (0, 1, 6, 7), strict=True):
        assert row.tolist() == whole[i].tolist()


def test_where_all_groups_are_uniform_the_critic_stays_as_it_is(fakes: Fakes) -> None:
    labelled = ragged_batch(8, seed=1)
    assert labelled.correct is not None
    labelled.correct[:] = 1.0
    stage = stage_of(Method.ppo)
    stage.critic.drop_uniform_groups = True
    metrics = METHODS[Method.ppo](fakes.learner(), Rollouts(labelled, None), stage, 0)
    assert fakes.calls == ["values", "logprobs", "improve"]
    assert metrics["critic/rows"] == 0.0


def test_the_reference_when_asked_and_the_engines_word(fakes: Fakes) -> None:
    stage = stage_of(Method.tempo)
    stage.actor.kl_coef = 0.1
    rollouts = rollouts_of()
    assert rollouts.unlabelled is not None
    METHODS[Method.tempo](fakes.learner(), rollouts, stage, 0)
    assert fakes.calls == ["fit", "values", "logprobs", "reference", "improve"]
    improve = fakes.given["improve"]
    assert torch.equal(improve["reference"], rollouts.unlabelled.engine_logprobs - 0.5)
    assert improve["weights"] is None


def test_the_correction_weighs_the_old_policy_against_the_engine(fakes: Fakes) -> None:
    """The fake actor is 0.25 nats below the engine at each token: ratios of e^-0.25, and e^(-0.25 T) of a response."""
    rollouts, stage = rollouts_of(labelled=False), stage_of(Method.tempo, estep_every=0)
    assert rollouts.unlabelled is not None
    stage.actor.correction = CorrectionConfig(CorrectionLevel.sequence, low=math.exp(-1.1), high=2.0)
    metrics = METHODS[Method.tempo](fakes.learner(), rollouts, stage, 0)
    lengths = rollouts.unlabelled.response_lengths.tolist()
    assert min(lengths) < 4 < max(lengths), "some are bounded"
    wanted = [max(math.exp(-0.25 * length), math.exp(-1.1)) for length in lengths]
    assert fakes.given["improve"]["weights"].tolist() == pytest.approx(spread(rollouts.unlabelled, wanted))
    assert metrics["engine/kl_k1"] == pytest.approx(0.25)
    assert metrics["engine/kl_k3"] == pytest.approx(math.exp(-0.25) - 1 + 0.25)
    assert metrics["correction/responses_out_of_bounds"] == pytest.approx(sum(n > 4 for n in lengths) / len(lengths))
    assert metrics["correction/ratio_min"] == pytest.approx(math.exp(-0.25 * max(lengths)))


# Without a critic: one advantage for all tokens of a response


def spread(batch: Batch, advantages: list[float]) -> list[float]:
    """Each response's advantage for each of its tokens."""
    lengths = batch.response_lengths.tolist()
    return [a for a, length in zip(advantages, lengths, strict=True) for _ in range(length)]


def classed(*classes: int, per_prompt: int) -> Batch:
    batch = ragged_batch(len(classes), seed=2, per_prompt=per_prompt, correct=False)
    return replace(batch, answer_class=torch.tensor(classes))


HALF = 0.5 / (math.sqrt(1 / 3) + 1e-6)  # of rewards 1 1 0 0: the mean is 1/2, the variance 4 (1/4) / 3


@pytest.mark.parametrize("divide", [True, False])
def test_grpo_by_hand(fakes: Fakes, divide: bool) -> None:
    batch = replace(ragged_batch(8, per_prompt=4), correct=torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1]))
    stage = stage_of(Method.grpo, group_std=divide)
    metrics = METHODS[Method.grpo](fakes.learner(critic=False), Rollouts(batch, None), stage, 0)
    assert fakes.calls == ["logprobs", "improve"]
    improve = fakes.given["improve"]
    assert improve["batch"] is batch
    half = HALF if divide else 0.5
    wanted = spread(batch, [half, -half, -half, half, 0, 0, 0, 0])
    assert improve["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert metrics["actor/loss"] == 0.25


def test_ttrl_by_hand(fakes: Fakes) -> None:
    """Six vote and four are trained on. First prompt: 0 has three of six, the first four are 0 1 0 -1. In the second
    three of six are 1, of which one is among the first four."""
    polled = classed(0, 1, 0, -1, 2, 0, 0, 1, 0, 2, 1, 1, per_prompt=6)
    stage = stage_of(Method.ttrl, responses_per_prompt=4, vote_responses=6)
    assert stage.samples == 6
    metrics = METHODS[Method.ttrl](fakes.learner(critic=False), Rollouts(None, polled), stage, 0)
    assert fakes.calls == ["logprobs", "improve"]
    improve = fakes.given["improve"]
    batch, rows = improve["batch"], [0, 1, 2, 3, 6, 7, 8, 9]
    assert [row.tolist() for row in batch.rows()] == [list(polled.rows())[i].tolist() for i in rows]
    # Rewards 1 0 1 0; and 0 1 0 0: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4.
    one = 0.25 / (0.5 + 1e-6)
    wanted = spread(batch, [HALF, -HALF, HALF, -HALF, -one, 3 * one, -one, -one])
    assert improve["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert metrics["reward/unlabelled"] == pytest.approx(3 / 8)
    assert metrics["vote/agreement"] == pytest.approx(0.5)
    assert metrics["vote/answered"] == pytest.approx(11 / 12)


def test_ttrl_guard_by_hand(fakes: Fakes) -> None:
    """Question 0 has just flipped: w = 1 - 0.5 and beta = 0.3. Its majority is 0, and 1 has 2/4 >= 1/4: rewards 1 1 0 0
    and 0 0 1 1, so A = 0.5 (0.7 (1/2) - 0.3 (1/2)) = 0.1. Question 1 is new: rewards 1 1 1 0. Question 2 had a contest
    and agrees again: it is left out, as one of three questions may be. Question 3 has flipped, without a minority."""
    polled = classed(0, 0, 1, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, -1, per_prompt=4)
    visits = (
        Visits((0.5, 0.5), (True,)),
        Visits((0.75,), ()),
        Visits((0.5, 0.5, 0.5, 0.75, 0.75), (True, False, False, False)),
        Visits((0.5, 0.75), (True,)),
    )
    stage = stage_of(Method.ttrl_guard, responses_per_prompt=4, group_std=False, skip_probability=1.0)
    metrics = METHODS[Method.ttrl_guard](fakes.learner(critic=False), Rollouts(None, polled, visits), stage, 0)
    assert fakes.calls == ["logprobs", "improve"]
    third = 0.5 * 0.7  # w of question 3: its majority has 0.75 > 0.6
    wanted = [0.1, 0.1, -0.1, -0.1, 0.25, 0.25, 0.25, -0.75, 0, 0, 0, 0]
    wanted += [third * a for a in (0.25, 0.25, 0.25, -0.75)]
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(spread(polled, wanted), abs=1e-6)
    assert metrics["guard/weight"] == pytest.approx((0.5 + 1 + 0 + third) / 4)
    assert metrics["guard/minority"] == 0.25
    assert metrics["guard/left_out"] == 0.25
    assert metrics["reward/unlabelled"] == pytest.approx((2 + 3 + 3 + 3) / 16)


def test_ttrl_guard_without_a_history_is_ttrl(fakes: Fakes) -> None:
    polled = classed(0, 1, 0, -1, 2, 0, 0, 1, 0, 2, 1, 1, per_prompt=6)
    given = {"responses_per_prompt": 4, "vote_responses": 6}
    used = []
    for method, visits in ((Method.ttrl, None), (Method.ttrl_guard, None), (Method.ttrl_guard, (Visits((0.5,)),) * 2)):
        METHODS[method](fakes.learner(critic=False), Rollouts(None, polled, visits), stage_of(method, **given), 0)
        used.append(fakes.given["improve"]["advantages"].tolist())
    assert used[0] == used[1] == used[2]


def test_scrl_by_hand(fakes: Fakes) -> None:
    """Eight vote and four are trained on.

    First prompt: 0 has 4/8, 2 has 2/8, and 4/8 - 2/8 > 1/8, so 0 is the label. 1 has 1/8 < 0.2. H = 4.0 / 8 = 0.5,
    H_0 = 1.2 / 4 = 0.3, H_1 = 1.0: 1 is rare and uncertain. So R of 0 is 0.5 - 0.1 (0.3 - 0.5) = 0.52, and of 1
    (0.125 - 0.2) - 0.1 (1.0 - 0.5) = -0.125. The mean of 0.52 0.52 -0.125 0.52 is 0.35875.
    Second prompt: each answer has 1/4, so there is no label, and none is rare. H = 0.3, so R = -0.1 (H_j - 0.3).
    """
    polled = classed(0, 0, 1, 0, 0, 2, -1, 2, 0, 1, 2, 3, 0, 1, 2, 3, per_prompt=8)
    fakes.of_responses = [0.2, 0.2, 1.0, 0.4, 0.4, 0.6, 0.8, 0.4, *[0.1, 0.3, 0.3, 0.5] * 2]
    stage = stage_of(Method.scrl, responses_per_prompt=4, vote_responses=8, negative_share=0.2, group_std=False)
    assert stage.samples == 8
    metrics = METHODS[Method.scrl](fakes.learner(critic=False), Rollouts(None, polled), stage, 0)
    assert fakes.calls == ["entropies", "logprobs", "improve"]
    improve = fakes.given["improve"]
    assert ids_of(improve["batch"], list(range(8))) == ids_of(polled, [0, 1, 2, 3, 8, 9, 10, 11])
    wanted = spread(improve["batch"], [0.16125, 0.16125, -0.48375, 0.16125, 0.02, 0, 0, -0.02])
    assert improve["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert metrics["labels/positive"] == 0.5
    assert metrics["labels/negative"] == 1 / 16
    assert metrics["answers/token_entropy"] == pytest.approx(0.4)
    assert metrics["reward/unlabelled"] == pytest.approx(1.435 / 8)


def test_empo_by_hand(fakes: Fakes) -> None:
    """Shares 1/2 1/2 1/4 1/4: mean 3/8, variance 4 (1/64) / 3. The entropy is 3/2 ln 2; of the others 0 and ln 4."""
    batch = classed(0, 0, 1, -1, 0, 0, 0, 0, 0, 1, 2, 3, per_prompt=4)
    away = 0.125 / (math.sqrt(1 / 48) + 1e-6)
    wanted = [away, away, -away, -away] + [0.0] * 8
    metrics = METHODS[Method.empo](fakes.learner(critic=False), Rollouts(None, batch), stage_of(Method.empo), 0)
    assert fakes.calls == ["logprobs", "improve"]
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(spread(batch, wanted), abs=1e-6)
    assert metrics["reward/unlabelled"] == pytest.approx((1.5 + 4 + 1) / 12)
    assert metrics["answers/entropy"] == pytest.approx((1.5 + 0 + 2) * math.log(2) / 3)
    assert metrics["answers/rows"] == 12.0


@pytest.mark.parametrize(
    ("low", "high", "prompts"),
    [(0.0, None, {"p0", "p2"}), (None, 1.3, {"p0", "p1"}), (0.1, 1.3, {"p0"}), (1.1, 1.3, set())],
)
def test_empo_leaves_out_prompts_by_their_entropy(
    fakes: Fakes, low: float | None, high: float | None, prompts: set[str]
) -> None:
    batch = classed(0, 0, 1, -1, 0, 0, 0, 0, 0, 1, 2, 3, per_prompt=4)
    stage = stage_of(Method.empo, entropy_low=low, entropy_high=high)
    metrics = METHODS[Method.empo](fakes.learner(critic=False), Rollouts(None, batch), stage, 0)
    assert metrics["answers/rows"] == 4 * len(prompts)
    if not prompts:
        assert fakes.calls == []
        return
    improve = fakes.given["improve"]
    assert set(improve["batch"].prompt_ids) == prompts
    assert sorted(torch.cat(improve["order"]).tolist()) == list(range(4 * len(prompts)))
    away = 0.125 / (math.sqrt(1 / 48) + 1e-6)
    of_prompt = {"p0": [away, away, -away, -away], "p1": [0.0] * 4, "p2": [0.0] * 4}
    wanted = spread(improve["batch"], [a for name in sorted(prompts) for a in of_prompt[name]])
    assert improve["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("divide", [True, False])
def test_intuitor_by_hand(fakes: Fakes, divide: bool) -> None:
    """Responses of 1, 2, 16 and 9 tokens have the certainties 1, 1.5, 8.5 and 5: the mean is 4, the deviations are
    -3, -2.5, 4.5 and 1, and the variance is 36.5 / 3."""
    batch = ragged_batch(4, seed=1, per_prompt=4, correct=False)
    assert batch.response_lengths.tolist() == [1, 2, 16, 9]
    stage = stage_of(Method.intuitor, group_std=divide)
    metrics = METHODS[Method.intuitor](fakes.learner(critic=False), Rollouts(None, batch), stage, 0)
    assert fakes.calls == ["certainty", "logprobs", "improve"]
    std = math.sqrt(36.5 / 3) + 1e-6 if divide else 1.0
    wanted = spread(batch, [-3 / std, -2.5 / std, 4.5 / std, 1 / std])
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert metrics["reward/self_certainty"] == pytest.approx(4)


def test_entropy_minimisation_is_the_entropy_term_alone(fakes: Fakes) -> None:
    """With advantages of 0 the policy loss is -entropy_coef H: its coefficient -1 makes it H."""
    batch, stage = ragged_batch(6, seed=2, correct=False), stage_of(Method.entropy_min)
    metrics = METHODS[Method.entropy_min](fakes.learner(critic=False), Rollouts(None, batch), stage, 0)
    assert fakes.calls == ["logprobs", "improve"]
    improve = fakes.given["improve"]
    assert improve["batch"] is batch
    assert not any(improve["advantages"].tolist())
    assert improve["config"] == replace(stage.actor, entropy_coef=-1.0)
    assert stage.actor.entropy_coef == 0.0, "the stage's own setting stays"
    assert metrics["actor/rows"] == 6.0


# Truncated responses


def cut(batch: Batch, *rows: int) -> Batch:
    """The batch with these responses truncated."""
    stopped = torch.ones(len(batch), dtype=torch.bool)
    stopped[list(rows)] = False
    return replace(batch, stopped=stopped)


def masking(method: Method, **changes: Any) -> StageConfig:
    return stage_of(method, truncated_responses=TruncatedResponses.masked, **changes)


def penalising(method: Method, **changes: Any) -> StageConfig:
    given = {"length_penalty_tokens": 10, "length_penalty": 0.5} | changes
    return stage_of(method, truncated_responses=TruncatedResponses.penalised, **given)


def penalties(batch: Batch) -> list[float]:
    """Half a point at 20 tokens, none up to 10."""
    return [-0.5 * max(0, length - 10) / 10 for length in batch.response_lengths.tolist()]


def ids_of(batch: Batch, rows: list[int]) -> list[list[int]]:
    return [list(batch.rows())[i].tolist() for i in rows]


def test_masked_responses_enter_neither_the_mean_nor_the_spread_of_grpo(fakes: Fakes) -> None:
    """Verdicts 1 0 (0) (1) and 1 (1) (0) 0: without the masked ones each group has one right and one wrong."""
    correct = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 0])
    batch = cut(replace(ragged_batch(8, per_prompt=4), correct=correct), 2, 3, 5, 6)
    metrics = METHODS[Method.grpo](fakes.learner(critic=False), Rollouts(batch, None), masking(Method.grpo), 0)
    improve = fakes.given["improve"]
    assert ids_of(improve["batch"], [0, 1, 2, 3]) == ids_of(batch, [0, 1, 4, 7])
    one = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert improve["advantages"].tolist() == pytest.approx(spread(improve["batch"], [one, -one, one, -one]), abs=1e-6)
    assert metrics["actor/rows"] == 4.0


def test_masked_responses_do_not_vote(fakes: Fakes) -> None:
    """Six responses are sampled. The first two that are not masked are trained on. 1 wins: two of the 0s are masked."""
    polled = cut(classed(0, 0, 0, 1, 1, 2, per_prompt=6), 0, 1)
    stage = masking(Method.ttrl, responses_per_prompt=2, vote_responses=6)
    metrics = METHODS[Method.ttrl](fakes.learner(critic=False), Rollouts(None, polled), stage, 0)
    improve = fakes.given["improve"]
    assert ids_of(improve["batch"], [0, 1]) == ids_of(polled, [2, 3])
    one = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert improve["advantages"].tolist() == pytest.approx(spread(improve["batch"], [-one, one]), abs=1e-6)
    assert metrics["vote/agreement"] == 0.5


def test_masked_responses_have_no_part_in_scrls_labels(fakes: Fakes) -> None:
    """Without the masked 0s, 1 has 2/4 against 1/4, and its two responses are 1, the others 0: mean 1/2 x 2/4."""
    polled = cut(classed(0, 0, 0, 1, 1, 2, per_prompt=6), 0, 1)
    fakes.of_responses = [0.5] * 4
    stage = masking(Method.scrl, responses_per_prompt=4, vote_responses=6, group_std=False)
    METHODS[Method.scrl](fakes.learner(critic=False), Rollouts(None, polled), stage, 0)
    improve = fakes.given["improve"]
    assert ids_of(improve["batch"], [0, 1, 2, 3]) == ids_of(polled, [2, 3, 4, 5])
    wanted = spread(improve["batch"], [-0.25, 0.25, 0.25, -0.25])
    assert improve["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)


def test_masked_responses_are_in_no_cluster(fakes: Fakes) -> None:
    """Of 0 0 1 (1) the shares are 2/3 2/3 1/3; of 0 (1) (2) (3) there is one response, which is all of its group."""
    batch = cut(classed(0, 0, 1, 1, 0, 1, 2, 3, per_prompt=4), 3, 5, 6, 7)
    stage = masking(Method.empo, entropy_low=0.0)
    metrics = METHODS[Method.empo](fakes.learner(critic=False), Rollouts(None, batch), stage, 0)
    improve = fakes.given["improve"]
    assert ids_of(improve["batch"], [0, 1, 2]) == ids_of(batch, [0, 1, 2])
    away = 1 / 9 / (math.sqrt(1 / 27) + 1e-6)  # the mean is 5/9, the variance (2 (1/9)^2 + (2/9)^2) / 2
    assert improve["advantages"].tolist() == pytest.approx(spread(improve["batch"], [away, away, -2 * away]), abs=1e-6)
    assert metrics["reward/unlabelled"] == pytest.approx((5 / 3 + 1) / 4)
    assert metrics["answers/rows"] == 3.0


def test_masked_responses_have_no_certainty_and_no_entropy(fakes: Fakes) -> None:
    """Of 1, 2, 16 and 9 tokens, with the second masked: certainties 1, 8.5 and 5, whose mean is 29/6."""
    batch = cut(ragged_batch(4, seed=1, per_prompt=4, correct=False), 1)
    stage = masking(Method.intuitor, group_std=False)
    METHODS[Method.intuitor](fakes.learner(critic=False), Rollouts(None, batch), stage, 0)
    improve = fakes.given["improve"]
    assert ids_of(improve["batch"], [0, 1, 2]) == ids_of(batch, [0, 2, 3])
    wanted = spread(improve["batch"], [1 - 29 / 6, 8.5 - 29 / 6, 5 - 29 / 6])
    assert improve["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)
    METHODS[Method.entropy_min](fakes.learner(critic=False), Rollouts(None, batch), masking(Method.entropy_min), 0)
    assert ids_of(fakes.given["improve"]["batch"], [0, 1, 2]) == ids_of(batch, [0, 2, 3])


@pytest.mark.parametrize("method", [Method.intuitor, Method.entropy_min])
def test_nothing_is_learnt_if_all_are_masked(fakes: Fakes, method: Method) -> None:
    batch = cut(ragged_batch(4, seed=2, per_prompt=4, correct=False), 0, 1, 2, 3)
    metrics = METHODS[method](fakes.learner(critic=False), Rollouts(None, batch), masking(method), 0)
    assert (fakes.calls, metrics) == ([], {"actor/rows": 0.0})


@pytest.mark.parametrize("method", [Method.ppo, Method.tempo])
def test_the_critic_is_fitted_to_masked_responses_and_the_actor_is_not(fakes: Fakes, method: Method) -> None:
    labelled, unlabelled = cut(ragged_batch(8, seed=1), 1, 6), cut(ragged_batch(6, seed=2, correct=False), 0, 3)
    assert labelled.correct is not None
    given = Rollouts(labelled, None if method is Method.ppo else unlabelled)
    METHODS[method](fakes.learner(), given, masking(method), 0)
    assert fakes.given["fit"]["batch"] is labelled
    improve, batch = fakes.given["improve"], labelled if method is Method.ppo else unlabelled
    rows = batch.stopped.nonzero().flatten()
    left = batch.select(rows)
    assert [row.tolist() for row in improve["batch"].rows()] == ids_of(batch, rows.tolist())
    rewards, fits = (labelled.correct[rows].tolist(), 0) if method is Method.ppo else (ends(batch)[rows].tolist(), 1)
    assert improve["advantages"].tolist() == pytest.approx(expected(left, rewards, fits), abs=1e-5)
    assert sorted(torch.cat(improve["order"]).tolist()) == list(range(len(rows)))


def ends(batch: Batch) -> Tensor:
    """The values of the whole responses, by the fake critic after one fit."""
    return 10 + 0.1 * batch.response_lengths


def test_labelled_rows_in_the_actors_batch_are_masked_too(fakes: Fakes) -> None:
    labelled, unlabelled = cut(ragged_batch(8, seed=1), 1, 6), cut(ragged_batch(6, seed=2, correct=False), 0)
    stage = masking(Method.tempo, actor_on_labelled=True)
    METHODS[Method.tempo](fakes.learner(), Rollouts(labelled, unlabelled), stage, 0)
    wanted = ids_of(unlabelled, [1, 2, 3, 4, 5]) + ids_of(labelled, [0, 2, 3, 4, 5, 7])
    assert [row.tolist() for row in fakes.given["improve"]["batch"].rows()] == wanted


@pytest.mark.parametrize("method", list(Method))
def test_where_all_are_masked_the_actor_stays_as_it_is(fakes: Fakes, method: Method) -> None:
    labelled, unlabelled = cut(ragged_batch(8), *range(8)), cut(classed(0, 0, 1, 0, 1, 1, per_prompt=2), *range(6))
    metrics = METHODS[method](fakes.learner(), Rollouts(labelled, unlabelled), masking(method), 0)
    assert "improve" not in fakes.calls
    assert "logprobs" not in fakes.calls
    assert metrics["actor/rows"] == 0.0
    assert all(math.isfinite(number) for number in metrics.values())


@pytest.mark.parametrize("method", list(Method))
def test_without_truncated_responses_masking_changes_nothing(method: Method) -> None:
    seen = []
    for stage in (stage_of(method), masking(method)):
        fakes = Fakes()
        given = Rollouts(ragged_batch(8), classed(0, 0, 1, 0, 1, 1, per_prompt=2))
        metrics = METHODS[method](fakes.learner(), given, stage, 0)
        seen.append((metrics, fakes.given["improve"]["advantages"].tolist(), fakes.calls))
    assert seen[0] == seen[1]


def test_a_penalty_falls_towards_the_limit_by_hand() -> None:
    """DAPO's own numbers: no penalty up to 16384 tokens, then falling to -1 at 20480."""
    lengths = torch.tensor([1, 16384, 16385, 17408, 18432, 20479, 20480])
    wanted = [0.0, 0.0, -1 / 4096, -0.25, -0.5, -4095 / 4096, -1.0]
    assert length_penalty(lengths, 20480, 4096).tolist() == wanted
    assert length_penalty(torch.tensor([0, 5, 10]), 10, 10).tolist() == [0.0, -0.5, -1.0]


def test_the_penalty_is_in_grpos_rewards_before_the_group_is_compared(fakes: Fakes) -> None:
    batch = replace(ragged_batch(8, per_prompt=4), correct=torch.tensor([1.0, 1, 1, 1, 0, 1, 0, 0]))
    assert batch.correct is not None
    stage = penalising(Method.grpo, group_std=False)
    metrics = METHODS[Method.grpo](fakes.learner(critic=False), Rollouts(batch, None), stage, 0)
    rewards = [a + b for a, b in zip(batch.correct.tolist(), penalties(batch), strict=True)]
    means = [sum(rewards[:4]) / 4] * 4 + [sum(rewards[4:]) / 4] * 4
    wanted = spread(batch, [reward - mean for reward, mean in zip(rewards, means, strict=True)])
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert len(set(rewards[:4])) > 1, "all are right, and some are long"
    assert metrics["reward/length_penalty"] == pytest.approx(sum(penalties(batch)) / 8)


def test_the_penalty_is_added_to_the_certainty(fakes: Fakes) -> None:
    batch = ragged_batch(4, seed=1, per_prompt=4, correct=False)
    stage = penalising(Method.intuitor, group_std=False)
    metrics = METHODS[Method.intuitor](fakes.learner(critic=False), Rollouts(None, batch), stage, 0)
    rewards = [1, 1.5, 8.5 - 0.3, 5]  # the penalty of 16 tokens, 6 of the last 10, is 6/10 of a half
    wanted = spread(batch, [reward - sum(rewards) / 4 for reward in rewards])
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert metrics["reward/self_certainty"] == pytest.approx(4), "without the penalty"


@pytest.mark.parametrize("method", [Method.ttrl, Method.ttrl_guard, Method.scrl, Method.empo])
def test_the_penalty_does_not_change_who_agrees(fakes: Fakes, method: Method) -> None:
    batch, fakes.of_responses = classed(0, 0, 0, 1, per_prompt=4), [0.5] * 4
    stage = penalising(method, group_std=False, responses_per_prompt=4)
    metrics = METHODS[method](fakes.learner(critic=False), Rollouts(None, batch), stage, 0)
    agreed = {Method.empo: [0.75, 0.75, 0.75, 0.25], Method.scrl: [0.75, 0.75, 0.75, 0]}.get(method, [1.0, 1, 1, 0])
    rewards = [a + b for a, b in zip(agreed, penalties(batch), strict=True)]
    wanted = spread(batch, [reward - sum(rewards) / 4 for reward in rewards])
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(wanted, abs=1e-6)
    assert metrics["reward/unlabelled"] == pytest.approx(sum(agreed) / 4), "without the penalty"


@pytest.mark.parametrize("method", [Method.ppo, Method.tempo])
def test_the_penalty_is_in_the_rewards_and_not_in_the_critics_targets(fakes: Fakes, method: Method) -> None:
    rollouts = rollouts_of(unlabelled=method is Method.tempo)
    assert rollouts.labelled is not None
    assert rollouts.labelled.correct is not None
    metrics = METHODS[method](fakes.learner(), rollouts, penalising(method), 0)
    assert fakes.given["fit"]["targets"].tolist() == rollouts.labelled.correct.tolist()
    batch = rollouts.labelled if method is Method.ppo else rollouts.unlabelled
    assert batch is not None
    fits = 0 if method is Method.ppo else 1
    before = rollouts.labelled.correct.tolist() if method is Method.ppo else ends(batch).tolist()
    rewards = [a + b for a, b in zip(before, penalties(batch), strict=True)]
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(expected(batch, rewards, fits), abs=1e-5)
    assert min(penalties(batch)) < 0
    if method is Method.tempo:
        assert metrics["reward/unlabelled_value"] == pytest.approx(sum(before) / len(before)), "without the penalty"


# Which iteration needs what (config.stages.StageConfig), against the calls above


TEMPO = {"estep_every": 1, "value_timing": ValueTiming.after_estep, "actor_on_labelled": False}


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("estep_every", [0, 1, 3])
@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("timing", list(ValueTiming))
@pytest.mark.parametrize("extra", [False, True])
def test_a_method_runs_on_just_the_prompts_that_the_stage_asks_for(
    method: Method, estep_every: int, warmup: int, timing: ValueTiming, extra: bool
) -> None:
    if estep_every == 0 and (warmup or method is Method.ppo):
        return
    critic = NEEDS[method].critic is not None
    changes = {"estep_every": estep_every, "value_timing": timing, "actor_on_labelled": extra}
    if not critic and warmup:
        return
    if method is not Method.tempo and changes != TEMPO:  # settings that only TEMPO has
        return
    stage = stage_of(method, **(changes if method is Method.tempo else {}))
    stage.critic.warmup_iterations = warmup
    for iteration in range(7):
        fakes = Fakes()
        kinds = {kind.name for kind in stage.prompts_at(iteration)}
        rollouts = rollouts_of(labelled="labelled" in kinds, unlabelled="unlabelled" in kinds)
        if NEEDS[method].classes:
            assert rollouts.unlabelled is not None
            classes = torch.arange(len(rollouts.unlabelled)) % 2
            rollouts = replace(rollouts, unlabelled=replace(rollouts.unlabelled, answer_class=classes))
        METHODS[method](fakes.learner(critic=critic), rollouts, stage, iteration)
        assert ("fit" in fakes.calls) == stage.critic_learns(iteration)
        assert ("improve" in fakes.calls) == (not stage.warms_up(iteration))


# Other advantages, E-steps and entropy bonuses


@pytest.mark.parametrize(("value", "fits"), [(0.1, True), (0.5, False)])
@pytest.mark.parametrize("targets", list(CriticTargets))
def test_an_estep_waits_for_the_calibration_error(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch, value: float, fits: bool, targets: CriticTargets
) -> None:
    """Half of the responses are right: a critic that says 0.1 of each errs by 0.4, one that says 0.5 does not err."""
    monkeypatch.setattr(fakes, "values", lambda batch: _constant(fakes, batch, value, targets))
    labelled = replace(ragged_batch(8, seed=1), correct=torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0]))
    stage = stage_of(Method.tempo, estep_when_ece_above=0.3)
    stage.critic.targets = targets
    metrics = METHODS[Method.tempo](fakes.learner(), Rollouts(labelled, rollouts_of().unlabelled), stage, 0)
    assert fakes.calls == ["values", *(["fit"] if fits else []), "values", "logprobs", "improve"]
    assert metrics["critic/ece_before_estep"] == pytest.approx(0.5 - value, abs=1e-6)
    assert metrics["critic/esteps"] == float(fits)
    assert metrics["critic/rows"] == (8.0 if fits else 0.0)
    fakes.calls.clear()
    stage.critic.warmup_iterations = 1
    METHODS[Method.tempo](fakes.learner(), Rollouts(labelled, None), stage, 0)
    assert fakes.calls == ["values", "fit"], "the warm-up is not left out"
    fakes.calls.clear()
    stage = stage_of(Method.tempo, estep_when_ece_above=0.3, estep_every=2)
    METHODS[Method.tempo](fakes.learner(), Rollouts(None, rollouts_of().unlabelled), stage, 1)
    assert fakes.calls == ["values", "logprobs", "improve"], "an iteration without labelled responses has no E-step"


def _constant(fakes: Fakes, batch: Batch, value: float, targets: CriticTargets) -> Tensor:
    fakes.calls.append("values")
    given = value if targets is CriticTargets.zero_one else 2 * value - 1
    return torch.full((len(batch.response_tokens) + len(batch),), given)


def test_a_critic_that_is_not_a_number_is_fitted(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "values", lambda batch: _constant(fakes, batch, math.nan, CriticTargets.zero_one))
    METHODS[Method.tempo](fakes.learner(), rollouts_of(), stage_of(Method.tempo, estep_when_ece_above=0.5), 0)
    assert "fit" in fakes.calls


@pytest.mark.parametrize("timing", list(ValueTiming))
@pytest.mark.parametrize("deviations", [0.5, 1.0, 2.0])
def test_the_reward_is_a_lower_bound_of_the_critics_before_and_after_the_estep(
    fakes: Fakes, timing: ValueTiming, deviations: float
) -> None:
    """The fake critic's values rise by 10 a fit: about the mean of both, each is 5 away."""
    rollouts = rollouts_of()
    assert rollouts.labelled is not None
    assert rollouts.unlabelled is not None
    assert rollouts.labelled.correct is not None
    stage = stage_of(Method.tempo, pessimism=deviations, value_timing=timing, actor_on_labelled=True)
    metrics = METHODS[Method.tempo](fakes.learner(), rollouts, stage, 0)
    assert fakes.calls == ["values", "fit", "values", "logprobs", "improve"]
    fits = 0 if timing is ValueTiming.before_estep else 1
    bounds = [5 + 0.1 * length - 5 * deviations for length in rollouts.unlabelled.response_lengths.tolist()]
    wanted = expected(rollouts.unlabelled, bounds, fits)
    wanted += expected(rollouts.labelled, rollouts.labelled.correct.tolist(), fits)
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(wanted, abs=1e-4)
    assert metrics["reward/disagreement"] == pytest.approx(5.0)
    assert metrics["reward/unlabelled_value"] == pytest.approx(sum(bounds) / len(bounds), abs=1e-4)


def test_without_an_estep_there_is_one_critic_to_ask(fakes: Fakes) -> None:
    stage = stage_of(Method.tempo, pessimism=1.0, estep_every=3)
    metrics = METHODS[Method.tempo](fakes.learner(), rollouts_of(labelled=False), stage, 1)
    assert fakes.calls == ["values", "logprobs", "improve"]
    assert "reward/disagreement" not in metrics
    stage.critic.warmup_iterations = 1
    fakes.calls.clear()
    METHODS[Method.tempo](fakes.learner(), rollouts_of(unlabelled=False), stage, 0)
    assert fakes.calls == ["fit"]


@pytest.mark.parametrize("method", [Method.ppo, Method.tempo])
def test_lambda_returns_of_a_method_with_a_critic(fakes: Fakes, method: Method) -> None:
    """The fake critic's values rise by 0.1 a token, so a token's advantage is 0.1 (1 + lambda + ...), up to the last
    token, whose own step goes to the reward."""
    rollouts = rollouts_of(unlabelled=method is Method.tempo)
    assert rollouts.labelled is not None
    batch = rollouts.labelled if method is Method.ppo else rollouts.unlabelled
    assert batch is not None
    METHODS[method](fakes.learner(), rollouts, stage_of(method, gae_lambda=0.5), 0)
    wanted: list[float] = []
    for i, length in enumerate(batch.response_lengths.tolist()):
        last = 0.1 if batch.correct is None else float(batch.correct[i]) - 0.1 * (length - 1)
        steps = [0.1] * (length - 1) + [last]
        wanted += [sum(0.5**j * step for j, step in enumerate(steps[t:])) for t in range(length)]
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(wanted, abs=1e-4)


def test_the_best_of_two_counts_among_responses_that_are_trained_on(fakes: Fakes) -> None:
    """Values 10 + 0.1 t. Of each prompt the longer response gains; the shorter one gains nothing. A masked response is
    no rival."""
    rollouts, stage = rollouts_of(), masking(Method.tempo, pass_at_k=2)
    assert rollouts.unlabelled is not None
    batch = cut(rollouts.unlabelled, 0)
    metrics = METHODS[Method.tempo](fakes.learner(), Rollouts(rollouts.labelled, batch), stage, 0)
    left, lengths = fakes.given["improve"]["batch"], fakes.given["improve"]["batch"].response_lengths.tolist()
    wanted: list[float] = []
    for i, length in enumerate(lengths):
        others = [n for j, n in enumerate(lengths) if j != i and left.group[j] == left.group[i]]
        floor = max(others, default=0)
        scale = 2 if others else 1
        wanted += [scale * 0.1 * (max(length, floor) - max(t, floor)) for t in range(length)]
    assert fakes.given["improve"]["advantages"].tolist() == pytest.approx(wanted, abs=1e-4)
    best = [10 + 0.1 * max(n for j, n in enumerate(lengths) if left.group[j] == group) for group in left.group.tolist()]
    assert metrics["reward/best_of_k"] == pytest.approx(sum(best) / len(best), abs=1e-4)


def test_the_weight_of_the_entropy_bonus_follows_the_entropy(fakes: Fakes) -> None:
    rollouts, stage = rollouts_of(), stage_of(Method.tempo)
    assert rollouts.unlabelled is not None
    stage.actor.entropy_coef, stage.actor.entropy_target = 0.02, 8.0
    metrics = METHODS[Method.tempo](fakes.learner(), rollouts, stage, 0)
    entropy = float((0.25 - rollouts.unlabelled.engine_logprobs).mean())  # the fake actor's own log-probabilities
    assert metrics["actor/entropy_estimate"] == pytest.approx(entropy)
    assert 0 < entropy < 8
    assert fakes.given["improve"]["config"].entropy_coef == pytest.approx(0.02 * (1 - entropy / 8))
    assert metrics["actor/entropy_coef"] == fakes.given["improve"]["config"].entropy_coef
    assert stage.actor.entropy_coef == 0.02, "the stage's own settings stay"


@pytest.mark.parametrize("method", list(Method))
def test_by_default_nothing_of_this_happens(method: Method) -> None:
    fakes, stage = Fakes(), stage_of(method)
    given = Rollouts(ragged_batch(8), classed(0, 0, 1, 0, 1, 1, per_prompt=2))
    critic = NEEDS[method].critic is not None
    metrics = METHODS[method](fakes.learner(critic=critic), given, stage, 0)
    assert not {"critic/ece_before_estep", "critic/esteps", "reward/best_of_k", "actor/entropy_coef"} & metrics.keys()
    if method is not Method.entropy_min:  # its loss is the entropy term
        assert fakes.given["improve"]["config"] is stage.actor
