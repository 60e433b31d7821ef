"""The rollouts of a run: draws prompts, asks the engine for responses, and collects and verifies them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tempo.config import schedule
from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.routing import recorded_routing
from megatron_tempo.config.sampled import rollout_seed
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.methods.learner import Rollouts, iteration_seed
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout import dump
from megatron_tempo.rollout.batches import Answers, Collected, Watch, ask, collect, receive, share_columns
from megatron_tempo.rollout.engine import AnswersByServer, Engine, Request, Sampling
from megatron_tempo.rollout.verification import Prompt, Verification
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.training.row_owners import RowOwners
from megatron_tempo.training.stage_groups import StageGroups
from megatron_tempo.training.vote_history import VoteHistory, ballots
from megatron_tempo.types import Batch, LabelledPrompt, UnlabelledPrompt, seed_of

log = logging.getLogger(__name__)

# Prompts for each replica of an engine when the engine is checked.
PARITY_PROMPTS = 4

_NOTHING = Answers({}, {}, {})

_P = TypeVar("_P", LabelledPrompt, UnlabelledPrompt)


@dataclass(slots=True)
class RolloutRequests:
    """The requests of a run to its engine.

    `groups`: those of the stage under way; None before its first iteration and after its last one. `saved`: of the
    checkpoint that the run resumes from, until their stage continues.
    """

    config: Config
    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    verifiers: Verifiers
    labelled: PromptStream[LabelledPrompt] | None
    unlabelled: PromptStream[UnlabelledPrompt] | None
    owners: RowOwners
    groups: StageGroups | None = None
    saved: Mapping[str, Any] | None = None
    votes: VoteHistory = field(init=False)  # on the unlabelled questions, if a stage compares answers
    warned: bool = False  # of replayed rollouts that are trained on as if they were the actor's own

    def __post_init__(self) -> None:
        self.votes = VoteHistory(self.verifiers, self.tokenizer, self.config.rewards.read_unfinished_thoughts)

    def generate(
        self, stage_name: str, stage: StageConfig, iteration: int, recorder: dump.Recorder | None = None
    ) -> Rollouts:
        """Rollouts of an iteration's prompts, labelled and unlabelled in one pass; labelled ones are verified.

        `recorder`: of the rank that writes them to disk, if they are to be written.
        With `rollout.max_staleness` this also asks for rollouts of the stage's next iterations. Servers generate them
        while the run trains on this iteration's. Collective.
        """
        self.request(stage_name, stage, iteration)
        assert self.groups is not None
        collected, labelled = self.groups.collect(iteration)
        self.engine.work.end_with_slowest()
        return self._received(collected, labelled, stage_name, stage, iteration, recorder)

    def request(self, stage_name: str, stage: StageConfig, iteration: int) -> None:
        """Let the engine begin with all that may be asked for at this iteration. Collective."""
        if self.groups is None or self.groups.stage_name != stage_name:
            self.close()
            self.groups = self._open(stage_name, stage, iteration)
        self.groups.request(iteration)

    def _open(self, stage_name: str, stage: StageConfig, iteration: int) -> StageGroups:
        verification = partial(Verification, self.verifiers, self.tokenizer, self._classes_by(stage))
        groups = StageGroups.open(self.config, self.engine, self._streams(), stage_name, stage, iteration, verification)
        if self.saved is not None and self.saved["stage"] == stage_name:
            groups.restore(self.saved["groups"])
        self.saved = None
        return groups

    def replay(self, stage_name: str, stage: StageConfig, iteration: int) -> Rollouts:
        """This iteration's rollouts from the folder `rollout.replay`, without the engine: the first rank reads them."""
        folder = self.config.rollout.replay
        assert folder is not None
        labelled, unlabelled = self._draw(stage, iteration)
        path = dump.path_of(Path(folder), stage_name, iteration + 1)
        classed, is_first = self._classes_by(stage) is not None, dist.get_rank() == 0

        def read() -> Answers:
            if not is_first:
                return _NOTHING
            routing = recorded_routing(self.config)
            return dump.read(path, labelled, unlabelled, stage.samples, classes=classed, routing=routing)

        collected = share_columns([*labelled, *unlabelled], raise_on_all_ranks(read))
        version = schedule.first_step(self.config, stage_name) + iteration
        if is_first and not self.warned and (warning := uncorrected(collected.columns, stage_name, stage, version)):
            log.warning("%s: %s", path, warning)
            self.warned = True
        return self._received(collected, len(labelled), stage_name, stage, iteration, None)

    def recorder(self, stage_name: str, iteration: int) -> dump.Recorder:
        """What writes an iteration's rollouts to the run's folder."""
        path = dump.path_of(Path(self.config.run.dir) / "rollouts", stage_name, iteration + 1)
        return dump.Recorder(path, self.tokenizer)

    def discard_oldest(self) -> None:
        """Forget the prompts of a completed iteration: a resumed run does not request them again."""
        if self.groups is not None:
            self.groups.discard()

    def sample_for_parity(self, step: int, tokens: int, *, restarted: bool) -> tuple[Batch, Tensor] | None:
        """A few responses of at most `tokens`, to compare the engine's log-probabilities with the actor's. Collective.

        Returns also the server that gave each row, int64 [n], -1 if the engine has no servers. Each server is asked
        directly; with `restarted` only those before the gate. None if no server answered.
        """
        config, stream = self.config.rollout, self.labelled or self.unlabelled
        assert stream is not None
        with_experts = recorded_routing(self.config) is not None
        sampling = Sampling.of(config, min(config.max_response_tokens, tokens), with_experts=with_experts)
        seed = (rollout_seed(self.config), "parity", step)
        if not isinstance(self.engine, AnswersByServer):
            prompts: list[Prompt] = [*stream.first(PARITY_PROMPTS * self.engine.replicas)]
            collected = collect(ask(self.engine, prompts, 1, sampling, *seed), self.verifiers, self.tokenizer)
            return self._held(collected.take(0, len(prompts))), torch.full((len(prompts),), -1)
        prompts = [*stream.first(PARITY_PROMPTS)]
        requests = [Request(prompt.token_ids, 1, seed_of(*seed, i)) for i, prompt in enumerate(prompts)]
        answers = self.engine.probe(requests, sampling, restarted=restarted)
        if not answers:
            return None
        completions = dict(enumerate(one for of in answers.values() for one in of))  # of the first rank
        repeated = prompts * len(answers)
        collected = share_columns(repeated, Answers(completions, {}, {})).take(0, len(repeated))
        return self._held(collected), torch.tensor(list(answers)).repeat_interleave(len(prompts))

    def _held(self, collected: Collected) -> Batch:
        """The batch with the rows that this rank owns."""
        owned = self.owners.of_batch(collected.columns)
        return receive(replace(collected, columns=owned), self.owners.held(owned), layers=self.owners.layers)

    def close(self) -> None:
        """End the requests and verifications whose answers are not collected any more."""
        groups, self.groups = self.groups, None
        if groups is not None:
            groups.close()

    def resume_point(self) -> dict[str, Any]:
        """The streams' states for a checkpoint."""
        return {half.value: stream.state() for half, stream in self._streams().items()}

    def asked_ahead(self) -> dict[str, Any] | None:
        """The prompts that were drawn and not trained on, for a checkpoint: `restore`. None if there are none."""
        if self.groups is None:
            return None if self.saved is None else dict(self.saved)
        return {"stage": self.groups.stage_name, "groups": self.groups.state()}

    def restore(self, saved: Mapping[str, Any] | None) -> None:
        """Ask again for the prompts of `asked_ahead` when their stage continues."""
        self.saved = saved

    def metrics(self) -> dict[str, float]:
        """What happened to groups that were asked for ahead, or whose responses agree, since the last call; votes."""
        found = self.votes.metrics()
        if self.groups is None:
            return found
        ahead = self.groups.metrics() if self.config.rollout.max_staleness else {}
        return found | ahead | ({} if self.groups.refill is None else self.groups.refill.metrics())

    def dropped(self, half: Prompts) -> tuple[str, ...]:
        """The ids of the iteration's prompts that were thrown away because their responses agree."""
        refill = None if self.groups is None else self.groups.refill
        return tuple(refill.dropped) if refill is not None and refill.half is half else ()

    def _received(
        self,
        collected: Collected,
        labelled: int,
        stage_name: str,
        stage: StageConfig,
        iteration: int,
        recorder: dump.Recorder | None,
    ) -> Rollouts:
        """The rollouts with the rows that this rank holds. `labelled`: how many of the prompts are, the first ones."""
        total, seed = len(collected.prompts), iteration_seed(self.config.run.seed, stage_name, iteration)
        first = collected.take(0, labelled, verdicts=True) if labelled else None
        second = collected.take(labelled, total, classes=stage.needs.classes) if labelled < total else None
        columns = Rollouts(None if first is None else first.columns, None if second is None else second.columns)
        owned = self.owners.of_iteration(columns, stage, iteration, seed)
        verifier = self._classes_by(stage)

        def received(part: Collected | None, columns: Batch | None, *watching: Watch | None) -> Batch | None:
            if part is None or columns is None:
                return None
            watch = [None if recorder is None else recorder.of(part.prompts, columns), *watching]
            experts = None if recorder is None else recorder.experts
            whole, held = replace(part, columns=columns), self.owners.held(columns)
            return receive(whole, held, _each(watch), layers=self.owners.layers, watch_experts=experts)

        labelled_batch = received(first, owned.labelled)
        if second is None or verifier is None:
            return Rollouts(labelled_batch, received(second, owned.unlabelled))
        found = ballots(second.prompts, second.columns, stage, verifier)
        unlabelled_batch = received(second, owned.unlabelled, self.votes.watch(found, second.columns))
        return Rollouts(labelled_batch, unlabelled_batch, self.votes.add(found, second.prompts, verifier))

    def _draw(self, stage: StageConfig, iteration: int) -> tuple[list[LabelledPrompt], list[UnlabelledPrompt]]:
        needed = stage.prompts_at(iteration)
        return (
            _take(self.labelled, stage.labelled_prompts) if Prompts.labelled in needed else [],
            _take(self.unlabelled, stage.unlabelled_prompts) if Prompts.unlabelled in needed else [],
        )

    def _classes_by(self, stage: StageConfig) -> str | None:
        """The verifier that decides which answers to an unlabelled prompt are equal. None if the method needs none."""
        if not stage.needs.classes:
            return None
        dataset = self.config.data.unlabelled
        assert dataset is not None
        assert dataset.verifier is not None, "the config's rules ask for it"
        return dataset.verifier.name

    def _streams(self) -> dict[Prompts, PromptStream[Any]]:
        streams = {Prompts.labelled: self.labelled, Prompts.unlabelled: self.unlabelled}
        return {half: stream for half, stream in streams.items() if stream is not None}


def uncorrected(columns: Batch, stage_name: str, stage: StageConfig, version: int) -> str | None:
    """What there is to say of replayed rollouts that are older than their iteration, if nothing corrects for it."""
    staleness = int(columns.staleness(version).max()) if len(columns) else 0
    if not staleness or stage.actor.correction.level is not None:
        return None
    age = "an iteration" if staleness == 1 else f"{staleness} iterations"
    return (
        f"has tokens that are {age} old, which the actor is trained on as if they were its own; "
        f"set {stage_name}.actor.correction as in the run that wrote them"
    )


def _each(watching: Sequence[Watch | None]) -> Watch | None:
    """One function that calls these, those that are given."""
    given = [one for one in watching if one is not None]

    def watch(rows: range, tokens: Tensor, logprobs: Tensor) -> None:
        for one in given:
            one(rows, tokens, logprobs)

    return watch if given else None


def _take(stream: PromptStream[_P] | None, count: int) -> list[_P]:
    assert stream is not None, "the config's rules ask for the set that a stage draws from"
    return stream.take(count)
