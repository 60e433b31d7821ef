"""What launchers leave in the environment: processes that do not know of each other are refused."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.errors import InputError, Stopped
from megatron_tempo.runtime.launcher import is_restarted_on_failure, launched_processes
from tests.unit.config_files import good_overrides, write_all

RANKS = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "processes"),
    [
        ({}, 1),
        ({"WORLD_SIZE": "4"}, 1),
        ({"SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"SLURM_NTASKS": "8"}, 1),  # of a batch script, whose step has one task
        (RANKS, 2),
        (RANKS | {"SLURM_STEP_NUM_TASKS": "2"}, 2),
        (RANKS | {"MASTER_ADDR": "::1"}, 2),
    ],
)
def test_a_launch_that_is_whole(environment: dict[str, str], processes: int) -> None:
    assert launched_processes(environment) == processes


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 processes, and RANK is not set"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "mpirun started 4 processes"),
        ({"PMI_SIZE": "4"}, "mpirun started 4 processes"),
        ({"RANK": "0"}, "RANK=0 is set, and WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        (RANKS | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no whole number"),
        (RANKS | {"RANK": "-1"}, "RANK=-1 in the environment is no whole number"),
        (RANKS | {"RANK": "2"}, "RANK=2 in the environment must be below WORLD_SIZE=2"),
        (RANKS | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment is no port"),
        (
            RANKS | {"MASTER_ADDR": "no.such.host.invalid"},
            "MASTER_ADDR=no.such.host.invalid in the environment does not",
        ),
        (RANKS | {"MASTER_ADDR": "a" * 300}, "does not resolve"),
    ],
)
def test_a_launch_that_is_not(environment: dict[str, str], wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, *_: object, **__: object) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(InputError) as caught:
        launched_processes(environment)
    assert wrong in str(caught.value)


@pytest.mark.long
def test_srun_without_ranks_starts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_all(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for local, lines in (("0", 1), ("1", 0)):  # once a node
        monkeypatch.setenv("SLURM_LOCALID", local)
        assert cli.main(["train", *good_overrides(tmp_path)]) == 2
        assert capsys.readouterr().err.count("srun started 2 processes") == lines
    assert not (tmp_path / "run").exists()
    assert cli.main(["check", *good_overrides(tmp_path)]) == 0


@pytest.mark.parametrize(("restarts", "status"), [(None, cli.STOPPED), ("0", cli.STOPPED), ("3", 0)])
def test_torchrun_does_not_restart_what_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restarts: str | None, status: int
) -> None:
    def stop(*_: object) -> None:
        raise Stopped("stopped after 3 iterations")

    write_all(tmp_path)
    monkeypatch.setattr(cli, "_run", stop)
    if restarts is not None:
        monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    assert cli.main(["train", *good_overrides(tmp_path)]) == status
    assert is_restarted_on_failure() == (status == 0)
