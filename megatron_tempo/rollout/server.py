"""A server process that this run starts and that ends with the run.

It uses its own Python environment: the trainer does not import it. It listens at the address that the config names and
rejects requests without the run's key. Only this user can read its folder and its log.
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
from collections.abc import Mapping
from pathlib import Path

import httpx

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.addresses import own_address
from megatron_tempo.rollout.connections import authorised
from megatron_tempo.rollout.engine_versions import check_version
from megatron_tempo.rollout.folder import private_folder
from megatron_tempo.rollout.nccl import align_nccl
from megatron_tempo.rollout.server_adapter import Launch, ServerAdapter, Start
from megatron_tempo.runtime import progress_marker


class Server:
    """The process and its address. Its initial weights are random: the trainer sends the real ones."""

    def __init__(
        self,
        adapter: ServerAdapter,
        config: ServersConfig,
        model: Path,
        folder: Path,
        key: str,
        precision: EnginePrecision,
        devices: str,
        port: int | None = None,
    ) -> None:
        """Start it, without waiting. It writes below `folder`.

        `devices`: its CUDA_VISIBLE_DEVICES. `port`: None for a free one.
        """
        private_folder(folder)
        host = own_address(config.host)
        self.port = port = _free_port(host) if port is None else port
        self.url = f"http://{host}:{port}"
        self._adapter, self._seconds, self._key = adapter, config.start_seconds, key
        self._python = config.python
        self.log = folder / f"{adapter.name.lower()}.log"
        launch = adapter.launch(Start(config, model, folder, host, port, key, precision))
        environment = environment_of(launch, devices)
        command = [sys.executable, "-c", _WITH_ITS_PARENT, config.python, *launch.command]
        # SGLang logs its arguments, including the key.
        with os.fdopen(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as log:
            os.fchmod(log.fileno(), 0o600)
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                umask=0o077,
            )

    def close(self) -> None:
        """End the server and all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def wait(self) -> None:
        """Wait until the server is ready.

        Raises EngineError with the end of its log if it ends or is not ready within `rollout.servers.start_seconds`.
        """
        name, deadline = self._adapter.name, time.monotonic() + self._seconds
        with httpx.Client(base_url=self.url, headers=authorised(self._key), timeout=5.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                progress_marker.mark()
                if self.process.poll() is not None:
                    code = self.process.returncode
                    doubt = self._adapter.versions.doubt_of_failed(self._python)
                    raise EngineError(f"{name} ended with exit code {code}{doubt}" + last_words(self.log, self._key))
                with contextlib.suppress(httpx.HTTPError):  # not listening yet
                    if client.get(self._adapter.health.path).status_code == 200:
                        self._check_version(client)
                        return
                time.sleep(0.25)
        raise EngineError(
            f"{name} was not ready within rollout.servers.start_seconds={self._seconds:g}: raise it, or see why"
            + last_words(self.log, self._key)
        )

    def _check_version(self, client: httpx.Client) -> None:
        with contextlib.suppress(httpx.HTTPError):
            answer = client.get(self._adapter.asks_for_version.path)
            check_version(self._adapter.versions, answer.text, self.url)


def environment_of(launch: Launch, devices: str, inherited: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment of a server. `devices`: its CUDA_VISIBLE_DEVICES. `inherited`: the starting process's variables.

    PYTHONPATH is the adapter's own: the trainer's leads to packages of another environment.
    """
    environment = {name: value for name, value in inherited.items() if not _is_kept_back(name)}
    align_nccl(environment)
    return environment | launch.environment | {"CUDA_VISIBLE_DEVICES": devices}


def last_words(log: Path, key: str) -> str:
    """The first errors in a log, which may have caused the later ones, and its end. Long lines are cut.

    The server's key is removed: others may read what is printed.
    """
    text = log.read_text(errors="replace").replace(key, "***")
    lines = [line if len(line) < 400 else f"{line[:400]} ..." for line in text.splitlines()]
    named = re.compile(r"\b\w+(Error|Exception): ")
    errors = [line for line in lines[:-15] if named.search(line) and "WARNING" not in line]
    first = [f"the first errors in {log}:", *errors[:3]] if errors else []
    return "\n".join(["", *first, f"the end of {log}:", *lines[-15:]])


# The server must not outlive a killed trainer. Linux signals a child when its parent ends (PR_SET_PDEATHSIG is 1). The
# child then kills its whole group, since a server's other processes may survive the first one.
_WITH_ITS_PARENT = """
import ctypes, os, signal, subprocess, sys
signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
sys.exit(subprocess.call(sys.argv[1:]))
"""


def _is_kept_back(name: str) -> bool:
    """Whether a server must not inherit a variable.

    A server that sees the trainer's rank variables waits for other ranks. One that sees a proxy sends requests to its
    own processes through it, and a server fetches nothing from elsewhere. One that sees the trainer's module paths
    imports the trainer's torch. What the trainer sets for its own products (`models.device`) slows a server's.
    """
    ranks = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
    proxies = ("http_proxy", "https_proxy", "all_proxy")
    others = ("PYTHONPATH", "PYTHONHOME", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE")
    return name.startswith(ranks) or name.lower() in proxies or name in others


def _free_port(host: str) -> int:
    """A free port below the system's range for outgoing connections: a server binds it much later."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
