"""Ranks that watch one another, without a run: how each of them ends. tests/e2e/test_watchdog.py has whole runs.

On a GPU a rank does not wait in a collective, which is only queued, but where it next needs a number. Here it queues
one by `async_op`, and its "GPU" is a lock that nobody releases.
"""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.support.fork_server import FORK_SERVER
from tests.support.ranks import rank_environments

# The ranks are plain processes, and rank 0 holds the store. `KIND` is what rank 1 does, or rank 0 where it says so.
SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from types import SimpleNamespace
import torch, torch.distributed as dist
from megatron_tempo.models.megatron_compat.torch_private import begun_collectives
from megatron_tempo.runtime import failure_detector, progress_marker, watchdog

failure_detector.BEAT, failure_detector.SILENT, failure_detector.ENDED = 0.1, 2.0, 1.0
kind, folder = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo")
rank = dist.get_rank()
lock = threading.Lock()
lock.acquire()
device = SimpleNamespace(item=lock.acquire)
hangs = kind.startswith("hang")
with watchdog.Watchdog(folder, 3 / 60 if hangs else None, begun_collectives):
    dist.barrier()
    if hangs and rank != 1:
        work = dist.all_reduce(torch.ones(1), async_op=True)
        (folder / f"queued{rank}").touch()
        device.item()
    while hangs and len(list(folder.glob("queued*"))) < dist.get_world_size() - 1:
        progress_marker.mark()
        time.sleep(0.01)
    if kind == "hang on the host":
        time.sleep(600)
    if kind == "hang of the gpu":
        device.item()
    if kind == "killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "first killed" and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "failed" and rank == 1:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    if kind == "all failed":
        time.sleep(0.5 * rank)
        raise ValueError(f"of rank {rank}")
    if kind == "slow" and rank == 1:
        time.sleep(3.0)
    elif kind != "slow":
        dist.barrier()
print(f"rank {rank} came to its end")
dist.destroy_process_group()
"""


def run(folder: Path, kind: str, world: int = 2) -> tuple[list[int], list[str]]:
    """The exit codes of the ranks, and what each said."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    logs = [folder / f"rank{rank}.log" for rank in range(world)]
    processes = [
        FORK_SERVER.script(script, kind, folder, environment=environment, log=log)
        for environment, log in zip(rank_environments(world), logs, strict=True)
    ]
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [log.read_text() for log in logs]


@pytest.mark.parametrize("kind", ["well", "slow"])
def test_an_end_is_no_death(tmp_path: Path, kind: str) -> None:
    """Also where the rank with the store is at its end for longer than a rank may be silent."""
    codes, output = run(tmp_path, kind)
    assert codes == [0, 0], output
    assert all("error" not in text and f"rank {rank} came to its end" in text for rank, text in enumerate(output))


@pytest.mark.parametrize(("kind", "lost"), [("killed", 1), ("first killed", 0)])
def test_one_is_killed(tmp_path: Path, kind: str, lost: int) -> None:
    codes, output = run(tmp_path, kind)
    assert codes[lost] == -signal.SIGKILL
    assert codes[1 - lost] == 1
    assert f"\nerror: rank {lost} ({socket.gethostname()}, process " in output[1 - lost]
    assert " has died; last heartbeat at " in output[1 - lost]
    assert "Traceback" not in output[1 - lost]


def test_one_fails(tmp_path: Path) -> None:
    codes, (first, second) = run(tmp_path, "failed")
    assert codes == [1, 1]
    assert "Traceback" in second
    assert second.rstrip().endswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert "ended: RuntimeError: mat1 and mat2 shapes cannot be multiplied; last heartbeat" in first
    assert "Traceback" not in first


def test_all_fail(tmp_path: Path) -> None:
    """Each tells of its own error, and none of another's."""
    codes, output = run(tmp_path, "all failed")
    assert codes == [1, 1]
    for rank, text in enumerate(output):
        assert text.rstrip().endswith(f"ValueError: of rank {rank}")
        assert "error: rank" not in text


@pytest.mark.parametrize("kind", ["hang on the host", "hang of the gpu"])
def test_a_hang_is_of_the_rank_that_has_not_begun_the_collective(tmp_path: Path, kind: str) -> None:
    codes, said = run(tmp_path, kind, world=3)
    assert codes == [1, 1, 1], said
    [report] = [text for text in said if "error: no rank made progress for run.hang_minutes=0.05" in text]
    first, *lines = [line for line in report.splitlines() if "(" + socket.gethostname() in line]
    assert "rank 1 (" in first
    assert "rank 0 (" not in first
    assert "rank 2 (" not in first
    assert {line.split()[1]: line.partition("): ")[2].partition(",")[0] for line in lines if line[:2] == "  "} == {
        "1": "hangs",
        "0": "waits for others",
        "2": "waits for others",
    }
    assert [f"stacks of rank {rank}, " in text for rank, text in enumerate(said)] == [False, True, False]
