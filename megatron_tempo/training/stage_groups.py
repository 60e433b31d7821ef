"""The prompt groups of one stage: which are drawn, asked for, asked again, and which an iteration gets.

The first rank decides, and the others follow by the groups' numbers.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.config import schedule
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.routing import recorded_routing
from megatron_tempo.config.sampled import rollout_seed
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.rollout.batches import Collected
from megatron_tempo.rollout.collected_groups import joined_groups, picked_groups
from megatron_tempo.rollout.embedded import EmbeddedEngine
from megatron_tempo.rollout.engine import AnswersOnFirstRank, Engine, Request, Sampling, StreamsAnswers
from megatron_tempo.rollout.group_answers import (
    Asking,
    Between,
    ContinuedAnswers,
    Finished,
    GroupAnswers,
    ReadAnswers,
    StreamedAnswers,
)
from megatron_tempo.rollout.group_buffer import Group, GroupBuffer, Needs, needs_within
from megatron_tempo.rollout.verification import Prompt, Verification
from megatron_tempo.rollout.verifying_nodes import VerifyingNodes
from megatron_tempo.training.refill import Refill
from megatron_tempo.types import seed_of

# With partial rollouts, the embedded engine looks whether it may stop whenever responses have grown by this share of
# the longest one
ROUNDS = 16
HALVES = (Prompts.labelled, Prompts.unlabelled)  # the order within an iteration


@dataclass(slots=True, eq=False)
class Drawn:
    """A prompt that was drawn. `index`: its place in its set. `key`: of its last asking."""

    prompt: Prompt
    index: int
    key: int = -1


_Group = Group[Drawn]


@dataclass(slots=True)
class StageGroups:
    """All methods are collective, unless they say otherwise."""

    config: Config
    streams: Mapping[Prompts, PromptStream[Any]]
    stage_name: str
    stage: StageConfig
    needed: dict[Prompts, list[int]]  # groups of every iteration of the stage
    first_version: int  # of the stage's first iteration
    buffer: GroupBuffer[Drawn]
    answers: GroupAnswers = field(init=False)
    ends: dict[Prompts, list[int]] = field(init=False)  # `needed`, summed over the iterations so far
    training: list[_Group] = field(default_factory=list)  # taken by the iteration under way
    refill: Refill | None = None  # of the iteration under way
    asked: dict[int, _Group] = field(default_factory=dict)  # by the key of the last asking
    keys: int = 0  # askings so far

    def __post_init__(self) -> None:
        self.ends = {half: list(accumulate(counts)) for half, counts in self.needed.items()}

    @classmethod
    def open(
        cls,
        config: Config,
        engine: Engine,
        streams: Mapping[Prompts, PromptStream[Any]],
        stage_name: str,
        stage: StageConfig,
        iteration: int,
        verification: Callable[[VerifyingNodes | None], Verification],
    ) -> StageGroups:
        """`iteration`: the stage's next one; all before it are done."""
        rollout = config.rollout
        in_background = isinstance(engine, StreamsAnswers) and not rollout.is_colocated
        runs_on = rollout.partial_rollouts or in_background
        buffer: GroupBuffer[Drawn] = GroupBuffer(rollout.max_staleness, rollout.stale_groups, runs_on=runs_on)
        needed = {half: groups_needed(stage, half) for half in HALVES}
        for half, counts in needed.items():
            buffer.restore(half, {}, sum(counts[:iteration]), iteration)
        first = schedule.first_step(config, stage_name)
        groups = cls(config, streams, stage_name, stage, needed, first, buffer)
        made = verification(engine.nodes if isinstance(engine, AnswersOnFirstRank) else None)
        groups.answers = answers_of(config, engine, made, groups.finished)
        return groups

    # Asking

    def request(self, iteration: int) -> None:
        """Ask for all that may be asked for at this iteration, at first what became too old."""
        needs, version = self._needs(iteration), self.first_version + iteration
        unasked = [group for half in HALVES for group in self.buffer.groups(half) if group.item.key < 0]  # resumed
        begin = [self.asked[key] for key in self.answers.not_begun() if key in self.asked]
        for group in [*unasked, *begin]:
            group.oldest = version
        again = self._expire(needs, version)
        unasked += self._drawn(needs, version)
        self._ask([*again, *sorted(unasked, key=lambda group: self._slot(group)[:2])])

    def _drawn(self, needs: Needs, version: int) -> list[_Group]:
        """New groups, as many as there is room for."""
        added: list[_Group] = []
        for half in HALVES:
            if room := self.buffer.room(half, needs):
                stream = self.streams[half]
                indices = stream.draw(room)
                added += self.buffer.add(half, map(Drawn, stream.at(indices), indices), version)
        return added

    def finished(self, key: int, oldest: int | None, tokens: int) -> None:
        """An asking is answered. Not collective."""
        if (group := self.asked.pop(key, None)) is not None:
            self.buffer.finish(group, group.oldest if oldest is None else oldest, tokens)

    def _expire(self, needs: Needs, version: int) -> list[_Group]:
        """Drop what is too old for its next use. Returns what is to be asked again."""
        if not self.buffer.runs_on or not self.buffer.max_staleness:
            return []
        stale = self._agreed(self.buffer.stale(version, needs))
        keys = [group.item.key for group in stale]
        for key in keys:
            self.asked.pop(key, None)
        self.answers.forget(keys)
        return self.buffer.expire(stale, version)

    def _ask(self, groups: Sequence[_Group]) -> None:
        """Ask the engine for these groups, in order."""
        askings = []
        for group in groups:
            group.item.key = self.keys
            self.keys += 1
            self.asked[group.item.key] = group
            iteration, _, seed = self._slot(group)
            request = Request(group.item.prompt.token_ids, self.stage.samples, seed)
            askings.append(Asking(group.item.key, group.item.prompt, request, iteration))
        if askings:
            self.answers.ask(askings)

    def _slot(self, group: _Group) -> tuple[int, int, int]:
        """The iteration that a group was drawn for, its place among that one's groups, and the seed of its responses.

        Groups that were drawn in the place of others come after all iterations.
        """
        ends = self.ends[group.half]
        iteration = bisect_right(ends, group.number)
        seed: tuple[object, ...] = (rollout_seed(self.config), self.stage_name)
        if iteration == len(ends):
            place = group.number
            seed = (*seed, "more", group.half.value, place)
        else:
            place = group.number - (ends[iteration - 1] if iteration else 0)
            if group.half is Prompts.unlabelled:
                place += self.needed[Prompts.labelled][iteration]
            seed = (*seed, iteration, "rollout", place)
        return iteration, place, seed_of(*seed, *(("again", group.times) if group.times else ()))

    # Collecting

    def collect(self, iteration: int) -> tuple[Collected, int]:
        """An iteration's groups, labelled ones first, and how many of them are labelled."""
        needs, version = self._needs(iteration), self.first_version + iteration
        groups, collected = self._collect_chosen(needs, version)
        self.refill = Refill.of(self.stage, iteration)
        if self.refill is None:
            self.training = groups
            self.buffer.take(groups)
        else:
            collected = self._refilled(self.refill, groups, collected, needs, version)
        return collected, sum(group.half is Prompts.labelled for group in self.training)

    def _collect_chosen(self, needs: Needs, version: int) -> tuple[list[_Group], Collected]:
        """The groups that meet the needs of `version`, still in the buffer, and their answers."""
        self.answers.read(lambda: self.buffer.chosen(version, needs) is not None)
        chosen = self.buffer.chosen(version, needs) if self._decides else {}
        assert chosen is not None, "the engine has answered all that the iteration needs"
        groups = self._agreed([group for half in HALVES for group in chosen.get(half, ())])
        collected = self.answers.collect([group.item.key for group in groups], [group.item.prompt for group in groups])
        for group in groups:
            self.asked.pop(group.item.key, None)  # on ranks that do not know when it was answered
        return groups, collected

    def _refilled(
        self, refill: Refill, groups: list[_Group], collected: Collected, needs: Needs, version: int
    ) -> Collected:
        """`collected` with other groups in the place of those whose responses agree. All become `training`."""
        training: list[_Group] = []
        whole: Collected | None = None
        while True:
            of_half = [i for i, group in enumerate(groups) if group.half is refill.half]
            first = of_half[0] if of_half else 0
            unwanted = set(refill.unwanted(collected, first, first + len(of_half)))
            kept = [i for i in range(len(groups)) if i not in unwanted]
            part = picked_groups(collected, kept) if unwanted else collected
            whole = part if whole is None else joined_groups(whole, part)
            training += [groups[i] for i in kept]
            self.training = training
            self.buffer.refuse([groups[i] for i in sorted(unwanted)])
            self.buffer.take([groups[i] for i in kept])
            if not unwanted:
                break
            later = {half: [0, *counts[1:]] for half, counts in needs.items()}
            missing = later | {refill.half: [len(unwanted), *needs[refill.half][1:]]}
            self._ask(self._drawn(missing, version))
            groups, collected = self._collect_chosen(missing, version)
        order = sorted(range(len(training)), key=lambda i: (HALVES.index(training[i].half), training[i].number))
        self.training = [training[i] for i in order]
        return whole if order == list(range(len(order))) else picked_groups(whole, order)

    def discard(self) -> None:
        """The iteration is done: its groups are used. Not collective."""
        self.training = []

    def close(self) -> None:
        """End what is under way."""
        self.answers.close()

    # State

    def state(self) -> dict[str, Any]:
        """The groups that are drawn and not used, for a checkpoint. Not collective."""
        return {
            half.value: {
                "next": self.buffer.next_number(half),
                "drawn": sorted(
                    [group.number, group.item.index]
                    for group in [*self.training, *self.buffer.groups(half)]
                    if group.half is half
                ),
            }
            for half in HALVES
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over the groups of `state`, to be asked again. Not collective."""
        for half in HALVES:
            drawn = state[half.value]["drawn"]
            prompts = self.streams[half].at(index for _, index in drawn) if drawn else []
            items = {number: Drawn(prompt, index) for (number, index), prompt in zip(drawn, prompts, strict=True)}
            self.buffer.restore(half, items, state[half.value]["next"], self.first_version)

    def metrics(self) -> dict[str, float]:
        """The groups that there are, and what happened to others since the last call. Right on the first rank."""
        counts = self.buffer.counts.take()
        return {
            "buffer/ready": sum(self.buffer.completed(half) for half in HALVES),
            "buffer/unfinished": sum(self.buffer.unfinished(half) for half in HALVES),
            "buffer/dropped": counts.dropped,
            "buffer/asked_again": counts.asked_again,
            "buffer/tokens_thrown_away": counts.tokens_thrown_away,
        }

    # Agreement between ranks

    @property
    def _decides(self) -> bool:
        return dist.get_rank() == 0

    def _needs(self, iteration: int) -> Needs:
        return needs_within(iteration, self.stage.iterations, self.buffer.max_staleness, self.needed)

    def _agreed(self, groups: Sequence[_Group]) -> list[_Group]:
        """The first rank's groups, on every rank."""
        count = torch.tensor(len(groups))
        dist.broadcast(count, 0)
        places = torch.zeros(int(count), 2, dtype=torch.int64)
        if self._decides:
            for row, group in enumerate(groups):
                places[row] = torch.tensor([HALVES.index(group.half), group.number])
        dist.broadcast(places, 0)
        return [self.buffer.group(HALVES[half], number) for half, number in places.tolist()]


def groups_needed(stage: StageConfig, half: Prompts) -> list[int]:
    """The prompt groups of a half that each iteration of a stage needs."""
    count = stage.count({half})
    return [count if half in stage.prompts_at(iteration) else 0 for iteration in range(stage.iterations)]


def answers_of(config: Config, engine: Engine, verification: Verification, finished: Finished) -> GroupAnswers:
    """How this engine's answers arrive."""
    rollout = config.rollout
    with_experts = recorded_routing(config) is not None
    sampling = Sampling.of(rollout, rollout.max_response_tokens, with_experts=with_experts)
    if isinstance(engine, StreamsAnswers):
        waits = Between.interrupted if rollout.partial_rollouts else Between.has_ended
        between = waits if rollout.is_colocated else Between.runs_on
        return StreamedAnswers(engine, sampling, verification, finished, between=between)
    if rollout.partial_rollouts:
        assert isinstance(engine, EmbeddedEngine), "the config's rules see to it"
        tokens = -(-rollout.max_response_tokens // ROUNDS)
        return ContinuedAnswers(engine, sampling, verification, finished, tokens)
    in_background = isinstance(rollout.engine, Extension)
    return ReadAnswers(engine, sampling, verification, finished, in_background=in_background)
