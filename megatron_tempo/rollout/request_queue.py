"""The requests that no server has, in the order in which servers get them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Sequence

from megatron_tempo.rollout.replica import Ask, GenerationJob


class RequestQueue:
    """Requests of jobs that the trainer waits for go before those of jobs that are ahead. Those of paused jobs wait."""

    def __init__(self) -> None:
        self._waiting: deque[Ask] = deque()

    def __len__(self) -> int:
        """How many requests a server may have now."""
        return len(self._waiting)

    def next(self) -> Ask:
        return self._waiting.popleft()

    def add(self, job: GenerationJob, asks: Sequence[Ask]) -> None:
        """New requests of a job."""
        if job.is_paused:
            job.parked += asks
        elif job.is_ahead:
            self._waiting.extend(asks)
        else:
            self._waiting.extendleft(reversed(asks))

    def put_back(self, asks: Iterable[Ask]) -> None:
        """Requests that a server had: they are the next ones."""
        self._waiting.extendleft(reversed(list(asks)))

    def pause(self, job: GenerationJob) -> None:
        """Keep a job's requests from servers."""
        job.is_paused = True
        job.parked += self.remove(job, range(job.asked))

    def go_on(self, job: GenerationJob) -> None:
        """Let servers have the requests of a paused job."""
        job.is_paused = False
        self._waiting.extend(job.parked)
        job.parked = []

    def remove(self, job: GenerationJob, numbers: Collection[int]) -> list[Ask]:
        """Take these of a job's requests out, if they are waiting."""
        removed = [ask for ask in self._waiting if ask.job is job and ask.number in numbers]
        self._waiting = deque(ask for ask in self._waiting if ask.job is not job or ask.number not in numbers)
        return removed

    def unbegun(self, job: GenerationJob) -> list[int]:
        """The numbers of a job's requests that have no token yet. Callable from any thread."""
        asks = [*self._waiting.copy(), *job.parked.copy()]  # copies are made at once
        asks = [ask for ask in asks if not any(len(one.token_ids) for one in ask.request.begun)]
        return [ask.number for ask in asks if ask.job is job]
