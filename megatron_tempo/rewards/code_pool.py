"""The trainer's side of the `code_worker` process: one pool of sandboxes, which many threads may use."""

from __future__ import annotations

import json
import logging
import queue
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from megatron_tempo.config.schema import CodeConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.rewards.code_run import ProgramLimits, Verdict
from megatron_tempo.rewards.sandbox import Sandbox
from megatron_tempo.rewards.worker_process import end, start
from megatron_tempo.runtime import progress_marker

TRIES = 2  # of a request whose process ends

log = logging.getLogger(__name__)


class _Waits(NamedTuple):
    """Who waits for the replies of a process; None among them: it has ended."""

    process: subprocess.Popen[bytes]
    replies: queue.SimpleQueue[dict[str, Any] | None]


class CodePool:
    """Starts its process on first use, and another one when that is killed."""

    def __init__(self, config: CodeConfig, sandbox: Sandbox) -> None:
        limits = ProgramLimits(config.seconds, config.wall_seconds, config.memory_mb)
        self._arguments = (sandbox.name, str(config.workers), config.python or "", json.dumps(asdict(limits)))
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        self._waiting: dict[int, _Waits] = {}
        self._asked = 0

    def run(self, answer: str, programs: Sequence[str]) -> list[Verdict]:
        """The verdicts on programs by the tests of an answer. Raises EngineError if no sandbox starts."""
        for _ in range(TRIES):
            verdicts = self._ask(answer, programs)
            if verdicts is not None:
                return verdicts
            log.warning("the process that runs programs was killed; it is started again")
        raise EngineError(
            "the process that runs programs ended twice while it ran the same ones; its error is on stderr"
        )

    def close(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            end(process)
            if self._reader is not None:
                self._reader.join()

    def _ask(self, answer: str, programs: Sequence[str]) -> list[Verdict] | None:
        """The verdicts; None if the process ends."""
        replies: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        with self._lock:
            process = self._started()
            self._asked += 1
            number = self._asked
            self._waiting[number] = _Waits(process, replies)
            request = {"id": number, "answer": answer, "programs": list(programs)}
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request).encode("ascii") + b"\n")
                process.stdin.flush()
            except BrokenPipeError:
                self._process = None  # perhaps before its reader has noticed
                replies.put(None)
        verdicts: dict[int, Verdict] = {}
        try:
            while len(verdicts) < len(programs):
                reply = replies.get()
                if reply is None:
                    return None
                if "fault" in reply:
                    raise EngineError(f"programs cannot be judged: {reply['fault']}")
                verdicts[reply["index"]] = Verdict(reply["outcome"], reply["why"])
        finally:
            with self._lock:
                del self._waiting[number]
        return [verdicts[index] for index in range(len(programs))]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            self._process = start("megatron_tempo.rewards.code_worker", *self._arguments, environment={})
            self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True, name="code replies")
            self._reader.start()
        return self._process

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """Hand each reply to the thread that waits for it, until the process ends."""
        assert process.stdout is not None
        for line in process.stdout:
            progress_marker.mark()
            reply = json.loads(line)
            with self._lock:
                waits = self._waiting.get(reply["id"])
            if waits is not None:
                waits.replies.put(reply)
        with self._lock:
            if self._process is process:  # so that the next request starts another one
                self._process = None
            lost = [waits for waits in self._waiting.values() if waits.process is process]
        for waits in lost:
            waits.replies.put(None)
        process.kill()
        process.wait()
