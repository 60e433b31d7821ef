"""Sends calls to SGLang's own handlers of sleep, on its own states, without a GPU. For its environment's Python.

    python sglang_sleep.py '[[PATH, BODY], ...]' BUSY

Prints a line of JSON: the status and the states after each call. The application, the request classes and the
scheduler's weight updater are SGLang's; its memory saver notes calls. `BUSY`: 1 if the scheduler has a request.
"""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.scheduler_components import weight_updater
from sglang.srt.managers.scheduler_components.weight_updater import SchedulerWeightUpdaterManager
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter


class Saver:
    """The memory that is there, by tag; the real one ends the process on a wrong order."""

    def __init__(self) -> None:
        self.paused: list[str] = []
        self.calls: list[list[str]] = []

    def pause(self, tag: str) -> None:
        assert tag not in self.paused, f"{tag} is paused twice"
        self.paused.append(tag)
        self.calls.append(["pause", tag])

    def resume(self, tag: str) -> None:
        self.paused.remove(tag)
        self.calls.append(["resume", tag])


class Scheduler:
    """What the weight updater reads of it."""

    disaggregation_mode = None
    _engine_paused = False

    def __init__(self, *, busy: bool) -> None:
        self.busy, self.flushes = busy, 0

    def is_fully_idle(self, *, ignore_waiting: bool = False) -> bool:
        """A request that is paused waits."""
        return not self.busy or (ignore_waiting and self._engine_paused)

    def flush_cache(self, *_: Any, **__: Any) -> bool:
        idle = self.is_fully_idle(ignore_waiting=self._engine_paused)
        self.flushes += idle
        return idle


class Updater(SchedulerWeightUpdaterManager):
    """SGLang's, with a runner that takes every update."""

    def _select_runners(self, *_: Any) -> Any:
        takes = SimpleNamespace(update_weights_from_tensor=lambda **_: (True, "Success"))
        return [("target", SimpleNamespace(weight_updater=takes))]

    def record_weight_version_after_update(self, *_: Any) -> None: ...


def updater_of(scheduler: Scheduler, saver: Saver) -> Any:
    model = torch.nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(2))
    updater = Updater.__new__(Updater)
    updater.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(model=model))
    updater.draft_worker = updater.metrics_collector = updater.tp_cpu_group = None
    updater.memory_saver_adapter, updater.scheduler = saver, scheduler
    updater.flush_cache, updater.is_fully_idle = scheduler.flush_cache, scheduler.is_fully_idle
    updater.offload_tags, updater.stashed_model_static_state, updater._session = set(), None, None
    return updater


def manager_of(scheduler: Scheduler, updater: Any) -> Any:
    """The tokenizer manager: it hands calls to the scheduler, here in this process."""

    async def pause(obj: Any) -> None:
        scheduler._engine_paused = True

    async def go_on(obj: Any) -> None:
        scheduler._engine_paused = False

    async def flush(timeout_s: float) -> Any:
        return SimpleNamespace(success=scheduler.flush_cache(), message="")

    async def release(obj: Any, request: Any) -> None:
        updater.release_memory_occupation(obj)

    async def resume(obj: Any, request: Any) -> None:
        updater.resume_memory_occupation(obj)

    return SimpleNamespace(
        pause_generation=pause,
        continue_generation=go_on,
        flush_cache=flush,
        release_memory_occupation=release,
        resume_memory_occupation=resume,
    )


def refusal(make: Any) -> str:
    try:
        make()
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> None:
    scheduler, saver = Scheduler(busy=sys.argv[2] == "1"), Saver()
    barriers: list[int] = []
    weight_updater.get_model = lambda: SimpleNamespace(weight_cache_mode="off")
    torch.distributed.barrier = lambda *_, **__: barriers.append(1)
    updater = updater_of(scheduler, saver)
    http_server.set_global_state(SimpleNamespace(tokenizer_manager=manager_of(scheduler, updater)))
    answers = []
    http = TestClient(http_server.app, raise_server_exceptions=False)  # without its lifespan, which starts an engine
    for path, body in json.loads(sys.argv[1]):
        answer = http.post(path, json=body)
        state = {
            "asleep": sorted(saver.paused),
            "runs": not scheduler._engine_paused,
            "flushes": scheduler.flushes,
            "text": answer.text[:300],
        }
        answers.append([path, answer.status_code, state])
    updater.tp_worker.deserialize_own_rank = lambda given: given[0]
    updater._session = weight_updater._WeightUpdateSession(selector="all")
    before = len(barriers)
    request = SimpleNamespace(
        serialized_named_tensors=[None], selector="all", load_format=None, weight_version="1", flush_cache=False
    )
    updater.update_weights_from_tensor(request)
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = parser.parse_args(["--model-path=model", "--enable-memory-saver"])
    told = {
        "answers": answers,
        "memory": saver.calls,
        "barriers_before_an_update_is_answered": len(barriers) - before,
        "saver": given.enable_memory_saver,
        "keeps_weights": given.enable_weights_cpu_backup,
        "without_saver": refusal(lambda: TorchMemorySaverAdapter.create(enable=True)),
    }
    print("TOLD " + json.dumps(told))


if __name__ == "__main__":
    main()
