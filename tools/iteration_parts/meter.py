"""Measures the parts of an iteration in one rank: processor time, memory, collective calls and their bytes."""

from __future__ import annotations

import functools
import importlib
import os
import resource
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

# What is measured: a part's name, and the places of the functions that it consists of ("module:name" or
# "module:Class.name", as their callers find them). The time of a part inside another counts only in the inner one.
# Parts marked True are few calls in the main thread: their memory is measured too.
_M = "megatron_tempo."
PARTS: tuple[tuple[str, bool, tuple[str, ...]], ...] = (
    ("ask", True, (f"{_M}training.rollout_requests:RolloutRequests.request",)),
    ("collect", True, (f"{_M}training.rollout_requests:RolloutRequests.generate",)),
    (
        "verify",
        False,
        (
            f"{_M}rollout.verification:Verification.submit",
            f"{_M}rollout.verification:Verification.results",
            f"{_M}rewards.verifiers:Verifiers.verify",
        ),
    ),
    ("share columns", True, (f"{_M}rollout.batches:share_columns",)),
    ("divide rows", True, (f"{_M}training.row_owners:RowOwners.of_iteration",)),
    ("receive rows", True, (f"{_M}training.rollout_requests:receive",)),
    ("dump", False, (f"{_M}rollout.dump:Recorder._attempt", f"{_M}rollout.dump:Recorder.__exit__")),
    ("seen questions", True, (f"{_M}data.seen:Seen.add",)),
    ("values", True, (f"{_M}methods.learner:Learner.values",)),
    ("critic", True, (f"{_M}methods.learner:Learner.fit_critic",)),
    ("actor", True, (f"{_M}methods.learner:Learner.improve_actor",)),
    ("packing", False, (f"{_M}models.trained:micro_batches",)),
    ("exchange", False, (f"{_M}models.trained:sum_over_ranks", f"{_M}models.trained:share_reported")),
    ("record", True, (f"{_M}observability.metrics:Metrics.step", f"{_M}training.trainer:_rollout_metrics")),
    ("sync", True, (f"{_M}training.trainer:Trainer.sync_engine",)),
    ("checkpoint", True, (f"{_M}training.run_state:RunState.checkpoint_if_due",)),
)
_COLLECTIVES = (
    *("all_reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "reduce", "gather"),
    *("scatter", "all_to_all_single", "send", "recv", "isend", "irecv", "barrier"),
)
_HWM, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(slots=True)
class Cost:
    """What a part took in this rank. `memory`: the largest growth of the process's memory during one call, bytes."""

    seconds: float = 0.0  # of processor time
    memory: int = 0
    calls: int = 0  # of collectives
    moved: int = 0  # bytes that this rank received in them


@dataclass(slots=True)
class _Open:
    name: str
    began: float
    start: int = 0  # resident bytes when it began
    top: int = 0


@dataclass(slots=True)
class Meter:
    """The costs by part since the last `take`.

    What no part covers counts as "other" in the main thread and in threads that call parts, and as "other threads" in
    the rest: gloo's, and those that write a checkpoint.
    """

    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    missing: list[str] = field(default_factory=list)
    _local: threading.local = field(default_factory=threading.local)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _elsewhere: dict[str, float] = field(default_factory=dict)  # what `_beside` said at the last `take`

    def install(self) -> None:
        """Wrap the functions of all parts, and torch's collectives. `missing`: places that do not exist."""
        for name, with_memory, places in PARTS:
            for place in places:
                if not self._wrap(place, functools.partial(self.part, name, with_memory)):
                    self.missing.append(place)
        for name in _COLLECTIVES:
            counted = self._counted(name, getattr(distributed_c10d, name))
            setattr(distributed_c10d, name, counted)
            setattr(dist, name, counted)

    def take(self) -> dict[str, Cost]:
        """The costs since the last call. To be called in the main thread."""
        self._charge(self._stack())
        now = _beside()
        with self._lock:
            costs, self.costs = self.costs, defaultdict(Cost)
        for name in ("read answers", "worker processes"):
            costs[name].seconds += now[name] - self._elsewhere.get(name, 0.0)
        known = sum(cost.seconds for name, cost in costs.items() if name != "worker processes")
        costs["other threads"].seconds = max(0.0, now["process"] - self._elsewhere.get("process", 0.0) - known)
        self._elsewhere = now
        return dict(costs)

    @contextmanager
    def part(self, name: str, with_memory: bool) -> Iterator[None]:
        """Count the processor time of this thread inside as part `name`."""
        stack = self._stack()
        self._charge(stack)
        opened = _Open(name, time.thread_time())
        if with_memory:
            opened.start, top = _memory()
            for outer in stack:
                outer.top = max(outer.top, top)
        stack.append(opened)
        try:
            yield
        finally:
            self._charge(stack)
            stack.pop()
            if with_memory:
                _, top = _memory()
                for one in (*stack, opened):
                    one.top = max(one.top, top)
                with self._lock:
                    cost = self.costs[name]
                    cost.memory = max(cost.memory, opened.top - opened.start)

    def _stack(self) -> list[_Open]:
        if not hasattr(self._local, "stack"):
            self._local.stack = [_Open("other", time.thread_time())]
        stack: list[_Open] = self._local.stack
        return stack

    def _charge(self, stack: list[_Open]) -> None:
        """Count the time since the last boundary in the innermost part."""
        now = time.thread_time()
        with self._lock:
            self.costs[stack[-1].name].seconds += now - self._local.__dict__.get("mark", stack[0].began)
        self._local.mark = now

    def _wrap(self, place: str, part: Callable[[], Any]) -> bool:
        module, _, path = place.partition(":")
        try:
            owner: Any = importlib.import_module(module)
            *outer, last = path.split(".")
            for name in outer:
                owner = getattr(owner, name)
            function = getattr(owner, last)
        except (ImportError, AttributeError):
            return False

        @functools.wraps(function)
        def measured(*args: Any, **given: Any) -> Any:
            with part():
                return function(*args, **given)

        setattr(owner, last, measured)
        return True

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*args: Any, **given: Any) -> Any:
            if getattr(self._local, "in_collective", False):  # torch calls it again below a TorchFunctionMode
                return function(*args, **given)
            stack = self._stack()
            with self._lock:
                cost = self.costs[stack[-1].name]
                cost.calls += 1
                cost.moved += _bytes(args[0] if args else next(iter(given.values()), None))
            self._local.in_collective = True
            try:
                return function(*args, **given)
            finally:
                self._local.in_collective = False

        return counted


def _bytes(received: object) -> int:
    """Bytes of a collective's first argument: the tensor, or the list of tensors, that a rank receives."""
    if isinstance(received, torch.Tensor):
        return received.nbytes
    return sum(map(_bytes, received)) if isinstance(received, list) else 0


def _beside() -> dict[str, float]:
    """Processor seconds so far of the thread that talks to servers, of the process, and of its worker processes."""
    clocks = (time.pthread_getcpuclockid(thread.ident) for thread in threading.enumerate() if thread.name == "fleet")
    children = [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]
    ticks = 0
    for pid in children:
        with suppress(OSError):  # it has just ended
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "read answers": sum(time.clock_gettime(clock) for clock in clocks),
        "process": time.process_time(),
        "worker processes": ticks / os.sysconf("SC_CLK_TCK") + ended.ru_utime + ended.ru_stime,
    }


def _memory() -> tuple[int, int]:
    """The process's resident bytes, and their peak since the last call."""
    lines = dict(line.split(":", 1) for line in _HWM.read_text().splitlines() if line.startswith("Vm"))
    _CLEAR.write_text("5")  # resets the peak
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
