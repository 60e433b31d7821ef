"""The launched processes, as the environment describes them. Checked before any of them writes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from megatron_tempo.errors import InputError

# Variables in which launchers other than torchrun give the number of processes: srun (of a step), Open MPI, and PMI
# (MPICH, Intel MPI and others).
_OTHERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")


def launched_processes(environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes of this run.

    Raises InputError if several processes were started without knowing of each other (each would be a separate run in
    the same folder), or if the variables of torch.distributed are incomplete.
    """
    if "RANK" not in environment:
        for name, launcher in _OTHERS.items():
            count = environment.get(name, "")
            if count.isdecimal() and int(count) > 1:
                raise InputError(
                    f"{launcher} started {count} processes, and RANK is not set, so each would be a run of its own in "
                    f"the same folder. On one machine: torchrun --nproc-per-node {count} -m megatron_tempo ...; on "
                    f"several: megatron-tempo submit, or {launcher} with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and "
                    f"MASTER_PORT set as launch/process.sh and launch/common.sh do"
                )
        return 1
    absent = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if absent:
        raise InputError(
            f"RANK={environment['RANK']} is set, and {', '.join(absent)} not: launch with torchrun, set all of them, "
            f"or unset RANK for a single process"
        )
    for name in _NUMBERS:
        text = environment.get(name, "0")
        if not text.isdecimal():
            raise InputError(f"{name}={text} in the environment is no whole number: launch with torchrun, or set it")
    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank >= world:
        raise InputError(f"RANK={rank} in the environment must be below WORLD_SIZE={world}: launch with torchrun")
    if world > 1:
        _check_master(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]))
    return world


def _check_master(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise InputError(f"MASTER_PORT={port} in the environment is no port: give one from 1 to 65535")
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"MASTER_ADDR={host} in the environment does not resolve on {socket.gethostname()} ({error}): give the "
            f"first node's IP address, or a name that every node resolves"
        ) from error


def is_restarted_on_failure(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether torchrun restarts the processes if they end with any status but 0 (--max-restarts)."""
    text = environment.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return text.isdecimal() and int(text) > 0
