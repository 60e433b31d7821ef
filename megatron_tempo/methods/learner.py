"""The steps that methods combine: fit the critic, compute values, improve the actor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tempo.algorithm.calibration import calibration_error
from megatron_tempo.algorithm.correction import by_staleness, correct
from megatron_tempo.algorithm.correction import metrics as off_policy_metrics
from megatron_tempo.algorithm.entropy import entropy_weight
from megatron_tempo.algorithm.groups import agreeing, votes
from megatron_tempo.algorithm.outcomes import final_values, mixed_groups, value_targets
from megatron_tempo.algorithm.returns import best_of_k, lambda_values
from megatron_tempo.algorithm.truncation import length_penalty
from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.config.truncation import TruncatedResponses
from megatron_tempo.config.updates import ActorUpdateConfig
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.kernels.rows import Rows
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.types import Batch, picked, seed_of


@dataclass(frozen=True, slots=True)
class Visits:
    """The votes on one question, oldest first. Each iteration that trains on the question is a visit.

    >>> Visits(shares=(0.5, 0.375, 0.625), flips=(True, False))
    """

    shares: tuple[float, ...] = ()  # of the responses of each visit, the share with the majority's answer
    flips: tuple[bool, ...] = ()  # of each visit but the first, whether the majority's answer is not the last visit's


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The responses of an iteration. Labelled rows have verdicts. Unlabelled rows have none; for methods that compare
    answers, they have answer classes, and each prompt group has its visits, this one included."""

    labelled: Batch | None
    unlabelled: Batch | None
    visits: Sequence[Visits] | None = None  # of unlabelled prompts, by the number of their group; None: not recorded


