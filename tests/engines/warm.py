"""Inference servers forked from a process that has already imported SGLang or vLLM.

A server on a CPU spends nearly all of its start on imports, three times over: its process and the two or three that it
spawns. Here one process an engine imports everything once. Each server is a fork of it, and so are the processes that a
server starts. Otherwise it is the engine's own code, with the arguments and the environment that the trainer gives.

As a script, this file is both ends, and imports nothing of the project's, since it runs in an engine's environment:

    ENGINE/bin/python warm.py serve FOLDER MODULE ...   waits for requests at FOLDER/socket
    FOLDER/python -m MODULE ARGUMENT ...                what `rollout.servers.python` names: asks for a server, and
                                                        lives and ends as the server does
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import multiprocessing.context
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_CLIENT = """#!{python} -SE
import os, sys
if sys.argv[1] == "-c":
    os.execv({interpreter!r}, [{interpreter!r}, *sys.argv[1:]])
sys.path[:0] = [{folder!r}]
import warm
warm.ask({socket!r}, sys.argv[1:])
"""


class WarmEngine:
    """The process that imports an engine, from its start on; `python` is the program to start servers with."""

    def __init__(self, interpreter: Path, folder: Path, modules: list[str]) -> None:
        folder.mkdir(parents=True)
        self.folder, self.python = folder, folder / "python"
        names = {"folder": str(Path(__file__).parent), "socket": str(folder / "socket")}
        self.python.write_text(_CLIENT.format(python=sys.executable, interpreter=str(interpreter), **names))
        self.python.chmod(0o755)
        command = [interpreter, __file__, "serve", folder, *modules]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log)

    def close(self) -> None:
        """End it and all its servers."""
        self._process.kill()
        self._process.wait()


def server_group(group: int, folders: list[Path]) -> int:
    """The process group of the server that a client of process group `group` asked for; `group` itself if none did."""
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            return int((folder / f"group{group}").read_text())
    return group


def ask(address: str, words: list[str]) -> None:
    """The client: start a server with `words`, hand on its exit code, and take it along when this process ends."""
    folder = Path(address).parent
    with socket.socket(socket.AF_UNIX) as channel:
        deadline = time.monotonic() + 60
        while not Path(address).exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        channel.connect(address)
        request = {"words": words, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(channel, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
        lines, pid = channel.makefile("r"), ""
        with contextlib.suppress(ConnectionError):
            pid = lines.readline()
        if not pid:
            sys.exit("the imports failed:\n" + (folder / "log").read_text(errors="replace")[-4000:])
        (folder / f"group{os.getpgid(0)}").write_text(pid)
        code = int(lines.readline() or 1)
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def serve(folder: Path, modules: list[str]) -> None:
    """Fork a server for each request, until the process that started this one ends. Returns in each fork."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)  # before the imports: who asks early waits, and is not left waiting if an import fails
    for name in modules:
        importlib.import_module(name)
    # Engines ask for spawned processes, which import everything anew.
    contexts: dict[str, Any] = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]
    gc.collect()
    gc.freeze()
    wakeup, wake = socket.socketpair()
    for end in (wakeup, wake):
        end.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    clients: dict[int, socket.socket] = {}  # by the process of the server
    while True:
        ready, _, _ = select.select([listener, wakeup, *clients.values()], [], [])
        for pid, client in list(clients.items()):
            if client in ready:  # it has ended
                _kill(pid)
        if wakeup in ready:
            with contextlib.suppress(BlockingIOError):
                wakeup.recv(1 << 10)
            _report_ended(clients)
        if listener in ready:
            client, _ = listener.accept()
            data, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
            while not data.endswith(b"\n"):
                data += client.recv(1 << 20)
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for end in (listener, wakeup, wake, client, *clients.values()):
                    end.close()
                return _become(json.loads(data), files)
            for file in files:
                os.close(file)
            clients[pid] = client
            client.sendall(f"{pid}\n".encode())


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _report_ended(clients: dict[int, socket.socket]) -> None:
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        _kill(pid)  # what it has left behind
        with clients.pop(pid) as client, contextlib.suppress(OSError):
            client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Do in this process, just forked, what `python` does with the words of the request."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.path[:0] = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    option, module, *arguments = request["words"]
    assert option == "-m", f"only modules are run here, not {option}"
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    serve(Path(sys.argv[2]), sys.argv[3:])
