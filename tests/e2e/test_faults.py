"""Disks that are full, files that cannot be written and clocks that are set, in the middle of runs: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from safetensors import SafetensorError

from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import save
from megatron_tempo.data.seen import Seen
from megatron_tempo.errors import UnwrittenError
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.records import Record, read_evaluations, read_metrics, read_samples, read_warnings
from megatron_tempo.training.jobs import evaluate, train
from megatron_tempo.weights import folder as hf_folder
from tests.support.fork_server import ROOT
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks

LAST = 6


def config_for(project: Path, run: Path) -> Config:
    """Three iterations of each stage; checkpoints after 2, 4 and 6, evaluations after 0, 2, 3, 5 and 6."""
    config = config_of(project, run)
    config.stage1.iterations = config.stage2.iterations = LAST // 2
    config.stage1.critic.warmup_iterations = config.stage2.critic.warmup_iterations = 1
    config.evaluation.every = config.checkpoint.every = config.checkpoint.keep = 2
    config.rollout.dump = config.metrics.tensorboard = config.metrics.report = True
    return config


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes to which nothing happens, beside its project."""
    out = tmp_path_factory.mktemp("undisturbed")
    run_ranks(train, 2, out / "ranks", config_for(write_project(out / "project"), out / "run"))
    return out / "run"


def numbers(records: list[Record]) -> list[Record]:
    """Records without the time that things took."""
    timing = ("time", "seconds", "idle_share", "tokens_per_second")
    return [
        {k: v for k, v in record.items() if k not in timing and not k.startswith(("time/", "memory_gb/"))}
        for record in records
    ]


def assert_same_end(run: Path, reference: Path, *, samples: bool = True) -> None:
    assert len(read_metrics(run)) == LAST
    assert numbers(read_metrics(run)) == numbers(read_metrics(reference))
    assert numbers(read_evaluations(run)) == numbers(read_evaluations(reference))
    assert (run / "seen.jsonl").read_bytes() == (reference / "seen.jsonl").read_bytes()
    if samples:
        assert read_samples(run) == read_samples(reference)
    exported = Path(f"hf_step_{LAST:08d}")
    names = {path.relative_to(reference) for path in (reference / exported).rglob("*.safetensors")}
    assert {path.parent.name for path in names} == {"actor", "critic"}
    for name in names:
        assert (run / name).read_bytes() == (reference / name).read_bytes()


# What is called, on all ranks, with what; before that call of a step the file is put on a full disk.
MOMENTS: dict[str, tuple[type, str, Callable[..., bool]]] = {
    "seen.jsonl": (Seen, "add", lambda step, *_: step == 5),
    "metrics.jsonl": (Metrics, "step", lambda record: record["step"] == 5),
    "evaluations.jsonl": (Metrics, "evaluation", lambda record: record["step"] == 5),
}


@contextmanager
def on_a_full_disk(path: Path) -> Iterator[None]:
    kept = path.with_suffix(".kept")
    path.rename(kept)
    path.symlink_to("/dev/full")
    try:
        yield
    finally:
        path.unlink()
        kept.rename(path)


def disturbed(config: Config, file: str) -> str:
    """Train until the disk is full; the error that all ranks raise."""
    owner, name, due = MOMENTS[file]
    real = getattr(owner, name)

    def call(self: Any, *arguments: Any) -> None:
        if due(*arguments) and os.environ["RANK"] == "0":
            with on_a_full_disk(Path(config.run.dir) / file):
                real(self, *arguments)
        else:
            real(self, *arguments)

    with patch.object(owner, name, call), pytest.raises(UnwrittenError) as raised:
        train(config)
    return str(raised.value)


@pytest.mark.parametrize("file", MOMENTS)
@pytest.mark.slow
def test_a_full_disk_under_a_record(undisturbed: Path, tmp_path: Path, file: str) -> None:
    run = tmp_path / "run"
    config = config_for(undisturbed.parent / "project", run)
    began = time.monotonic()
    output = run_ranks(disturbed, 2, tmp_path / "first", config, file)
    assert time.monotonic() - began < 100, "no rank waits for another"
    assert output[0] == output[1]
    assert f"{file}: cannot write a record: No space left on device" in output[0]
    assert output[0].endswith(f"; rerun the same command to resume from {run}/checkpoints/step_{4:08d}")
    run_ranks(train, 2, tmp_path / "second", config)
    assert_same_end(run, undisturbed)