@dataclass(frozen=True, slots=True)
class Learner:
    """Actor and critic, and the updates that methods call. `seed` identifies the run, the stage and its iteration."""

    actor: Actor
    critic: Critic | None  # None: no stage of the run has a critic
    reference_logprobs: Callable[[Batch], Tensor]  # reference log-probabilities, for the KL term
    phase: Callable[[str], AbstractContextManager[None]]  # measures the time of the block
    seed: str
    iteration: int  # of the run, from 1 over all stages
    max_response_tokens: int  # the limit at which responses are cut off
    # whether the actor may be trained on rollouts, given its old log-probabilities
    accepts: Callable[[Batch, Tensor], bool] = lambda batch, old: True

    def fit_critic(self, labelled: Batch, stage: StageConfig) -> dict[str, float]:
        """Fit the critic's values to the verdicts (E-step, Eq. 6)."""
        config = stage.critic
        assert self.critic is not None
        rows = critic_rows(labelled, stage)
        batch = labelled if rows is None else labelled.select(rows)
        if len(batch) == 0:
            return {"critic/rows": 0.0}
        assert batch.correct is not None
        order = mini_batches(batch.group, config.mini_batch_prompts, config.epochs, f"{self.seed}/critic")
        with self.phase("critic"):
            targets = value_targets(batch.correct, config.targets)
            metrics = self.critic.update(batch, targets, config, order, self.iteration)
        return metrics | {"critic/rows": float(len(batch))}

    def recalibrate(self, labelled: Batch, stage: StageConfig, iteration: int) -> dict[str, float]:
        """`fit_critic`, with `estep_when_ece_above` only if the calibration error of the final values is above it.

        The error is of these responses, before the fit. `iteration`: of the stage, from 0. In its warm-up the critic is
        always fitted.
        """
        settings = stage.method_settings
        bound, correct = settings.estep_when_ece_above, labelled.correct
        if bound is None:
            return self.fit_critic(labelled, stage)
        assert correct is not None
        values = self.final_values(labelled, self.values(labelled), settings.baseline)
        error = calibration_error(values, correct, stage.critic.targets)
        fits = stage.warms_up(iteration) or not error <= bound  # also if it is NaN
        metrics = {"critic/ece_before_estep": error, "critic/esteps": float(fits)}
        return metrics | (self.fit_critic(labelled, stage) if fits else {"critic/rows": 0.0})

    def values(self, batch: Batch) -> Tensor:
        """The critic's values of every token, of the rows that this rank owns: float32 [T + m], zeros for others."""
        assert self.critic is not None
        with self.phase("values"):
            return self.critic.values(batch)

    def final_values(self, batch: Batch, values: Tensor, baseline: Baseline) -> Tensor:
        """The critic's value of each whole response, on every rank: float32 [n]. `values`: those of `values`.

        `Baseline.reference` reads the value one token earlier (`algorithm.outcomes.final_values`).
        """
        return self.actor.gather(batch, final_values(values, batch.held_responses, baseline))

    def entropies(self, batch: Batch) -> Tensor:
        """The mean over each response's tokens of the actor's entropy, in nats, on every rank: float64 [n]."""
        with self.phase("logprobs"):
            return self._row_means(batch, self.actor.entropies(batch))

    def self_certainty(self, batch: Batch) -> Tensor:
        """The mean over each response's tokens of KL(U || pi), in nats, on every rank: float64 [n]. One pass."""
        with self.phase("logprobs"):
            return self._row_means(batch, self.actor.self_certainty(batch))

    def _row_means(self, batch: Batch, numbers: Tensor) -> Tensor:
        """The means over the tokens of each response, on every rank: float64 [n]. `numbers`: [T], of held rows."""
        return self.actor.gather(batch, Rows.of(batch.held_responses).mean(numbers.double()))

    def penalise(self, rewards: Tensor, batch: Batch, stage: StageConfig) -> tuple[Tensor, dict[str, float]]:
        """The rewards [n] with the stage's length penalty, if it has one, and what there is to record of it."""
        if stage.truncated_responses is not TruncatedResponses.penalised:
            return rewards, {}
        assert stage.length_penalty_tokens is not None, "the config's rules ask for it"
        most, interval = self.max_response_tokens, stage.length_penalty_tokens
        penalty = stage.length_penalty * length_penalty(batch.response_lengths, most, interval)
        return rewards + penalty, {"reward/length_penalty": float(penalty.mean())}

    def reinforce(self, batch: Batch, advantages: Tensor, stage: StageConfig) -> dict[str, float]:
        """Clipped policy gradient with one advantage for all tokens of a response. `advantages`: [n]."""
        nothing = torch.zeros(len(batch.response_tokens) + len(batch.held))
        return self.improve_actor(batch, nothing, advantages, stage)

    def improve_actor(self, batch: Batch, values: Tensor, rewards: Tensor, stage: StageConfig) -> dict[str, float]:
        """Clipped policy gradient with A_t = R - V (M-step, Eq. 11 and 12). `values`: [T + m], `rewards`: [n].

        Without the truncated responses, if the stage masks them. With another advantage, if the method's settings say
        so (`algorithm/returns.py`). Nothing is updated if `accepts` says so.
        """
        config, baseline = stage.actor, stage.method_settings.baseline
        rows = trainable_rows(batch, stage)
        if len(rows) < len(batch):
            places = batch.places[rows]
            values = picked(values, batch.held_responses + 1, places[places >= 0])
            batch, rewards = batch.select(rows), rewards[rows]
        if len(batch) == 0:
            return {"actor/rows": 0.0}
        values, rewards, returned = _returns(batch, values, rewards, stage)
        with self.phase("logprobs"):
            old = self.actor.logprobs(batch)
            reference = self.reference_logprobs(batch) if config.kl_coef > 0 else None
        mean, greatest = self.actor.gap_to_engine(batch, old)
        gaps = {"engine/logprob_gap_mean": mean, "engine/logprob_gap_max": greatest}
        if (agreement := self.actor.routing_agreement()) is not None:
            gaps["engine/routing_agreement"] = agreement
        if not self.accepts(batch, old):
            return gaps | {"actor/rows_dropped": float(len(batch))}
        config, weighted = self._with_entropy_weight(config, batch, old)
        correction = correct(old, batch.engine_logprobs, batch.held_responses, config.correction)
        experience = Experience(
            old_logprobs=old,
            values=values,
            rewards=rewards,
            weights=correction.weights,
            reference_logprobs=reference,
        )
        order = mini_batches(batch.group, config.mini_batch_prompts, config.epochs, f"{self.seed}/actor")
        with self.phase("actor"):
            metrics = self.actor.update(batch, experience, baseline, config, order, self.iteration)
        by_row = self.actor.gather(batch, correction.by_row)
        metrics |= off_policy_metrics(by_row, batch.response_lengths, config.correction.level)
        metrics |= by_staleness(by_row, batch.response_lengths, batch.staleness(self.iteration - 1))
        return metrics | gaps | returned | weighted | {"actor/rows": float(len(batch))}

    def _with_entropy_weight(
        self, config: ActorUpdateConfig, batch: Batch, old: Tensor
    ) -> tuple[ActorUpdateConfig, dict[str, float]]:
        """The settings with the weight of the entropy bonus for this update, and what there is to record of it.

        The entropy is estimated by the tokens' own old log-probabilities, `old` [T]: -log pi has the entropy as its
        mean under pi. So it takes no pass over the batch. Of stale tokens it is a little too high.
        """
        if config.entropy_target is None:
            return config, {}
        by_row = [part.sum() for part in old.double().split(batch.held_responses.tolist())]
        sums = self.actor.gather(batch, torch.stack(by_row) if by_row else torch.zeros(0, dtype=torch.float64))
        entropy = -float(sums.sum() / batch.response_lengths.sum())
        coef = entropy_weight(entropy, config.entropy_coef, config.entropy_target)
        return replace(config, entropy_coef=coef), {"actor/entropy_estimate": entropy, "actor/entropy_coef": coef}


