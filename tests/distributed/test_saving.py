"""Checkpoints are written while training goes on, and fail in the same words on every rank."""

from __future__ import annotations

import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_tempo.checkpoint import saving
from megatron_tempo.config.schema import Config
from megatron_tempo.training.jobs import train
from megatron_tempo.training.trainer import Trainer
from tests.support.checkpoints import different
from tests.support.matrix import matrix
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks

ITERATIONS = 4


def run_config(project: Path, run: Path, pipeline: int = 2) -> Config:
    """Of two pipeline stages by default."""
    config = config_of(project, run)
    config.parallel.pipeline = pipeline
    config.stage2.iterations = ITERATIONS
    config.evaluation.sets, config.evaluation.calibration_set = {}, None
    config.checkpoint.every, config.checkpoint.keep = 2, 9
    config.checkpoint.export_hf = False
    return config


def held_up(config: Config) -> None:
    """Train, with the first checkpoint's files held up until one more iteration is done."""
    write, iterate, go = saving.write_model, Trainer.iterate, threading.Event()

    def held(*args: Any, **kwargs: Any) -> saving.WrittenShare:
        assert go.wait(100)
        return write(*args, **kwargs)

    def iterated(run: Trainer, *args: object) -> object:
        metrics = iterate(run, *args)
        if run.step == 3:
            assert run.state.checkpoints.saved is None
            go.set()
        return metrics

    saving.write_model, Trainer.iterate = held, iterated
    try:
        train(config)
    finally:
        saving.write_model, Trainer.iterate = write, iterate


@pytest.mark.parametrize("world", matrix([1, 2], [2]))
def test_training_goes_on_and_does_not_change_what_is_written(tmp_path: Path, world: int) -> None:
    project = write_project(tmp_path / "project")
    waits = run_config(project, tmp_path / "waits", world)
    waits.checkpoint.asynchronous = False
    run_ranks(train, world, tmp_path / "ranks", waits)
    run_ranks(held_up, world, tmp_path / "held", run_config(project, tmp_path / "goes_on", world))
    for step in (2, 4):
        name = f"checkpoints/step_{step:08d}"
        assert different(tmp_path / "goes_on" / name, tmp_path / "waits" / name) == []


def cramped(config: Config, rank: int) -> str:
    """Train where one rank may not write files beyond 100 kB from its second iteration on: what it says."""
    limits, iterate = resource.getrlimit(resource.RLIMIT_FSIZE), Trainer.iterate

    def iterated(run: Trainer, *args: object) -> object:
        run.state.checkpoints.wait()
        if run.step == 2 and dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        return iterate(run, *args)

    Trainer.iterate = iterated
    try:
        train(config)
    except OSError as error:
        return str(error)
    finally:
        Trainer.iterate = iterate
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "no error"


@pytest.mark.parametrize("rank", matrix([0, 1], [1]))
def test_a_file_that_cannot_be_written_ends_the_run_on_every_rank(tmp_path: Path, rank: int) -> None:
    config = run_config(write_project(tmp_path / "project"), tmp_path / "run")
    messages = run_ranks(cramped, 2, tmp_path / "cramped", config, rank)
    assert messages[0] == messages[1]
    below = tmp_path / "run/checkpoints"
    assert messages[0].startswith(f"{below}/step_00000004.partial/")
    assert ": File too large; free disk space" in messages[0]
    assert f"; rerun the same command to resume from {below}/step_00000002" in messages[0]
    assert [path.name for path in below.iterdir()] == ["step_00000002"], "what was begun of the other makes room again"
    run_ranks(train, 2, tmp_path / "again", config)
    undisturbed = run_config(tmp_path / "project", tmp_path / "undisturbed")
    run_ranks(train, 2, tmp_path / "ranks", undisturbed)
    assert different(below / "step_00000004", tmp_path / "undisturbed/checkpoints/step_00000004") == []


def goes_down(config: Config) -> str:
    """Train, with an error in the iteration that follows the first checkpoint, whose files take their time."""
    write, iterate = saving.write_model, Trainer.iterate

    def slow(*args: Any, **kwargs: Any) -> saving.WrittenShare:
        time.sleep(0.5)
        return write(*args, **kwargs)

    def iterated(run: Trainer, *args: object) -> object:
        if run.step == 2:
            assert run.state.checkpoints.saved is None
            raise ZeroDivisionError
        return iterate(run, *args)

    saving.write_model, Trainer.iterate = slow, iterated
    try:
        train(config)
    except ZeroDivisionError:
        return "down"
    finally:
        saving.write_model, Trainer.iterate = write, iterate
    return "up"


def test_a_run_that_goes_down_finishes_the_checkpoint_that_it_has_begun(tmp_path: Path) -> None:
    config = run_config(write_project(tmp_path / "project"), tmp_path / "run")
    assert run_ranks(goes_down, 2, tmp_path / "ranks", config) == ["down", "down"]
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir()