@pytest.mark.slow
def test_what_a_run_can_do_without(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for name in ("rollouts", "tensorboard"):  # files, where folders are wanted
        (run / name).touch()
    for name in ("report.html", "heartbeat.json"):
        (run / name).mkdir()
    for name in ("samples.jsonl", "warnings.jsonl"):
        (run / name).symlink_to(tmp_path / "none" / name)
    run_ranks(train, 2, tmp_path / "ranks", config_for(undisturbed.parent / "project", run))
    log = (tmp_path / "ranks/rank0.log").read_text()
    for name in ("samples.jsonl", "warnings.jsonl", "rollouts/", "report.html"):
        assert log.count(f"{name} cannot be written (") == 1, name
    assert log.count("TensorBoard failed (") == 1
    assert log.count("heartbeat.json cannot be written (") == 1
    assert_same_end(run, undisturbed, samples=False)


def unexported(config: Config) -> str:
    """Train until the first of the Hugging Face files does not fit."""

    def full(*arguments: object, **_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with patch.object(hf_folder, "save_file", full), pytest.raises(UnwrittenError) as raised:
        train(config)
    return str(raised.value)


@pytest.mark.slow
def test_a_full_disk_under_the_export(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_for(undisturbed.parent / "project", run)
    output = run_ranks(unexported, 2, tmp_path / "first", config)
    assert output[0] == output[1]
    assert f"{run}/hf_step_{LAST:08d}/actor.partial: Error while serializing" in output[0]
    assert not (run / f"hf_step_{LAST:08d}/actor.partial").exists()
    run_ranks(train, 2, tmp_path / "second", config)
    assert_same_end(run, undisturbed)


def unevaluated(config: Config) -> str:
    with pytest.raises(UnwrittenError) as raised:
        evaluate(config)
    return str(raised.value)


@pytest.mark.slow
def test_a_full_disk_under_an_evaluation(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "responses.jsonl").symlink_to("/dev/full")
    output = run_ranks(unevaluated, 2, tmp_path / "ranks", config_for(undisturbed.parent / "project", run))
    assert output[0] == output[1]
    assert f"{run}/responses.jsonl: cannot write a record: No space left on device; free disk space" in output[0]
    assert output[0].endswith("; an evaluation begins anew: give another run.dir")


DRIVER = """
import shutil, sys
from pathlib import Path
from unittest.mock import patch
from megatron_tempo import cli
from megatron_tempo.observability.metrics import Metrics

config, run, out = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
ballast, step = run / "ballast", Metrics.step

def full(self, record):
    if record["step"] == 5:
        with ballast.open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
    step(self, record)

if __name__ == "__main__":
    with patch.object(Metrics, "step", full):
        first = cli.main(["train", "--config", str(config)])
    assert ballast.exists() and shutil.disk_usage(run).free <= 1 << 12  # the page of the lock, which is gone
    ballast.unlink()
    print("exit status", first, flush=True)
    assert cli.main(["train", "--config", str(config)]) == 0
    shutil.copytree(run, out)
"""


def permitted() -> bool:
    program = shutil.which("unshare")
    mount = "mount -t tmpfs tmpfs /mnt"
    return (
        program is not None
        and subprocess.run([program, "-Urm", "sh", "-c", mount], capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not permitted(), reason="wants a mount namespace of its own, for a small disk: unshare -Urm")
@pytest.mark.slow
def test_a_small_disk_fills_up(undisturbed: Path, tmp_path: Path) -> None:
    run, reference = tmp_path / "run", tmp_path / "reference"
    project = undisturbed.parent / "project"
    for folder in (run, reference):
        save(config_for(project, folder), folder.with_suffix(".json"))
    (tmp_path / "driver.py").write_text(DRIVER)
    run.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    words = [sys.executable, *map(str, (tmp_path / "driver.py", run.with_suffix(".json"), run, tmp_path / "out"))]
    script = f'mount -t tmpfs -o size=256m tmpfs {run} && exec "$@"'
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", *words],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    # Which record is the first that finds no room in the page where its file ends, is of no matter.
    reason = f"cannot write a record: {os.strerror(errno.ENOSPC)}; free disk space"
    assert re.search(rf"error: {run}/(metrics|evaluations).jsonl: {reason}", output), output[-900:]
    assert "exit status 1" in output
    assert f"resumed from {run}/checkpoints/step_{4:08d}, 4 iterations done" in output
    run_ranks(train, 1, tmp_path / "ranks", config_for(project, reference))
    assert_same_end(tmp_path / "out", reference)


def jumping(config: Config) -> list[float]:
    """Train while the clock is set back by five hours, then on by two days; what the forecast says after each step."""
    real, jumps, left, step = time.time, {2: -18_000.0, 5: 172_800.0}, [], Metrics.step
    ahead = 0.0

    def after(self: Metrics, record: Record) -> None:
        nonlocal ahead
        ahead += jumps.get(record["step"], 0.0)
        step(self, record)
        if self._forecast is not None:
            left.append(self._forecast.left() or 0.0)

    with patch.object(time, "time", lambda: real() + ahead), patch.object(Metrics, "step", after):
        train(config)
    return left


@pytest.mark.slow
def test_a_clock_that_is_set(undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    began = time.monotonic()
    left = run_ranks(jumping, 2, tmp_path / "ranks", config_for(undisturbed.parent / "project", run))[0]
    took = time.monotonic() - began
    assert_same_end(run, undisturbed)
    records = read_metrics(run) + read_evaluations(run)
    stamps = [record["time"] for record in read_metrics(run)]
    assert stamps[1] < stamps[0] - 17_000, "the clock was set"
    assert stamps[4] > stamps[3] + 170_000
    durations = [v for r in records for k, v in r.items() if k == "seconds" or k.startswith("time/")]
    assert all(0 <= seconds <= took for seconds in durations)
    assert len(left) == LAST
    assert all(0 <= seconds <= 10 * took for seconds in left)
    beat = json.loads((run / "heartbeat.json").read_text())
    assert 0 <= beat["since"] - beat["started"] <= took
    assert not read_warnings(run)
