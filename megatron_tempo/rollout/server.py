"""A server process that this run starts, and ends with it.

It lives in a Python environment of its own: the trainer does not import it. It listens at the address that the config
names, and answers nobody without the run's key.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.server_adapter import ServerAdapter, Start, authorised
from megatron_tempo.runtime import progress_marker


class Server:
    """The process and its address. Its weights are random: the real ones come from the trainer."""

    def __init__(
        self,
        adapter: ServerAdapter,
        config: ServersConfig,
        model: Path,
        folder: Path,
        key: str,
        precision: EnginePrecision,
        devices: str | None,
        port: int | None = None,
    ) -> None:
        """Start it, without waiting. It writes below `folder`. `devices` is its CUDA_VISIBLE_DEVICES; none: ours.
        `port`: none: one that is free."""
        folder.mkdir(parents=True, exist_ok=True)
        host = own_address(config.host)
        self.port = port = _free_port(host) if port is None else port
        self.url = f"http://{host}:{port}"
        self._adapter, self._seconds, self._key = adapter, config.start_seconds, key
        self.log = folder / f"{adapter.name.lower()}.log"
        launch = adapter.launch(Start(config, model, folder, host, port, key, precision))
        environment = {name: value for name, value in os.environ.items() if not _of_torchrun(name)}
        environment |= launch.environment | ({} if devices is None else {"CUDA_VISIBLE_DEVICES": devices})
        command = [sys.executable, "-c", _WITH_ITS_PARENT, config.python, *launch.command]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def close(self) -> None:
        """End it and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> None:
        """Until it is ready.

        Raises EngineError with the end of its log if it ends or is not ready within `rollout.servers.start_seconds`.
        """
        name, deadline = self._adapter.name, time.monotonic() + self._seconds
        with httpx.Client(base_url=self.url, headers=authorised(self._key), timeout=5.0) as client:
            while time.monotonic() < deadline:
                progress_marker.mark()
                if self.process.poll() is not None:
                    code = self.process.returncode
                    raise EngineError(f"{name} ended with exit code {code}" + last_words(self.log))
                with contextlib.suppress(httpx.HTTPError):  # not listening yet
                    if client.get(self._adapter.health.path).status_code == 200:
                        return
                time.sleep(0.25)
        raise EngineError(
            f"{name} was not ready within rollout.servers.start_seconds={self._seconds:g}: raise it, or see why"
            + last_words(self.log)
        )


def own_address(host: str) -> str:
    """The address that a host stands for on this machine; `hostname` stands for the machine's own name."""
    return socket.gethostbyname(socket.gethostname() if host == "hostname" else host)


def last_words(log: Path) -> str:
    """The first errors that a log names, which the later ones may follow from, and its end; long lines are cut."""
    lines = [line if len(line) < 400 else f"{line[:400]} ..." for line in log.read_text(errors="replace").splitlines()]
    named = re.compile(r"\b\w+(Error|Exception): ")
    errors = [line for line in lines[:-15] if named.search(line) and "WARNING" not in line]
    first = [f"the first errors in {log}:", *errors[:3]] if errors else []
    return "\n".join(["", *first, f"the end of {log}:", *lines[-15:]])


# The server must not outlive a trainer that is killed. Linux tells a child of its parent's end (PR_SET_PDEATHSIG is 1);
# this one then kills its whole group, since a server's own processes may stay when the first of them is gone.
_WITH_ITS_PARENT = """
import ctypes, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
sys.exit(subprocess.call(sys.argv[1:]))
"""


def _of_torchrun(name: str) -> bool:
    """Whether a variable tells a process of its place among the trainer's: a server that sees them waits for others."""
    ranks = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    return name.startswith(ranks)


def _free_port(host: str) -> int:
    """A port that is free, and below those that the system gives to whoever asks: a server binds it much later."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
