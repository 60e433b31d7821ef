"""The answers to prompt groups that are asked ahead: where they arrive, and what the other ranks learn of them.

Servers' answers arrive on the first rank while it does something else (`StreamedAnswers`). All other engines answer on
each rank, when their answers are read (`ReadAnswers`, `ContinuedAnswers`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.rollout.batches import Answers, Collected, failing_together, share_columns
from megatron_tempo.rollout.engine import AnswerStream, Engine, EngineWork, Request, Sampling, StreamsAnswers
from megatron_tempo.rollout.partial_requests import is_unfinished
from megatron_tempo.rollout.verification import Prompt, Verification
from megatron_tempo.types import Completion


@dataclass(frozen=True, slots=True)
class Asking:
    """A prompt that an engine is asked to answer. `key`: the number of the asking, from 0, in order."""

    key: int
    prompt: Prompt
    request: Request
    iteration: int  # that it is asked for: those of an iteration are asked together


# Gets the key of an asking, the version that made the oldest token of its answer, and the answer's tokens. None: the
# version at which it was begun.
Finished = Callable[[int, int | None, int], None]


class Between(Enum):
    """What servers do while nobody reads their answers."""

    runs_on = "runs_on"  # they generate
    has_ended = "has_ended"  # nothing: all that they were asked was read
    interrupted = "interrupted"  # nothing: unfinished responses wait


class GroupAnswers:
    """What all engines have in common: the answers that this rank has, and their verification. Collective."""

    def __init__(self, verification: Verification, finished: Finished) -> None:
        """`finished`: is called with each answer, on the first rank at least. `close` closes `verification`."""
        self._verification, self._finished = verification, finished
        self._completions: dict[int, Sequence[Completion]] = {}

    def ask(self, askings: Sequence[Asking]) -> None:
        """Ask the engine, in order."""
        raise NotImplementedError

    def read(self, enough: Callable[[], bool]) -> None:
        """Wait for answers until `enough` says so.

        For servers it is called on the first rank only, otherwise on all ranks. Raises EngineError on every rank.
        """
        raise NotImplementedError

    def not_begun(self) -> list[int]:
        """Askings that the engine has not begun to answer, by the first rank's knowledge. Not collective."""
        return []

    def collect(self, keys: Sequence[int], prompts: Sequence[Prompt]) -> Collected:
        """The answers to these askings, which all ranks name in the same order, with their verdicts.

        A verifier sees the text of a response without the token at which the engine ended it (`Verification`). Raises
        EngineError on every rank if a verifier fails on one.
        """
        places = {key: place for place, key in enumerate(keys)}
        mine = {key: self._completions.pop(key) for key in keys if key in self._completions}
        verdicts: dict[int, list[float]] = {}
        classes: dict[int, list[int | None]] = {}
        with failing_together():
            verdicts, classes = self._verification.results(mine)
        answers = Answers(
            {places[key]: of for key, of in mine.items()},
            {places[key]: of for key, of in verdicts.items()},
            {places[key]: of for key, of in classes.items()},
        )
        return share_columns(prompts, answers)

    def forget(self, keys: Collection[int]) -> None:
        """The answers to these are not wanted any more."""
        for key in keys:
            self._completions.pop(key, None)
        self._verification.forget(keys)

    def close(self) -> None:
        """End what is under way."""
        self._verification.close()

    def _take(self, asking: Asking, completions: Sequence[Completion]) -> int:
        """Keep an answer and have it verified. Returns its tokens."""
        self._completions[asking.key] = completions
        self._verification.submit(asking.key, asking.prompt, completions)
        return _tokens(completions)


class StreamedAnswers(GroupAnswers):
    """Answers of servers. They are verified as they arrive, while the run trains."""

    def __init__(
        self,
        engine: StreamsAnswers,
        sampling: Sampling,
        verification: Verification,
        finished: Finished,
        *,
        between: Between = Between.runs_on,
    ) -> None:
        """`between`: what the engine does between two calls of `read`."""
        super().__init__(verification, finished)
        self._between = between
        self._asked: dict[int, Asking] = {}  # not answered, on the first rank
        self._stream: AnswerStream = engine.stream(sampling, self._arrived)

    def ask(self, askings: Sequence[Asking]) -> None:
        if dist.get_rank() == 0:
            self._asked |= {asking.key: asking for asking in askings}
        self._stream.add([asking.request for asking in askings])

    def read(self, enough: Callable[[], bool]) -> None:
        all_read = self._between is Between.has_ended
        for key, completions in self._stream.read((lambda: not self._asked) if all_read else enough):
            if self._asked.pop(key, None) is None:  # forgotten after it had arrived
                continue
            self._completions[key] = completions
            made_by = [version for one in completions for version, tokens in one.versions if tokens]
            self._finished(key, min(made_by, default=None), _tokens(completions))
        if self._between is Between.interrupted:
            self._stream.interrupt()

    def not_begun(self) -> list[int]:
        return self._stream.waiting()

    def forget(self, keys: Collection[int]) -> None:
        self._stream.cancel([key for key in keys if self._asked.pop(key, None) is not None])
        super().forget(keys)

    def close(self) -> None:
        self._stream.close()
        super().close()

    def _arrived(self, key: int, completions: Sequence[Completion]) -> None:
        """In the event loop."""
        if (asking := self._asked.get(key)) is not None:
            self._verification.submit(key, asking.prompt, completions)


