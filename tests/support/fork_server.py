"""Processes forked from one that has already imported torch and Megatron-Core.

The imports take longer than most tests, so a fork server does them once. Otherwise each process that it forks is fresh:
it has no process group, thread or tensor of another test, and if it dies or hangs, no other process is affected. The
standard library's fork server is not used, because it allows only one server per process. The tests need a second one,
with the stand-in for Transformer Engine on its path.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS = 240.0  # for the imports, on a busy machine
# The modules that a run imports. Some of them are imported late, on first use.
PRELOADED = (
    "megatron_tempo.training.jobs",
    "megatron_tempo.report.html",
    "megatron_tempo.evaluation.paired",
    "scipy.stats",
    "sklearn.metrics",
    "tensorboard.compat.tensorflow_stub",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.olmo3.modeling_olmo3",
    "tests.support.project",
)
_PR_SET_PDEATHSIG = 1


class ForkServer:
    """A server that starts on first use and ends with the process that uses it. Not thread-safe."""

    def __init__(self, *paths: Path) -> None:
        """`paths`: folders that are searched for packages before the installed ones."""
        self._paths = paths
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None
        self._unread = b""
        self._codes: dict[int, int] = {}

    def call(self, target: str, *args: object, environment: Mapping[str, str], log: Path) -> Forked:
        """Call `target`, "module:function", with JSON-able arguments. The exit code is 0 unless it raises."""
        return self._start({"target": target, "args": args}, environment, log, new_session=False)

    def script(
        self, path: Path, *args: object, environment: Mapping[str, str], log: Path, new_session: bool = False
    ) -> Forked:
        """Run a script as `python path args` does, from the repository's root."""
        words = [str(path), *map(str, args)]
        return self._start({"script": words}, environment, log, new_session=new_session)

    def exit_code(self, pid: int, timeout: float) -> int | None:
        """The exit code of a process as subprocess gives it; None if it still runs after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while pid not in self._codes:
            message = self._read(max(0.0, deadline - time.monotonic()))
            if message is None:
                return None
            self._codes[message["pid"]] = message["code"]
        return self._codes[pid]

    def _start(self, work: dict[str, Any], environment: Mapping[str, str], log: Path, *, new_session: bool) -> Forked:
        if self._process is None:
            self._open()
        assert self._channel is not None
        request = work | {"environment": dict(environment), "log": str(log), "new_session": new_session}
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._read(START_SECONDS)
            assert message is not None, f"the fork server does not answer within {START_SECONDS:.0f} s"
            if "started" in message:
                self._codes.pop(message["started"], None)  # process ids are reused
                return Forked(self, message["started"])
            self._codes[message["pid"]] = message["code"]

    def _open(self) -> None:
        self._channel, theirs = socket.socketpair()
        path = os.pathsep.join(map(str, (ROOT, *self._paths)))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-m", "tests.support.fork_server", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()])

    def _read(self, timeout: float) -> dict[str, Any] | None:
        """The server's next message; None if there is none within `timeout` seconds."""
        assert self._channel is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self._channel], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                return None
            received = self._channel.recv(1 << 16)
            assert received, "the fork server has ended"
            self._unread += received
        line, _, self._unread = self._unread.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


class Forked:
    """A process of a fork server, with the part of subprocess.Popen's interface that tests use."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self._server, self.pid = server, pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self, timeout: float = 0.0) -> int | None:
        return self._server.exit_code(self.pid, timeout)

    def wait(self, timeout: float = 3600.0) -> int:
        code = self._server.exit_code(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


FORK_SERVER = ForkServer()
TE_FORK_SERVER = ForkServer(ROOT / "tests/support/te")  # with the stand-in for Transformer Engine


def _serve(channel: socket.socket) -> None:
    """Fork a process per request, until the other end is closed. In a forked process, returns when its script ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # later collections skip the objects that the imports have made
    wakeup, wake = socket.socketpair()
    for end in (wakeup, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    unread = b""
    while True:
        ready, _, _ = select.select([channel, wakeup], [], [])
        if wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                wakeup.recv(1 << 10)
            _report_ended(channel)
        if channel in ready:
            received = channel.recv(1 << 16)
            if not received:
                os._exit(0)
            *lines, unread = (unread + received).split(b"\n")
            for line in lines:
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for end in (channel, wakeup, wake):
                        end.close()
                    _become(json.loads(line))
                    return
                channel.sendall(json.dumps({"started": pid}).encode() + b"\n")


def _report_ended(channel: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        message = {"pid": pid, "code": os.waitstatus_to_exitcode(status)}
        channel.sendall(json.dumps(message).encode() + b"\n")


def _become(request: dict[str, Any]) -> None:
    """Carry out a request in a process that has just been forked."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the server
    if request["new_session"]:
        os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.environ.update(request["environment"])
    if "script" in request:
        sys.argv = request["script"]
        sys.path[0] = str(Path(sys.argv[0]).parent)
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    module, _, name = request["target"].partition(":")
    code = 1
    try:
        getattr(importlib.import_module(module), name)(*request["args"])
        code = 0
    except BaseException:  # noqa: BLE001  # as at the end of a script
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # skips the interpreter's shutdown, which takes as long as a short test


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
