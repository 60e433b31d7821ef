"""When servers on the trainer's GPUs may take memory there (`rollout.placement=colocated`)."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class GpuRoom:
    """Open while the trainer has lent the GPUs, except during a weight update, when both sides hold weights.

    For the event loop of one thread.
    """

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def in_use(self) -> bool:
        """Whether a server is about to take memory or to give it back. Callable from any thread."""
        return bool(self._tasks)

    def begin(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start or end a server. `close` waits for it."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def wait(self) -> None:
        """Wait until it is open. It still is when the caller continues."""
        while not self._open.is_set():
            await self._open.wait()

    def open(self) -> None:
        self._open.set()

    async def close(self) -> None:
        """No server begins to take memory from now on. Waits for those that are about to."""
        self._open.clear()
        while self._tasks:
            await asyncio.wait(self._tasks)