def _returns(
    batch: Batch, values: Tensor, rewards: Tensor, stage: StageConfig
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Values [T + m] and rewards [n] with the advantages that the method's settings ask for, and metrics of them."""
    settings = stage.method_settings
    metrics: dict[str, float] = {}
    if settings.pass_at_k > 1:
        k, lengths = settings.pass_at_k, batch.held_responses
        values, rewards = best_of_k(values, rewards, batch.group, batch.held, lengths, k)
        _, prompt, sizes = batch.group.unique(return_inverse=True, return_counts=True)
        metrics["reward/best_of_k"] = float((rewards / sizes[prompt].clamp(max=k)).mean())
    if settings.gae_lambda < 1:
        values = lambda_values(values, rewards[batch.held], batch.held_responses, settings.gae_lambda)
    return values, rewards, metrics


def iteration_seed(seed: int, stage: str, iteration: int) -> str:
    """What identifies a stage's iteration, from 0, in the seeds of its mini-batches. `seed`: the run's."""
    return f"{seed}/{stage}/{iteration}"


def trainable_rows(batch: Batch, stage: StageConfig) -> Tensor:
    """The rows, int64, that the actor may be trained on: all of them, or those that are not truncated."""
    if stage.truncated_responses is not TruncatedResponses.masked:
        return torch.arange(len(batch))
    return batch.stopped.nonzero().flatten()


def trainable(batch: Batch, stage: StageConfig) -> Batch:
    """The `trainable_rows` of a batch."""
    rows = trainable_rows(batch, stage)
    return batch if len(rows) == len(batch) else batch.select(rows)


def agreeing_groups(batch: Batch, stage: StageConfig, groups: int) -> Tensor:
    """Whether all responses of each prompt group agree: bool [groups], by verdicts, or by classes if there are some.

    Masked responses are not compared. `batch`: only its columns are read.
    """
    rows = trainable_rows(batch, stage)
    labels = batch.answer_class if stage.needs.classes else batch.correct
    assert labels is not None
    return agreeing(labels[rows], batch.group[rows], groups)


def majorities(batch: Batch, stage: StageConfig) -> dict[int, tuple[int | None, float]]:
    """The shortest row with the majority's answer, None if there is no answer, and the majority's share; by group.

    Masked responses do not vote; a group of which all are masked is left out. `batch`: only its columns are read.
    """
    assert batch.answer_class is not None
    rows = trainable_rows(batch, stage)
    group = batch.group[rows]
    won, shares = votes(batch.answer_class[rows], group)
    shortest: dict[int, int | None] = dict.fromkeys(group.unique().tolist())
    winners = rows[won > 0]
    in_order = winners[batch.response_lengths[winners].argsort(stable=True)]
    for row, number in zip(in_order.tolist(), batch.group[in_order].tolist(), strict=True):
        shortest[number] = row if shortest[number] is None else shortest[number]
    return {number: (row, share) for (number, row), share in zip(shortest.items(), shares.tolist(), strict=True)}


def critic_rows(labelled: Batch, stage: StageConfig) -> Tensor | None:
    """The rows that the critic is fitted to, int64; None for all."""
    if not stage.critic.drop_uniform_groups:
        return None
    assert labelled.correct is not None
    return mixed_groups(labelled.correct, labelled.group)


def mini_batches(group: Tensor, prompts: int, epochs: int, seed: str) -> list[Tensor]:
    """Row indices (int64) of each mini-batch: `prompts` prompts with all their rows, shuffled again in each epoch.

    `group`: int64 [n], the prompt of each row. The last mini-batch of an epoch is smaller if the number of prompts is
    not divisible.
    """
    _, prompt, sizes = group.unique(return_inverse=True, return_counts=True)
    rows = prompt.argsort(stable=True).split(sizes.tolist())
    batches = []
    for epoch in range(epochs):
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows), prompts):
            batches.append(torch.cat([rows[i] for i in order[start : start + prompts]]))
    return batches
