"""The prompt groups that are asked for and not yet trained on, and which of them an iteration gets.

It knows no clock, engine or process: the trainer's ranks and the simulator run the same class. A version counts the
actor's updates, so the iteration after n others trains version n.

The staleness of a group is the version that is updated with it, minus the version that made its oldest token. With
`max_staleness` k, version v may have asked for the groups of iterations v to v + k and no more. Groups that are trained
on in the order in which they were asked then never exceed k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from megatron_tempo.config.choices import StaleGroups
from megatron_tempo.config.method_settings import Prompts

T = TypeVar("T")

# Of each half, the groups that are needed by the iteration of the current version and by those after it, as far as may
# be asked ahead: see `needs_within`.
Needs = Mapping[Prompts, Sequence[int]]


@dataclass(slots=True, eq=False)
class Group(Generic[T]):
    """A prompt and the responses to it.

    `oldest`: the version that made its oldest token. Until it is complete: the version that it was asked at.
    """

    item: T  # the caller's, such as the prompt
    half: Prompts
    number: int  # its place among its half's groups, from 0, in the order in which they were drawn
    oldest: int
    times: int = 0  # how often it was asked again
    complete: bool = False
    tokens: int = 0  # of its responses, as far as they are known


@dataclass(slots=True)
class Counts:
    """What happened to groups that were not trained on."""

    dropped: int = 0
    asked_again: int = 0
    refused: int = 0  # complete, and not wanted
    tokens_thrown_away: int = 0

    def take(self) -> Counts:
        """The counts since the last call."""
        taken = Counts(self.dropped, self.asked_again, self.refused, self.tokens_thrown_away)
        self.dropped = self.asked_again = self.refused = self.tokens_thrown_away = 0
        return taken


@dataclass(slots=True)
class GroupBuffer(Generic[T]):
    """The groups of one stage, of both halves.

    `runs_on`: whether a group that is unfinished when an iteration's batch is full may continue. Then an iteration gets
    the oldest complete groups. Otherwise it waits for its groups in the order in which they were asked.

    A caller repeats, at each version:

    1. `expire` what is `stale`, and ask the engine again for the groups that it returns;
    2. `room` for each half, then `add` as many groups, and ask the engine for them;
    3. `finish` each group as its last response arrives, until `chosen` has the iteration's groups;
    4. `take` these.
    """

    max_staleness: int
    stale_groups: StaleGroups = StaleGroups.wait
    runs_on: bool = True
    counts: Counts = field(default_factory=Counts)
    _groups: dict[Prompts, dict[int, Group[T]]] = field(default_factory=lambda: {half: {} for half in Prompts})
    _complete: dict[Prompts, int] = field(default_factory=lambda: dict.fromkeys(Prompts, 0))
    _next: dict[Prompts, int] = field(default_factory=lambda: dict.fromkeys(Prompts, 0))

    # What there is

    def groups(self, half: Prompts) -> list[Group[T]]:
        """The groups of a half, in the order in which they were drawn."""
        return [self._groups[half][number] for number in sorted(self._groups[half])]

    def group(self, half: Prompts, number: int) -> Group[T]:
        return self._groups[half][number]

    def next_number(self, half: Prompts) -> int:
        """The number of the next group that is drawn."""
        return self._next[half]

    def completed(self, half: Prompts) -> int:
        """How many groups of a half are complete."""
        return self._complete[half]

    def unfinished(self, half: Prompts) -> int:
        return len(self._groups[half]) - self._complete[half]

    # Asking

    def room(self, half: Prompts, needs: Needs) -> int:
        """How many groups may be drawn and asked for now."""
        return max(0, sum(needs.get(half, ())) - len(self._groups[half]))

    def add(self, half: Prompts, items: Iterable[T], version: int) -> list[Group[T]]:
        """Groups that the engine is asked for now, by the weights of `version`."""
        added = []
        for item in items:
            group = Group(item, half, self._next[half], version)
            self._groups[half][group.number] = group
            self._next[half] += 1
            added.append(group)
        return added

    def restore(self, half: Prompts, numbers: Mapping[int, T], next_number: int, version: int) -> list[Group[T]]:
        """The groups of a run that is resumed, by their numbers: all of them are asked again, at `version`."""
        self._next[half] = next_number
        self._complete[half] = 0
        self._groups[half] = {number: Group(item, half, number, version) for number, item in numbers.items()}
        return self.groups(half)

    def finish(self, group: Group[T], oldest: int, tokens: int) -> None:
        """All responses of a group are there: `tokens` tokens, the oldest one made by version `oldest`."""
        assert not group.complete, "a group is answered once"
        group.complete, group.oldest, group.tokens = True, oldest, tokens
        self._complete[group.half] += 1

    # Choosing

    def chosen(self, version: int, needs: Needs) -> dict[Prompts, list[Group[T]]] | None:
        """The groups that the iteration of `version` is trained on; None if it has to wait for more.

        Nothing is changed: `take` removes them.
        """
        chosen = {}
        for half in Prompts:
            groups = self._chosen_of(half, version, needs.get(half, ()))
            if groups is None:
                return None
            chosen[half] = groups
        return chosen

    def take(self, groups: Iterable[Group[T]]) -> None:
        """Remove the groups that are trained on."""
        for group in groups:
            del self._groups[group.half][group.number]
            self._complete[group.half] -= group.complete

    def refuse(self, groups: Sequence[Group[T]]) -> None:
        """Remove complete groups that are not wanted, and count them. There is room for others in their place."""
        self.take(groups)
        self.counts.refused += len(groups)
        self.counts.tokens_thrown_away += sum(group.tokens for group in groups)

    def expire(self, stale: Iterable[Group[T]], version: int) -> list[Group[T]]:
        """Deal with groups that are `stale`. Returns those to ask again now, at `version`; the others are dropped.

        The engine's work on unfinished ones is the caller's to end.
        """
        again = []
        for group in stale:
            self.counts.tokens_thrown_away += group.tokens
            if self.stale_groups is StaleGroups.drop:
                self.counts.dropped += 1
                self.take([group])
                continue
            self.counts.asked_again += 1
            self._complete[group.half] -= group.complete
            group.complete, group.oldest, group.tokens = False, version, 0
            group.times += 1
            again.append(group)
        return again

    def stale(self, version: int, needs: Needs) -> list[Group[T]]:
        """The groups that exceed the bound at their next use, by the iteration of `version` or a later one."""
        stale = []
        for half in Prompts:
            use = version + _first(needs.get(half, ()), 0)
            stale += [group for group in self.groups(half) if use - group.oldest > self.max_staleness]
        return stale

    def _chosen_of(self, half: Prompts, version: int, needs: Sequence[int]) -> list[Group[T]] | None:
        wanted = needs[0] if needs else 0
        if self._complete[half] < wanted:
            return None
        if not self.runs_on:
            first = self.groups(half)[:wanted]
            return first if all(group.complete for group in first) else None
        if wanted and self.stale_groups is StaleGroups.wait and self._waits_for(half, version, needs):
            return None
        complete = sorted(
            (group for group in self._groups[half].values() if group.complete),
            key=lambda group: (group.oldest, group.number),
        )
        return sorted(complete[:wanted], key=lambda group: group.number)

    def _waits_for(self, half: Prompts, version: int, needs: Sequence[int]) -> bool:
        """Whether one of the groups that this iteration is the last one for is unfinished.

        More of them than it needs cannot be there, unless fewer are needed than were when they were asked for.
        """
        last = version + _first(needs, 1) - self.max_staleness  # an older group exceeds the bound at the next use
        due = sorted(
            (group for group in self._groups[half].values() if group.oldest < last),
            key=lambda group: (group.oldest, group.number),
        )
        return not all(group.complete for group in due[: needs[0]])


def needs_within(
    iteration: int, iterations: int, max_staleness: int, needed: Mapping[Prompts, Sequence[int]]
) -> dict[Prompts, list[int]]:
    """The groups that an iteration of a stage and those after it need, as far as may be asked ahead: `Needs`.

    `needed`: the groups of every iteration of the stage. Nothing is asked for beyond the stage's end.
    """
    end = min(iterations, iteration + max_staleness + 1)
    return {half: list(counts[iteration:end]) for half, counts in needed.items()}


def _first(needs: Sequence[int], start: int) -> int:
    """How many iterations from now, and from `start`, the first one is that needs groups; `start` if none is known."""
    return next((ahead for ahead in range(start, len(needs)) if needs[ahead]), max(start, len(needs)) if start else 0)
