"""Ranks that die, freeze, hang or fail in the middle of a run: the others stop and say so, and nothing is lost.

The ranks are plain processes, as under srun: nobody ends the others when one is gone, and rank 0 holds the store.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_tempo.checkpoint.checkpoints import last_step
from megatron_tempo.config.tree import save
from megatron_tempo.observability.heartbeat import read_heartbeat
from megatron_tempo.observability.records import read_metrics
from megatron_tempo.report.status import status
from tests.support.fork_server import FORK_SERVER
from tests.support.project import config_of, write_project
from tests.support.ranks import rank_environments

# In seconds: short, and yet longer than a busy machine lets a process wait.
BEAT, SILENT, ENDED = 0.25, 5.0, 2.5
# Of a fault that is seen at once: a few beats, and what a busy machine takes. Without the watchdog it is half an hour.
AT_ONCE = 90.0
ITERATIONS = 4

# A fault on one rank, in a phase of the iteration behind so many.
SCRIPT = f"""
import os, signal, sys, threading
from contextlib import contextmanager
from pathlib import Path
from megatron_tempo.runtime import failure_detector
failure_detector.BEAT, failure_detector.SILENT, failure_detector.ENDED = {BEAT}, {SILENT}, {ENDED}
from megatron_tempo.config.tree import load
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.training.trainer import Trainer
from megatron_tempo.training.jobs import train

phase, score = Trainer.phase, Verifiers.score
kind, rank, step, config, mark = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), load(sys.argv[4]), Path(sys.argv[5])


def fault():
    mark.touch()
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "failed":
        raise OSError(28, "No space left on device", "rollouts")


@contextmanager
def faulty(self, name):
    with phase(self, name):
        if name == "actor" and self.step == step and self.context.layouts.actor.rank == rank:
            fault()
        yield


def endless(self, items):
    if kind == "hangs" and os.environ["RANK"] == str(rank):
        mark.touch()
        threading.Event().wait()
    return score(self, items)


Trainer.phase, Verifiers.score = faulty, endless
if __name__ == "__main__":
    train(config)
