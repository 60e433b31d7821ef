"""A rehearsal that is ended from outside leaves no process and no file behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.nullgpu.child import REPOSITORY

pytestmark = [pytest.mark.nullgpu, pytest.mark.timeout(300)]
COMMAND = (sys.executable, "-m", "megatron_tempo", "rehearse", "experiment=qwen3_8b_aime", "cluster=h100x8",
           "rollout.placement=disaggregated")  # fmt: skip


@pytest.mark.parametrize(("given", "status"), [
    (signal.SIGINT, 130),
    (signal.SIGTERM, 143),
    (signal.SIGKILL, -9),
], ids=["SIGINT", "SIGTERM", "SIGKILL"])  # fmt: skip
def test_a_signal_leaves_nothing_behind(tmp_path: Path, given: signal.Signals, status: int) -> None:
    variables = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(COMMAND, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        worker = worker_of(process)
        process.send_signal(given)
        text, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, text
    assert "Traceback" not in text
    gone, _ = psutil.wait_procs([worker], timeout=120)
    assert gone == [worker]
    if given is not signal.SIGKILL:  # which leaves no time to remove the folder
        assert list(tmp_path.iterdir()) == []


def worker_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The process under the null GPU, as soon as there is one."""
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        for child in parent.children():
            if "megatron_tempo.rehearsal.forks" in child.cmdline():
                return child
        time.sleep(0.05)
    raise AssertionError(process.communicate()[0])
