"""Which server has which requests: at any time, a request is waiting, with one server, or answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace

import httpx

from megatron_tempo.config.choices import Dispatch
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_checks import checked_completions, reason
from megatron_tempo.rollout.answer_reader import AnswerReader, AskAgain, CannotAnswer, RawAnswers, nothing_yet
from megatron_tempo.rollout.engine import EngineWork, Request, Sampling
from megatron_tempo.rollout.partial_requests import is_unfinished, joined, parts_of
from megatron_tempo.rollout.replica import Answered, Ask, GenerationJob, Replica
from megatron_tempo.rollout.request_queue import RequestQueue
from megatron_tempo.rollout.server_adapter import Call, ServerAdapter
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import Completion

INTERRUPT_SECONDS = 10.0  # in which servers answer requests that are interrupted
AGAIN_SECONDS = 1.0  # before a server that takes no requests for the moment is asked again

# Makes calls to a server, one after the other; a failure counts against the server.
Calls = Callable[[Replica, Sequence[Call]], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Limits:
    """`vocab`: number of tokens that a response may contain."""

    config: ServersConfig
    end_tokens: Sequence[int]
    vocab: int


class Dispatcher:
    """Everything runs in the fleet's event loop. `version`: of the newest weights."""

    def __init__(
        self,
        adapter: ServerAdapter,
        limits: Limits,
        reader: AnswerReader,
        replicas: Sequence[Replica],
        work: EngineWork,
        fault: Callable[[Replica, str], None],
        fail: Callable[[GenerationJob, str], None],
    ) -> None:
        """`work`: gets the times of the jobs. `fault`: is called if a server fails; `fail`: if no server would do."""
        self._adapter, self._limits, self._reader, self._replicas = adapter, limits, reader, replicas
        self._work, self._fault, self._fail = work, fault, fail
        self.waiting = RequestQueue()
        self.version = -1

    def submit(self, requests: Sequence[Request], sampling: Sampling, job: GenerationJob) -> None:
        """Begin to answer requests for a job."""
        if requests and not job.left:
            job.work = self._work.begin()
        asks = [Ask(job, job.asked + i, request, sampling, self.version) for i, request in enumerate(requests)]
        job.asked += len(asks)
        job.left += len(asks)
        if self._limits.config.dispatch is Dispatch.longest_first:
            asks.sort(key=lambda ask: -len(ask.request.token_ids))
        self.waiting.add(job, asks)
        self.dispatch()

    def cancel(self, job: GenerationJob, numbers: Collection[int]) -> None:
        """Cancel these requests of a job, waiting ones and those with a server. Those that are answered stay so."""
        dropped = [ask for ask in job.parked if ask.number in numbers]
        job.parked = [ask for ask in job.parked if ask.number not in numbers]
        dropped += self.waiting.remove(job, numbers)
        for replica in self._replicas:
            dropped += self._take_back(replica, job, numbers)
        job.left -= len(dropped)
        if dropped and not job.left:
            self._work.end(job.work)
        self.dispatch()

    async def interrupt(self, job: GenerationJob, calls: Calls) -> None:
        """End the generation of a job's requests, and keep them from servers until the queue's `go_on`.

        The servers end other jobs' requests too. Those are asked again, from their beginning.
        """
        self.waiting.pause(job)
        busy = [replica for replica in self._replicas if job in {ask.job for ask in replica.asks.values()}]
        for replica in busy:
            replica.interrupted = True
            for other in {ask.job for ask in replica.asks.values()} - {job}:
                self.waiting.put_back(self._take_back(replica, other, range(other.asked)))
        self.dispatch()
        try:
            await self._end_generation(job, busy, calls)
        finally:
            for replica in busy:
                replica.interrupted = False
            self.dispatch()

    async def _end_generation(self, job: GenerationJob, busy: Sequence[Replica], calls: Calls) -> None:
        tasks = [task for replica in busy for task, ask in replica.asks.items() if ask.job is job]
        await asyncio.gather(*(calls(replica, self._adapter.interrupt()) for replica in busy))
        if tasks:
            await asyncio.wait(tasks, timeout=INTERRUPT_SECONDS)
        for replica in self._replicas:  # requests that came to a server after the call: they are sent again
            job.parked += self._take_back(replica, job, range(job.asked))
        self.waiting.pause(job)  # what a server that failed meanwhile has given back
        await asyncio.gather(*(calls(replica, self._adapter.resume()) for replica in busy))

    def dispatch(self) -> None:
        """Send waiting requests to the servers with the lowest load."""
        most = self._limits.config.concurrency
        while self.waiting:
            free = [replica for replica in self._replicas if replica.takes_requests and len(replica.asks) < most]
            if not free:
                return
            replica = min(free, key=lambda replica: replica.load)
            ask = self.waiting.next()
            ask.oldest = self.version
            task = asyncio.get_running_loop().create_task(self._answer(replica, replica.life, ask))
            replica.asks[task] = ask

    def _take_back(self, replica: Replica, job: GenerationJob, numbers: Collection[int]) -> list[Ask]:
        """Take these of a job's requests from a server. Returns those that it had."""
        tasks = [task for task, ask in replica.asks.items() if ask.job is job and ask.number in numbers]
        for task in tasks:
            task.cancel()
        return [replica.asks.pop(task) for task in tasks]

    async def _answer(self, replica: Replica, life: int, ask: Ask) -> None:
        """Let a server answer a request. A failure counts against the server, unless the server rejects the request."""
        task = asyncio.current_task()
        assert task is not None
        try:
            parts = parts_of(ask)
            raw = await asyncio.gather(*(self._raw(replica, part) for part in parts))
            pairs, given = zip(raw, parts, strict=True), (self._limits.vocab, self.version, self._adapter.routing)
            answers = [checked_completions(one, part, *given) for one, part in pairs]
            completions = joined(ask.request, answers)
        except CannotAnswer as error:
            self._fail(ask.job, str(error))
        except (httpx.HTTPError, EngineError) as error:
            if replica.life == life:
                self._fault(replica, reason(error))
            return
        else:
            progress_marker.mark()
            if is_unfinished(completions):
                ask.request = replace(ask.request, begun=tuple(completions))
                ask.job.parked.append(ask)
            else:
                self._finish(ask, completions, max(one.received for one in raw))
        del replica.asks[task]
        self.dispatch()

    async def _raw(self, replica: Replica, part: Ask) -> RawAnswers:
        """A server's answer. One that takes no requests for the moment is asked again, within `answer_seconds`.

        If the job was interrupted meanwhile, the request has no token yet.
        """
        call = self._adapter.generate(part.request, part.sampling, self._limits.end_tokens)
        begun, limit = time.monotonic(), self._limits.config.answer_seconds
        while True:
            try:
                experts = part.sampling.with_experts
                return await self._reader.ask(replica.url, call.path, call.body or {}, with_experts=experts)
            except AskAgain as error:
                if part.job.is_paused:
                    return nothing_yet(part.request.samples)
                if time.monotonic() - begun > limit:
                    raise EngineError(f"{error}, for rollout.servers.answer_seconds={limit:g}") from error
            await asyncio.sleep(AGAIN_SECONDS)

    def _finish(self, ask: Ask, completions: list[Completion], received: float) -> None:
        """A request is answered."""
        job = ask.job
        if job.arrived is not None:
            job.arrived(ask.number, completions)
        job.events.put(Answered(ask.number, completions))
        job.received = max(job.received, received)
        if job.left == 1:
            self._work.end(job.work, job.received)
        job.left -= 1  # last: at 0 nobody waits any longer
