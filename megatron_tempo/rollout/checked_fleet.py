"""A fleet whose servers are asked, outside of jobs, whether they are as they should be."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import httpx

from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_checks import checked_completions, reason
from megatron_tempo.rollout.answer_reader import CannotAnswer
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.fleet import Fleet
from megatron_tempo.rollout.read_back import EVERYTHING
from megatron_tempo.rollout.replica import Ask, GenerationJob, Replica, State
from megatron_tempo.rollout.server_checks import Expected, weight_differences
from megatron_tempo.types import Completion


class CheckedFleet(Fleet):
    """As `Fleet`: the trainer's thread calls all public methods. They wait for the event loop."""

    def set_gate(self, *, is_there: bool) -> None:
        """Whether restarted servers that have the weights wait for `release`, from now on."""
        self._calls.gated = is_there

    def restarted(self) -> list[int]:
        """The restarted servers that have the weights and wait for `release`."""
        return [replica.index for replica in self._replicas if replica.waits]

    def release(self) -> None:
        """Let the servers that wait answer requests."""

        async def release() -> None:
            for replica in self._replicas:
                if replica.waits:
                    replica.waits = replica.held = False
            self._requests.dispatch()

        self._do(release())

    def probe(
        self, requests: Sequence[Request], sampling: Sampling, *, restarted: bool
    ) -> dict[int, list[list[Completion]]]:
        """The answers of each server that serves, or only of those that wait, by server. One that fails is left out."""

        async def ask() -> dict[int, list[list[Completion]]]:
            number = self._work.begin()
            chosen = [r for r in self._replicas if r.state is State.serving and (r.waits or not restarted)]
            answers = await asyncio.gather(*(self._probed(replica, requests, sampling) for replica in chosen))
            self._work.end(number)
            return {replica.index: one for replica, one in zip(chosen, answers, strict=True) if one is not None}

        return self._do(ask())

    def differences(self, expected: Expected) -> list[tuple[str, float]]:
        """The tensors of the server that differs most, of those that serve: as they arrived, and as installed."""

        async def differences() -> list[tuple[str, float]]:
            serving = [replica for replica in self._replicas if replica.state is State.serving]
            asks = [partial(self._calls.run, replica) for replica in serving]
            found = [await weight_differences(self._adapter, ask, expected, EVERYTHING) for ask in asks]
            return max((one for one in found if one is not None), key=len, default=[])

        return self._do(differences())

    async def _probed(
        self, replica: Replica, requests: Sequence[Request], sampling: Sampling
    ) -> list[list[Completion]] | None:
        """A server's answers to these requests, outside of jobs; None if it fails."""
        life, version, limits = replica.life, self._requests.version, self._limits
        asks = [Ask(GenerationJob(), i, request, sampling, version) for i, request in enumerate(requests)]
        calls = [self._adapter.generate(request, sampling, limits.end_tokens) for request in requests]
        given = (limits.vocab, version, self._adapter.routing)
        try:
            experts = sampling.with_experts
            asked = (self._reader.ask(replica.url, call.path, call.body or {}, with_experts=experts) for call in calls)
            rows = await asyncio.wait_for(asyncio.gather(*asked), self._config.update_seconds)
            pairs = zip(rows, asks, strict=True)
            return [checked_completions(row, ask, *given) for row, ask in pairs]
        except CannotAnswer:
            raise
        except (httpx.HTTPError, EngineError, TimeoutError) as error:
            if replica.life == life:
                self._fault(replica, reason(error))
            return None
