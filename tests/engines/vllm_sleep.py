"""Sends calls to vLLM's own handlers of sleep, on its own states, without a GPU. Run by the Python of its environment.

    python vllm_sleep.py '[[PATH, BODY], ...]'

Prints a line of JSON: the status, the answer and the states after each call, and what a worker's memory does. The
handlers, `AsyncLLM`, `EngineCore`, `Executor` and the memory backend are vLLM's; scheduler and workers note calls.
"""

from __future__ import annotations

import asyncio
import json
import sys
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm import device_allocator
from vllm.device_allocator.sleep_mode_backend import CuMemBackend
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.serve.dev.cache.api_router import router as cache
from vllm.entrypoints.serve.dev.sleep.api_router import router
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor


class Workers(Executor):
    """All workers: their calls, and what memory they have by vLLM's backend for CUDA."""

    def __init__(self) -> None:
        self.sleeping_tags: set[str] = set()
        self.calls: list[Any] = []
        self.backend = CuMemBackend()

    def collective_rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[Any]:
        self.calls.append([method, kwargs])
        if method == "sleep":
            self.backend.suspend(kwargs["level"])
        elif method == "wake_up":
            self.backend.resume(kwargs["tags"])
        return [None]

    def _init_executor(self) -> None: ...

    def check_health(self) -> None: ...


class Scheduler:
    pause_state = PauseState.UNPAUSED

    def set_pause_state(self, state: PauseState) -> None:
        self.pause_state = state

    def finish_requests(self, *_: Any) -> None: ...


class Core(EngineCore):
    def __init__(self) -> None:
        self.scheduler: Any = Scheduler()
        self.model_executor = Workers()
        self.resets = 0

    def _reset_caches(self, *_: Any, **__: Any) -> None:
        self.resets += 1

    def reset_prefix_cache(self, *_: Any, **__: Any) -> bool:
        self.resets += 1
        return True


def client_of(core: Core) -> Any:
    """`AsyncLLM`, whose core is in this process."""

    async def nothing(*_: Any) -> None: ...

    async def sleep(level: int, mode: Any) -> None:
        core.sleep(level, mode)

    async def wake(tags: Any) -> bool:
        return core.wake_up(tags)

    async def sleeping() -> bool:
        return core.is_sleeping()

    async def reset(*_: Any) -> bool:
        return core.reset_prefix_cache()

    client = AsyncLLM.__new__(AsyncLLM)
    client.logger_manager = None
    client.renderer = SimpleNamespace(clear_mm_cache_async=nothing, shutdown=lambda: None)
    client.engine_core = SimpleNamespace(
        sleep_async=sleep, wake_up_async=wake, is_sleeping_async=sleeping, reset_prefix_cache_async=reset
    )
    return client


def main() -> None:
    core, kept = Core(), []
    allocator = SimpleNamespace(
        sleep=lambda offload_tags: kept.append(["kept", sorted(offload_tags)]),
        wake_up=lambda tags: kept.append(["back", tags]),
    )
    device_allocator.get_mem_allocator_instance = lambda: allocator
    app = FastAPI()
    app.include_router(router)
    app.include_router(cache)
    app.state.engine_client = client_of(core)
    answers = []
    with TestClient(app, raise_server_exceptions=False) as http:
        for path, body in json.loads(sys.argv[1]):
            answer = http.get(path) if body is None else http.post(path, json=body)
            state = {
                "asleep": sorted(core.model_executor.sleeping_tags),
                "runs": core.scheduler.pause_state is PauseState.UNPAUSED,
                "resets": core.resets,
            }
            answers.append([path, answer.status_code, answer.json() if answer.content else None, state])
    flags = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--enable-sleep-mode"])
    told = {
        "answers": answers,
        "memory": kept,
        "flag": flags.enable_sleep_mode,
        "cpu": current_platform.is_cpu() and current_platform.is_sleep_mode_available(),
    }
    print("TOLD " + json.dumps(told))


if __name__ == "__main__":
    asyncio.set_event_loop(asyncio.new_event_loop())
    main()
