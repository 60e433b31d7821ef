"""The servers as the first rank manages them: which have weights, which have failed or restarted.

Everything runs in one event loop in its own thread. At any time, a request is waiting, with one server, or answered.
When a server fails, its requests wait again, so none is lost and none is counted twice.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Collection, Coroutine, Sequence
from typing import Any, TypeVar

import httpx

from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rollout.answer_checks import reason
from megatron_tempo.rollout.answer_reader import AnswerReader
from megatron_tempo.rollout.dispatcher import Dispatcher, Limits
from megatron_tempo.rollout.engine import EngineWork, Request, Sampling
from megatron_tempo.rollout.gpu_room import GpuRoom
from megatron_tempo.rollout.read_back import EVERYTHING, Selection
from megatron_tempo.rollout.replica import Answered, Event, Failed, GenerationJob, Replica, Starter, State, Target
from megatron_tempo.rollout.server_adapter import ServerAdapter
from megatron_tempo.rollout.server_calls import ServerCalls
from megatron_tempo.rollout.server_checks import Expected
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import EngineHealth

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Fleet:
    """The trainer's thread calls all public methods. They wait for the event loop.

    Requests for responses go through a process of their own (`answer_reader.py`), all others are sent from here.
    """

    def __init__(
        self,
        adapter: ServerAdapter,
        config: ServersConfig,
        starter: Starter,
        replicas: int,
        key: str,
        end_tokens: Sequence[int],
        vocab: int,
        work: EngineWork,
        *,
        sleeps: bool = False,
    ) -> None:
        """`vocab`: number of tokens that a response may contain. `work`: gets the times of the jobs.

        `sleeps`: whether the servers are on the trainer's GPUs, and asleep when they have been started.
        """
        self._adapter, self._config, self._starter = adapter, config, starter
        self._work, self._sleeps, self._room = work, sleeps, GpuRoom()
        self._calls = ServerCalls(adapter, config, key, self._fault)
        self._replicas = [Replica(i) for i in range(replicas)]
        self._jobs: set[GenerationJob] = set()
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = AnswerReader(adapter.answer_format, key, config.answer_seconds, adapter.routing)
        self._limits = Limits(config, end_tokens, vocab)
        self._requests = Dispatcher(adapter, self._limits, self._reader, self._replicas, work, self._fault, self._fail)
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet", daemon=True)
        self._thread.start()

    def open(self) -> None:
        """Start all servers. Raises InputError if one does not start, since then its configuration is wrong."""
        self._do(self._open())

    def submit(
        self, requests: Sequence[Request], sampling: Sampling, job: GenerationJob | None = None
    ) -> GenerationJob:
        """Begin to answer requests, by all servers that have the weights, for this job or one of their own."""

        async def begin(job: GenerationJob) -> GenerationJob:
            self._jobs.add(job)
            self._requests.submit(requests, sampling, job)
            self._fail_if_none_is_left()
            return job

        return self._do(begin(GenerationJob() if job is None else job))

    def next(self, job: GenerationJob, seconds: float) -> Answered | Failed | Event:
        """The next event of a job, or `nothing` after `seconds`."""
        if self._wants_weights():
            return Event.weights_wanted
        try:
            event = job.events.get(timeout=seconds)
        except queue.Empty:
            return Event.nothing
        return Event.nothing if event is Event.weights_wanted and not self._wants_weights() else event

    def finish(self, job: GenerationJob) -> None:
        """Forget a job and cancel its requests."""

        async def finish() -> None:
            self._jobs.discard(job)
            self._requests.cancel(job, range(job.asked))
            self._work.end(job.work)  # of a job that failed

        self._do(finish())

    def cancel(self, job: GenerationJob, numbers: Collection[int]) -> None:
        """Cancel these requests of a job. Those that are answered stay so."""

        async def cancel() -> None:
            self._requests.cancel(job, numbers)

        self._do(cancel())

    def waiting(self, job: GenerationJob) -> list[int]:
        """The requests of a job that have no token yet, as far as is known."""
        return self._requests.waiting.unbegun(job)

    def interrupt(self, job: GenerationJob) -> None:
        """End the generation of a job's requests. Their unfinished responses keep their tokens until `go_on`."""
        self._do(self._requests.interrupt(job, self._calls.run))

    def go_on(self, job: GenerationJob) -> None:
        """Take up the requests of an interrupted job."""

        async def go_on() -> None:
            self._requests.waiting.go_on(job)
            self._requests.dispatch()

        self._do(go_on())

    def begin_update(self, *, empty_only: bool) -> list[Target]:
        """Pause the servers that are to get weights, and open an update on each."""

        async def begin() -> list[Target]:
            if self._sleeps:
                await self._room.close()
            states = (State.empty, State.asleep) if empty_only else (State.empty, State.asleep, State.serving)
            chosen = [replica for replica in self._replicas if replica.state in states]
            targets = [Target(replica.index, replica.life, replica.url) for replica in chosen]
            for replica in chosen:
                replica.held = True
            await asyncio.gather(*(self._calls.begin_update(replica) for replica in chosen))
            return [target for target in targets if self._replicas[target.index].life == target.life]

        return self._do(begin())

    def end_update(
        self,
        targets: Sequence[Target],
        failed: dict[int, str],
        version: int,
        expected: Expected,
        selection: Selection = EVERYTHING,
    ) -> str | None:
        """Close the update on servers that took all buckets, resume them, and fail those in `failed`.

        `expected`: the checksums to compare, if any: of all tensors that arrived, and of the selected ones that are
        installed. Returns what is wrong with a server's weights, None if nothing is.
        """

        async def end() -> str | None:
            self._requests.version = version
            done = []
            for target in targets:
                replica = self._replicas[target.index]
                if replica.life == target.life and target.index in failed:
                    self._fault(replica, failed[target.index])
                elif replica.life == target.life:
                    done.append(replica)
            ends = (self._calls.end_update(replica, version, expected, selection) for replica in done)
            wrong = await asyncio.gather(*ends)
            self._room.open()
            self._requests.dispatch()
            return next((words for words in wrong if words), None)

        return self._do(end())

    def sleep(self) -> None:
        """Let all servers give their memory back. One that does not is ended, and starts again when there is room.

        A job that a server is answering fails. Requests that wait are answered when the servers are awake again.
        """

        async def lay_down() -> None:
            for job in {ask.job for replica in self._replicas for ask in replica.asks.values()}:
                self._fail(job, "the engine was put to sleep while it answered requests")
            await self._room.close()
            awake = [replica for replica in self._replicas if replica.state in (State.empty, State.serving)]
            await asyncio.gather(*(self._calls.sleep(replica) for replica in awake))
            for replica in self._replicas:
                if replica.state is State.waking:
                    self._fault(replica, "has not got all weights")
            await self._room.close()  # those that failed have ended

        self._do(lay_down())

    def none_is_left(self) -> bool:
        return all(replica.state is State.gone for replica in self._replicas)

    def loss(self) -> str:
        """What is said if none is left."""
        return f"no {self._adapter.name} server is left{self._calls.out_of_memory}"

    def health(self) -> list[EngineHealth]:
        """The state of each server. It does not wait for the event loop; callable from any thread."""
        name = self._adapter.name
        return [
            EngineHealth(f"{name} server {r.index}", r.state.value, len(r.asks), r.restarts, r.url)
            for r in self._replicas
        ]

    def close(self) -> None:
        async def end() -> None:
            for task in [*self._tasks, *(task for replica in self._replicas for task in replica.asks)]:
                task.cancel()
            for replica in self._replicas:
                if replica.client is not None:
                    await replica.client.aclose()
            await self._reader.close()

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # In the event loop

    def _do(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _open(self) -> None:
        await self._reader.open()
        starts = [self._start(replica) for replica in self._replicas]
        for error in await asyncio.gather(*starts, return_exceptions=True):
            if isinstance(error, EngineError):
                raise InputError(str(error))
            if isinstance(error, BaseException):
                raise error

    async def _start(self, replica: Replica) -> None:
        """Start a server. One that sleeps does so at once: it comes up with all its memory, and without weights.

        Raises EngineError.
        """
        self._calls.connect(replica, await self._starter.start(replica.index))
        try:
            if self._sleeps:
                await self._calls.begin_asleep(replica)
        except (httpx.HTTPError, EngineError) as error:
            await self._starter.end(replica.index)
            raise EngineError(f"{self._calls.name(replica)} does not sleep: {reason(error)}") from error
        replica.state = State.asleep if self._sleeps else State.empty
        self._spawn(self._watch(replica, replica.life))

    async def _watch(self, replica: Replica, life: int) -> None:
        """Check whether a server that has requests makes progress."""
        limit = self._config.hang_seconds
        beat, since = None, time.monotonic()
        while replica.life == life:
            await asyncio.sleep(min(5.0, limit / 4))
            if not replica.asks or replica.held:
                since = time.monotonic()
                continue
            try:
                new = self._adapter.progress_of((await self._calls.send(replica, self._adapter.progress, limit)).text)
                if new is None or new != beat:
                    beat, since = new, time.monotonic()
                    progress_marker.mark()
            except (httpx.HTTPError, EngineError):
                pass  # no progress seen
            if replica.life == life and replica.asks and time.monotonic() - since > limit:
                self._fault(replica, f"makes no progress for rollout.servers.hang_seconds={limit:g}")

    def _fault(self, replica: Replica, why: str) -> None:
        """Handle a failed server: its requests wait again, and it is restarted."""
        if replica.state in (State.starting, State.gone):
            return
        asks = list(replica.asks.values())
        for task in replica.asks:
            if task is not asyncio.current_task():
                task.cancel()
        replica.asks = {}
        self._requests.waiting.put_back(asks)
        again = f"; its {len(asks)} unfinished requests are asked again" if asks else ""
        log.warning("%s %s%s", self._calls.name(replica), why, again)
        replica.state, replica.held, replica.interrupted, replica.waits = State.starting, False, False, False
        replica.life += 1
        if replica.client is not None:
            self._spawn(replica.client.aclose())
        if self._sleeps:
            self._room.begin(self._starter.end(replica.index))
        if replica.restarts < self._config.restarts:
            self._spawn(self._revive(replica))
        else:  # at once: the sender of weights asks now whether a server is left
            self._give_up(replica)
        self._requests.dispatch()

    async def _revive(self, replica: Replica) -> None:
        begun = time.monotonic()
        while replica.restarts < self._config.restarts:
            await self._room.wait()
            replica.restarts += 1
            try:
                await self._room.begin(self._start(replica))
            except EngineError as error:
                log.warning("%s does not start again: %s", self._calls.name(replica), error)
                continue
            log.warning("%s is back after %.1f s", self._calls.name(replica), time.monotonic() - begun)
            for job in self._jobs:
                job.events.put(Event.weights_wanted)
            return
        self._give_up(replica)

    def _wants_weights(self) -> bool:
        """Whether a server should get weights now. One that sleeps waits for the next update if others serve."""
        states = {replica.state for replica in self._replicas}
        idle = State.asleep in states and State.serving not in states and not self._room.in_use
        return State.empty in states or idle

    def _give_up(self, replica: Replica) -> None:
        replica.state = State.gone
        name, restarts = self._calls.name(replica), self._config.restarts
        log.warning("%s is given up after rollout.servers.restarts=%d", name, restarts)
        self._fail_if_none_is_left()

    def _fail_if_none_is_left(self) -> None:
        if self.none_is_left():
            for job in self._jobs:
                self._fail(job, self.loss())

    def _fail(self, job: GenerationJob, why: str) -> None:
        self._requests.waiting.remove(job, range(job.asked))
        job.events.put(Failed(why))
