"""A server that a run starts ends with it, also where another thread ends the process (runtime/watchdog.py)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, sys, threading, time
from pathlib import Path
from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.rollout.server_adapter import Call, Launch
from megatron_tempo.rollout.server import Server


class Sleeper:
    name, health = "sleeper", Call("/health")

    def launch(self, start):
        return Launch(["-c", f"import os, time; print(os.getpid(), flush=True); time.sleep(600)"])


def keep():
    config = ServersConfig(python=sys.executable)
    server = Server(Sleeper(), config, Path("model"), Path(sys.argv[1]), "key", EnginePrecision.fp32, "")
    while not (output := server.log.read_text()).endswith("\\n"):
        time.sleep(0.01)
    print(server.process.pid, output, flush=True)
    started.set()
    threading.Event().wait()


started = threading.Event()
threading.Thread(target=keep, daemon=True).start()
started.wait()
threading.Thread(target=lambda: os._exit(1)).start()
threading.Event().wait()
"""


@pytest.mark.long
def test_no_server_is_left(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    command = [sys.executable, str(script), str(tmp_path / "server")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    processes = [int(word) for word in done.stdout.split()]
    assert len(processes) == 2
    deadline = time.monotonic() + 120
    while any(map(lives, processes)):
        assert time.monotonic() < deadline, f"{processes} outlived the trainer"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
