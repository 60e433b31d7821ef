"""What the first rank says to a server in addition to requests: weight updates, sleep and wake, signs of progress.

In the event loop of `fleet.py`, which handles a server that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import httpx

from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_checks import checked, reason
from megatron_tempo.rollout.connections import client_of
from megatron_tempo.rollout.read_back import Selection
from megatron_tempo.rollout.replica import Replica, State
from megatron_tempo.rollout.server_adapter import Call, ServerAdapter
from megatron_tempo.rollout.server_checks import Expected, wrong_weights


class ServerCalls:
    """Calls to servers. `fault` is called with a server that fails at one, and why."""

    def __init__(
        self, adapter: ServerAdapter, config: ServersConfig, key: str, fault: Callable[[Replica, str], None]
    ) -> None:
        self._adapter, self._config, self._key, self._fault = adapter, config, key, fault
        self.gated = False  # whether restarted servers wait for the gate, after they have the weights
        self.out_of_memory = ""  # why the last server that could not wake failed, for errors

    def name(self, replica: Replica) -> str:
        return f"{self._adapter.name} server {replica.index} ({replica.url or 'not started'})"

    def connect(self, replica: Replica, url: str) -> None:
        replica.url = url
        replica.client = client_of(url, self._key, self._config.answer_seconds)

    async def send(self, replica: Replica, call: Call, seconds: float | None = None) -> httpx.Response:
        """The response to a call. Raises httpx.HTTPError, or EngineError if the server refuses."""
        assert replica.client is not None
        timeout = httpx.USE_CLIENT_DEFAULT if seconds is None else httpx.Timeout(seconds)
        if call.body is None:
            response = await replica.client.get(call.path, timeout=timeout)
        else:
            response = await replica.client.post(call.path, json=call.body, timeout=timeout)
        return checked(response, call)

    async def begin_update(self, replica: Replica) -> None:
        """Pause a server and open an update on it. One that sleeps takes the memory of its weights first."""
        if replica.state is State.asleep:
            replica.state = State.waking
            await self._wake(replica, self._adapter.wake_weights())
        if replica.state in (State.empty, State.waking, State.serving):
            await self.run(replica, self._adapter.before_update())

    async def end_update(self, replica: Replica, version: int, expected: Expected, selection: Selection) -> str | None:
        """Close the update of a server that has all buckets, and let it serve, after the gate if there is one.

        Returns what is wrong with its weights, None if nothing is.
        """
        if await self.run(replica, self._adapter.after_update(version)) is None:
            return None
        if replica.state is State.waking and not await self._wake(replica, self._adapter.wake_cache()):
            return None
        wrong = await wrong_weights(self._adapter, partial(self.run, replica), expected, selection)
        if wrong is None:
            return None
        if wrong:
            return f"{self.name(replica)} {wrong}"
        if await self.run(replica, self._adapter.resume()) is None:
            return None
        if replica.state is State.serving:
            replica.restarts = 0
        else:
            replica.waits = self.gated
        replica.state, replica.held = State.serving, replica.waits
        return None

    async def sleep(self, replica: Replica) -> None:
        """Let a server that is awake sleep. If it does not, that is a fault."""
        served = replica.state is State.serving
        if await self.run(replica, self._adapter.sleep()) is not None:
            replica.state, replica.restarts = State.asleep, 0 if served else replica.restarts

    async def begin_asleep(self, replica: Replica) -> None:
        """Let a server that has just been started sleep. Raises httpx.HTTPError or EngineError if it does not."""
        for call in self._adapter.sleep():
            await self.send(replica, call, self._config.update_seconds)

    async def _wake(self, replica: Replica, calls: Sequence[Call]) -> bool:
        """Whether a server took memory of its GPUs again. The trainer has freed what it could before."""
        life, option = replica.life, self._adapter.memory_option
        fix = f"give servers less memory, such as rollout.servers.arguments=['{option}=0.6']"
        try:
            for call in calls:
                await self.send(replica, call, self._config.update_seconds)
        except (httpx.HTTPError, EngineError) as error:
            if replica.life == life:
                why = f"does not get its GPU's memory back: {reason(error)}"
                self.out_of_memory = f"; the last one {why}: {fix}"
                self._fault(replica, f"{why}: {fix}")
        return replica.life == life

    async def run(self, replica: Replica, calls: Sequence[Call]) -> httpx.Response | None:
        """The answer to the last of these calls; None if the server fails at one."""
        life, response = replica.life, None
        try:
            for call in calls:
                response = await self.send(replica, call, self._config.update_seconds)
        except (httpx.HTTPError, EngineError) as error:
            if replica.life == life:
                self._fault(replica, reason(error))
            return None
        return response if replica.life == life else None
