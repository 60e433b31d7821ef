"""A run that is told to stop: by a signal to one of its processes, or by a file. All ranks stop at the same step."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import load, save
from megatron_tempo.errors import Stopped
from megatron_tempo.runtime.stop_request import ONE_REQUEST, StopRequests, ctrl_c
from megatron_tempo.training.jobs import train
from megatron_tempo.training.trainer import Trainer
from tests.support.fork_server import FORK_SERVER
from tests.support.ports import reserve_port
from tests.support.project import config_of, write_project
from tests.support.ranks import rank_environments, run_ranks


def heard(folder: Path) -> list[str | None]:
    """What each of several questions is answered with, as things happen."""
    dist.init_process_group("gloo")
    rank, messages = dist.get_rank(), []
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequests(folder, grace_seconds=None) as stop_requests, stop_requests.agreed():
        messages.append(stop_requests.requested(is_writer=rank == 0))
        if rank == 1:
            (folder / "stop").touch()
        dist.barrier()
        messages.append(stop_requests.requested(is_writer=rank == 0))
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        messages.append(stop_requests.requested(is_writer=rank == 0))
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # as a launcher does, which has received it too
        messages.append(stop_requests.requested(is_writer=rank == 0))
    assert signal.getsignal(signal.SIGUSR1) is before
    dist.destroy_process_group()
    return messages


def test_ranks_hear_of_what_reached_one_of_them(tmp_path: Path) -> None:
    first, second = run_ranks(heard, 2, tmp_path / "ranks", tmp_path)
    assert first == second == [None, "file", "USR1", "TERM"]


def waits_for_a_missing_rank(folder: str) -> None:
    with StopRequests(Path(folder), grace_seconds=None):
        Path(folder, "waits").touch()
        dist.init_process_group("gloo")


def evaluation_waits(folder: str) -> None:
    with ctrl_c(raises=False):
        with pytest.raises(KeyboardInterrupt), ctrl_c(raises=True):
            signal.raise_signal(signal.SIGINT)
        Path(folder, "waits").touch()
        dist.init_process_group("gloo")


def waits_for_good(folder: str) -> None:
    """As a rank in a collective does when the others are gone."""
    with StopRequests(Path(folder), grace_seconds=None) as stop_requests, stop_requests.agreed():
        Path(folder, "waits").touch()
        dist.TCPStore("127.0.0.1", reserve_port(), 2, is_master=True)  # waits for a second process


def ended_by(target: Callable[[str], None], folder: Path, *numbers: signal.Signals) -> tuple[int, str]:
    """Exit status and output of a process that gets these signals, more than a repeated request apart."""
    log = folder / "log"
    environment = rank_environments(2)[0]
    process = FORK_SERVER.call(f"{__name__}:{target.__name__}", str(folder), environment=environment, log=log)
    try:
        deadline = time.monotonic() + 60
        while not (folder / "waits").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        for place, number in enumerate(numbers):
            time.sleep(1.2 * ONE_REQUEST if place else 0)
            assert process.poll() is None
            os.kill(process.pid, number)
        return process.wait(timeout=10), log.read_text()
    finally:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_group_is_up_it_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    code, output = ended_by(waits_for_a_missing_rank, tmp_path, number)
    assert (code, output) == (128 + number, f"stopped by {name} before the run began\n")


def test_an_evaluation_whose_ranks_are_missing_ends_too(tmp_path: Path) -> None:
    assert ended_by(evaluation_waits, tmp_path, signal.SIGINT) == (-signal.SIGINT, "")


def test_a_second_request_ends_a_stuck_process(tmp_path: Path) -> None:
    code, output = ended_by(waits_for_good, tmp_path, signal.SIGINT, signal.SIGTERM)
    assert code == 143
    assert output == "ended at once by a second TERM: the same command resumes from the last checkpoint\n"


def test_a_long_wait_is_warned_of_once(tmp_path: Path) -> None:
    stop_requests = StopRequests(tmp_path, grace_seconds=0.05)
    assert stop_requests.late() is None, "until the first call nothing could be lost"
    assert stop_requests.late() is None
    time.sleep(0.1)
    warning = stop_requests.late()
    assert warning is not None
    assert "cluster.slurm.grace_seconds=0.05" in warning
    time.sleep(0.1)
    assert stop_requests.late() is None
    assert StopRequests(tmp_path, grace_seconds=None).late() is None


def stopped_at(config: Config, rank: int, step: int, number: int) -> str:
    """What a run says that gets a signal on one rank, in the iteration behind `step`; nothing if it ends."""
    iterate = Trainer.iterate

    def signalled(self: Trainer, *stage: object) -> dict:
        if self.step == step and self.context.layouts.actor.rank == rank:
            os.kill(os.getpid(), number)
        return iterate(self, *stage)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "iterate", signalled)
        try:
            train(config)
        except Stopped as stopped:
            return str(stopped)
    return ""


def bits(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.glob("hf_step_*/*/*.safetensors")}


def test_it_goes_on_to_the_same_end(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    configs = []
    for name in ("stopped", "undisturbed"):
        config = config_of(project, tmp_path / name)
        config.stage1.iterations, config.stage2.iterations = 1, 2
        config.checkpoint.every = 0
        save(config, tmp_path / f"{name}.json")
        configs.append(load(tmp_path / f"{name}.json"))
    run = tmp_path / "stopped"
    # In the last iteration of a stage, behind which an evaluation is due: it is made when the run goes on.
    messages = run_ranks(stopped_at, 2, tmp_path / "first", configs[0], 1, 0, signal.SIGUSR1)
    where = run / "checkpoints/step_00000001"
    message = f"stopped after 1 iterations, as requested by USR1; rerun the same command to resume from {where}"
    assert messages == [message] * 2
    record = json.loads((run / "stopped.json").read_text())
    assert (record["step"], record["why"]) == (1, "USR1")
    assert where.exists()
    (run / "stop").touch()  # before the next iteration: nothing is done, and nothing new saved
    assert run_ranks(stopped_at, 2, tmp_path / "second", configs[0], 0, -1, 0)[0].startswith("stopped after 1 iterat")
    assert not (run / "stop").exists(), "the wish is fulfilled"
    assert run_ranks(stopped_at, 2, tmp_path / "third", configs[0], 0, -1, 0) == ["", ""]
    assert run_ranks(stopped_at, 2, tmp_path / "whole", configs[1], 0, -1, 0) == ["", ""]
    assert bits(run) == bits(tmp_path / "undisturbed") != {}
    points = [json.loads(line)["point"] for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert points == ["before", "between", "after"]