"""


class Ranks:
    """The processes of a run, and what they said."""

    def __init__(self, config: Path, log: Path, world: int, kind: str = "", rank: int = -1, step: int = 0) -> None:
        script = log.with_suffix(".py")
        script.write_text(SCRIPT)
        self.mark = log.with_suffix(".mark")
        arguments = (kind, rank, step, config, self.mark)
        self.logs = [log.with_suffix(f".rank{i}") for i in range(world)]
        self.processes = [
            FORK_SERVER.script(script, *arguments, environment=environment, log=output)
            for environment, output in zip(rank_environments(world), self.logs, strict=True)
        ]

    def output(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def wait(self) -> list[int]:
        return [process.wait(timeout=200) for process in self.processes]

    def until_fault(self) -> float:
        """The time of the fault."""
        deadline = time.monotonic() + 200
        while not self.mark.exists():
            assert time.monotonic() < deadline, self.output()
            alive = all(process.poll() is None for process in self.processes)
            assert alive or self.mark.exists(), self.output()  # a killed one has left its mark just before
            time.sleep(0.02)
        return time.monotonic()


@contextmanager
def started(*arguments: object, **more: object) -> Iterator[Ranks]:
    ranks = Ranks(*arguments, **more)  # type: ignore[arg-type]
    try:
        yield ranks
    finally:
        for process in ranks.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_project(tmp_path_factory.mktemp("project"))


def write_config(project: Path, run: Path, hang_minutes: float | None = None) -> Path:
    config = config_of(project, run)
    config.stage2.iterations = ITERATIONS
    config.evaluation.every = 0
    config.checkpoint.every = 1
    config.run.hang_minutes = hang_minutes
    path = run.with_suffix(".json")
    save(config, path)
    return path


def error_of(ranks: Ranks) -> str:
    """The one error that was told of."""
    lines = [line for line in ranks.output().splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ranks.output()
    return lines[0]


def assert_status_tells(run: Path, what: str) -> None:
    record = read_heartbeat(run)
    assert record is not None
    assert what in record["ended"]
    shown = status(run)
    assert not shown.well
    assert what in " ".join(shown.text.split())


def outcome(run: Path) -> tuple[list[dict], dict[str, bytes]]:
    """Figures and weights at the end, times apart."""
    timing = ("time", "seconds", "idle_share", "tokens_per_second")
    metrics = [
        {k: v for k, v in r.items() if k not in timing and not k.startswith(("time/", "memory_gb/"))}
        for r in read_metrics(run)
    ]
    weights = {str(path.relative_to(run)): path.read_bytes() for path in run.glob("hf_step_*/*/*.safetensors")}
    assert len(metrics) == ITERATIONS
    assert weights
    return metrics, weights


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_is_killed_twice_over_and_nothing_is_lost(project: Path, tmp_path: Path) -> None:
    """First rank 1, then rank 0, with which the store goes."""
    run = tmp_path / "run"
    config = write_config(project, run)
    for number, (rank, step) in enumerate([(1, 2), (0, 3)]):
        with started(config, tmp_path / f"log{number}", 2, "killed", rank, step) as ranks:
            pids = [process.pid for process in ranks.processes]
            since = ranks.until_fault()
            codes = ranks.wait()
            assert time.monotonic() - since < AT_ONCE
            assert codes[rank] == -signal.SIGKILL
            assert codes[1 - rank] == 1
            error = error_of(ranks)
            assert f"rank {rank} ({socket.gethostname()}, process {pids[rank]}) has died; last heartbeat at " in error
            # The last heartbeat may be from before the iteration's end: they are sent at intervals.
            assert re.search(rf", ({step - 1}|{step}) iterations done, at ", error)
            # A busy machine may still have been writing the last one.
            newest = last_step(run)
            assert newest in (step - 1, step)
            again = f"rerun the same command to resume from {run}/checkpoints/step_{newest:08d}"
            assert error.endswith(again)
            assert_status_tells(run, again)
    with started(config, tmp_path / "log2", 2) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        assert "resumed from" in ranks.output()
    undisturbed = tmp_path / "undisturbed"
    with started(write_config(project, undisturbed), tmp_path / "log3", 2) as ranks:
        assert ranks.wait() == [0, 0], ranks.output()
        assert "error" not in ranks.output()
    assert outcome(run) == outcome(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_one_is_frozen(project: Path, tmp_path: Path, rank: int) -> None:
    """With rank 0 the store stands still too: who asks it something gets no answer."""
    with started(write_config(project, tmp_path / "run"), tmp_path / "log", 3, "stopped", rank) as ranks:
        since = ranks.until_fault()
        codes = [ranks.processes[other].wait(timeout=200) for other in range(3) if other != rank]
        assert SILENT - 2 * BEAT < time.monotonic() - since < SILENT + AT_ONCE
        assert codes == [1, 1]
        assert f"rank {rank} (" in error_of(ranks)
        assert re.search(r"has sent no heartbeat for \d+ s: it is dead or frozen; last heartbeat at ", error_of(ranks))
        assert_status_tells(tmp_path / "run", "it is dead or frozen")
        # When it goes on it finds the others gone, and knows whose fault that is.
        os.kill(ranks.processes[rank].pid, signal.SIGCONT)
        assert ranks.processes[rank].wait(timeout=60) == 1
        assert "this process was suspended for" in ranks.logs[rank].read_text()


@pytest.mark.slow
def test_one_hangs(project: Path, tmp_path: Path) -> None:
    """A verifier that never returns: its rank waits for it, and the other for that rank."""
    run, minutes = tmp_path / "run", 0.1
    with started(write_config(project, run, minutes), tmp_path / "log", 2, "hangs", 1) as ranks:
        ranks.until_fault()
        assert ranks.wait() == [1, 1]
        error = error_of(ranks)
        assert error.startswith(
            "error: no rank made progress for run.hang_minutes=0.1; likely cause, since it does not"
        )
        assert f"rank 1 ({socket.gethostname()}, process {ranks.processes[1].pid})" in error
        assert "rank 0" not in error
        assert "in parity, 0 iterations done, at rollout/verification.py:" in error
        assert error.endswith(" in results")
        first, second = (line for line in ranks.output().splitlines() if line.startswith("  rank "))
        assert first.startswith("  rank 1 (")
        assert ": hangs, in parity, " in first
        assert second.startswith("  rank 0 (")
        assert ": waits for others, in parity, 0 iterations done, at rollout/batches.py:" in second
        assert "in endless" in ranks.logs[1].read_text(), "the stacks of all its threads"
        assert "stacks of" not in ranks.logs[0].read_text()
        assert_status_tells(run, "run.hang_minutes=0.1")


@pytest.mark.slow
def test_one_fails(project: Path, tmp_path: Path) -> None:
    with started(write_config(project, tmp_path / "run"), tmp_path / "log", 2, "failed", 1) as ranks:
        since = ranks.until_fault()
        assert ranks.wait() == [1, 1]
        assert time.monotonic() - since < AT_ONCE
        error = error_of(ranks)
        assert "rank 1 (" in error
        assert "ended: OSError: [Errno 28] No space left on device: 'rollouts'" in error
        assert "error: " not in ranks.logs[1].read_text(), "there stands the traceback"
        assert "Traceback" not in ranks.logs[0].read_text()
        assert_status_tells(tmp_path / "run", "No space left on device")


@pytest.mark.slow
def test_all_are_paused(project: Path, tmp_path: Path) -> None:
    """As on a machine that is suspended."""
    run = tmp_path / "run"
    with started(write_config(project, run, 0.1), tmp_path / "log", 2) as ranks:
        deadline = time.monotonic() + 200
        while len(read_metrics(run)) < 1:
            assert time.monotonic() < deadline, ranks.output()
            time.sleep(0.02)
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGSTOP)
        time.sleep(SILENT + 2)
        for process in ranks.processes:
            os.kill(process.pid, signal.SIGCONT)
        assert ranks.wait() == [0, 0], ranks.output()
        assert "error: " not in ranks.output()
