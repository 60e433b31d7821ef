"""The trainer's side of `math_worker` processes: requests, time limits, and counts of failed items."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections import Counter
from typing import Any, Literal

from megatron_tempo.rewards.worker_process import end, start
from megatron_tempo.runtime import progress_marker

MEMORY_MB = 1024  # address space of a worker, MiB
START_SECONDS = 120.0  # for Python and sympy to load, on a busy machine
RECYCLE_SECONDS = 20.0  # for a child to fork, on a busy machine

Reply = dict[str, Any]


class Worker:
    """One process of `math_worker`, restarted when it dies. Only one thread may use it at a time.

    A child that takes too long is killed and replaced within milliseconds. `counts`: "timeouts" are items that took too
    long, "failures" are items that took too much memory or ended their child.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._child: int | None = None  # the pidfd of the process that answers
        self._read = b""
        self.counts: Counter[str] = Counter()
        self.has_started = False
        self._asked = 0

    def correct(self, answer: str, response: str) -> bool:
        """Whether the response is right. It is wrong if it takes too long or kills the worker."""
        reply = self.ask({"answer": answer, "response": response})
        return reply is not None and bool(reply["correct"])

    def read(self, response: str) -> Reply | None:
        """The answer of a response (`math_worker`); None if it has none or cannot be read in time."""
        reply = self.ask({"read": response})
        return None if reply is None or reply["statement"] is None else reply

    def equal(self, one: list[Any], other: list[Any], by: Literal["any", "face", "value"]) -> bool | None:
        """Whether two statements are equal (`math_equal.matches`); None if that takes too long."""
        reply = self.ask({"equal": [one, other], "by": by})
        return None if reply is None else bool(reply["equal"])

    def parsed(self, answer: str) -> bool:
        """Whether an answer can equal more than its own spelling."""
        reply = self.ask({"gold": answer})
        return reply is not None and bool(reply["parsed"])

    def ask(self, request: dict[str, Any]) -> Reply | None:
        """The reply; None if the request takes too long or too much memory, or kills the worker.

        Raises RuntimeError if no worker can start.
        """
        progress_marker.mark()
        for _ in range(2):
            self._ensure()
            self._asked += 1
            request["id"] = self._asked  # the successor of a killed child may answer the previous request
            try:
                reply = self._exchange(request)
            except TimeoutError:
                self.counts["timeouts"] += 1
                self._recycle()
                return None
            if reply is None:  # the whole worker is gone
                self.close()
                continue
            if "ready" in reply:  # the child is gone, and this is its successor
                self._adopt(reply)
                # Killed from outside, perhaps by the kernel for lack of memory: perhaps not by this item, so retry.
                if reply["ended"] == -signal.SIGKILL:
                    continue
                break
            if reply["retire"]:
                self._recycle()
            if not reply["exhausted"]:
                return reply
            break
        self.counts["failures"] += 1
        return None

    def close(self) -> None:
        process, self._process, self._read = self._process, None, b""
        if process is None:
            return
        end(process, self._kill_child)
        self._kill_child()  # it still runs if only the worker was killed
        self._forget_child()

    def _ensure(self) -> None:
        """Start a worker unless one is ready."""
        if self._process is not None and self._process.poll() is None and self._has_heard_all():
            return
        self.close()
        process = self._process = _start(self._seconds)
        self.has_started = True
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        try:
            ready = self._line(time.monotonic() + START_SECONDS)
        except TimeoutError:
            ready = None
        if ready is None:
            process.kill()
            self.close()
            raise RuntimeError(
                f"the math worker ended with code {process.returncode} before it was ready; its error is on stderr"
            )
        self._adopt(ready)

    def _has_heard_all(self) -> bool:
        """Read the messages about children that were killed while idle. False if the worker is gone."""
        assert self._process is not None
        try:
            while (line := self._line(time.monotonic())) is not None:
                if "ready" in line:
                    self._adopt(line)
        except TimeoutError:  # no more messages
            return True
        return False

    def _adopt(self, ready: Reply) -> None:
        self._forget_child()
        with contextlib.suppress(ProcessLookupError):  # already gone; its successor will report it
            self._child = os.pidfd_open(ready["ready"])

    def _forget_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            os.close(child)

    def _kill_child(self) -> None:
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._child, signal.SIGKILL)

    def _recycle(self) -> None:
        """Replace the child by a fresh one, or the worker if that fails."""
        self._kill_child()
        deadline = time.monotonic() + RECYCLE_SECONDS
        try:
            while (line := self._line(deadline)) is not None:
                if "ready" in line:  # a late reply may come before it
                    self._adopt(line)
                    return
        except TimeoutError:
            assert self._process is not None
            self._process.kill()
        self.close()

    def _exchange(self, request: dict[str, Any]) -> Reply | None:
        """The line that follows a request; None if the worker is gone. TimeoutError after the item's time limit."""
        assert self._process is not None
        assert self._process.stdin is not None
        deadline = time.monotonic() + self._seconds
        place, rest = self._process.stdin.fileno(), memoryview(json.dumps(request).encode() + b"\n")
        try:
            while rest:
                _wait(place, select.POLLOUT, deadline)
                rest = rest[os.write(place, rest) :]
        except BrokenPipeError:
            return None
        while (reply := self._line(deadline)) is not None:
            if "ready" in reply or reply["id"] == request["id"]:
                return reply
        return None

    def _line(self, deadline: float) -> Reply | None:
        assert self._process is not None
        assert self._process.stdout is not None
        place = self._process.stdout.fileno()
        while b"\n" not in self._read:
            _wait(place, select.POLLIN, deadline)
            more = os.read(place, 65536)
            if not more:
                return None
            self._read += more
        line, _, self._read = self._read.partition(b"\n")
        reply: Reply = json.loads(line)
        return reply


def _wait(place: int, event: int, deadline: float) -> None:
    """Wait until a file descriptor is ready. Raises TimeoutError if it is not ready by `deadline`."""
    poll = select.poll()
    poll.register(place, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


def _start(seconds: float) -> subprocess.Popen[bytes]:
    return start(
        "megatron_tempo.rewards.math_worker",
        str(MEMORY_MB),
        str(seconds),
        environment={"PYTHONHASHSEED": "0"},  # sympy's order of terms depends on the hashes of strings
        buffer_bytes=0,
    )