class ReadAnswers(GroupAnswers):
    """Answers that are generated, or waited for, when they are read, those of an iteration together.

    `in_background`: the engine generates while nobody reads. If it does not, all that it was asked for is read, so that
    the current weights answer it.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        verification: Verification,
        finished: Finished,
        *,
        in_background: bool,
    ) -> None:
        super().__init__(verification, finished)
        self._engine, self._sampling, self._in_background = engine, sampling, in_background
        self._asked: deque[tuple[list[Asking], Iterator[tuple[int, list[Completion]]]]] = deque()

    def ask(self, askings: Sequence[Asking]) -> None:
        for together in _by_iteration(askings):
            answers = self._engine.start([asking.request for asking in together], self._sampling)
            self._asked.append((together, answers))

    def read(self, enough: Callable[[], bool]) -> None:
        while self._asked and not (self._in_background and enough()):
            askings, answers = self._asked.popleft()
            tokens = torch.zeros(len(askings), dtype=torch.int64)
            with failing_together():
                for i, completions in answers:
                    tokens[i] = self._take(askings[i], completions)
            dist.all_reduce(tokens)
            for asking, count in zip(askings, tokens.tolist(), strict=True):
                self._finished(asking.key, None, count)


class ContinuesResponses(Protocol):
    """An engine whose `generate` knows `Request.begun` and `Request.pause_after`."""

    work: EngineWork

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[tuple[int, list[Completion]]]:
        """(index of the request, its completions), for the requests of this rank. Not collective."""
        ...


class ContinuedAnswers(GroupAnswers):
    """Answers of the embedded engine, in rounds, until enough groups are complete. Others continue at the next `read`.

    In a round each unfinished response gets at most `round_tokens` more tokens, on the rank that its key names. So what
    is finished after a round does not depend on the number of ranks.
    """

    def __init__(
        self,
        engine: ContinuesResponses,
        sampling: Sampling,
        verification: Verification,
        finished: Finished,
        round_tokens: int,
    ) -> None:
        super().__init__(verification, finished)
        self._engine, self._sampling, self._round_tokens = engine, sampling, round_tokens
        self._asked: dict[int, Asking] = {}  # not finished; the same on every rank
        self._grown: set[int] = set()  # those of them that have been in a round
        self._begun: dict[int, tuple[Completion, ...]] = {}  # of this rank's

    def ask(self, askings: Sequence[Asking]) -> None:
        self._asked |= {asking.key: asking for asking in askings}

    def read(self, enough: Callable[[], bool]) -> None:
        work = self._engine.work.begin()
        while self._asked and not enough():
            askings = list(self._asked.values())
            tokens = torch.zeros(len(askings), dtype=torch.int64)
            with failing_together():
                self._round(askings, tokens)
            dist.all_reduce(tokens)
            self._grown |= self._asked.keys()
            for asking, count in zip(askings, tokens.tolist(), strict=True):
                if count:
                    del self._asked[asking.key]
                    self._grown.discard(asking.key)
                    self._finished(asking.key, None, count)
        self._engine.work.end(work)

    def not_begun(self) -> list[int]:
        return [key for key in self._asked if key not in self._grown]

    def forget(self, keys: Collection[int]) -> None:
        self._grown.difference_update(keys)
        for key in keys:
            self._asked.pop(key, None)
            self._begun.pop(key, None)
        super().forget(keys)

    def _round(self, askings: Sequence[Asking], tokens: Tensor) -> None:
        """Let this rank's responses grow. `tokens`: int64 [askings], gets the tokens of those that are finished."""
        mine = [i for i, asking in enumerate(askings) if asking.key % dist.get_world_size() == dist.get_rank()]
        requests = [
            replace(askings[i].request, begun=self._begun.get(askings[i].key, ()), pause_after=self._round_tokens)
            for i in mine
        ]
        for place, completions in self._engine.generate(requests, self._sampling):
            asking = askings[mine[place]]
            if is_unfinished(completions):
                self._begun[asking.key] = tuple(completions)
                continue
            self._begun.pop(asking.key, None)
            tokens[mine[place]] = self._take(asking, completions)


def _by_iteration(askings: Iterable[Asking]) -> list[list[Asking]]:
    """Askings for the same iteration together, in order."""
    together: dict[int, list[Asking]] = {}
    for asking in askings:
        together.setdefault(asking.iteration, []).append(asking)
    return list(together.values())


def _tokens(completions: Sequence[Completion]) -> int:
    return sum(len(one.token_ids) for one in completions)
