"""SLURM's queue: submit jobs, and list those that wait or run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from megatron_tempo.errors import InputError

IDS = "ids"  # file in a job's folder


def active(folders: list[Path]) -> list[str]:
    """The ids of the jobs of these folders that wait or run."""
    submitted = {word for folder in folders if (folder / IDS).exists() for word in (folder / IDS).read_text().split()}
    if not submitted:
        return []
    user = str(os.getuid())
    listed = _call(["squeue", "--noheader", f"--user={user}", "--format=%A"])
    return sorted(submitted & set(listed.split()), key=int)


def put(script: Path, chain: int) -> list[str]:
    """Submit a script `chain` times; each job starts when the one before has ended, with any status. Returns their ids.

    If sbatch fails, raises InputError with its message, after cancelling the jobs that were submitted before.
    """
    ids: list[str] = []
    for left in reversed(range(chain)):
        dependency = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        arguments = [str(left)] if chain > 1 else []  # the number of jobs that follow
        try:
            ids.append(_call(["sbatch", "--parsable", *dependency, str(script), *arguments]).strip().partition(";")[0])
        except InputError:
            if ids:
                _call(["scancel", *ids])
            raise
        with (script.parent / IDS).open("a", encoding="utf-8") as file:
            file.write(ids[-1] + "\n")
    return ids


def _call(words: list[str]) -> str:
    if shutil.which(words[0]) is None:
        raise InputError(
            f"{words[0]} is not installed on this machine: submit from a login node of the cluster, or use --dry-run"
        )
    done = subprocess.run(
        words, capture_output=True, text=True, errors="replace", check=False, env=_outside(os.environ)
    )
    if done.returncode:
        raise InputError(f"{words[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


# Variables that describe the site to SLURM's commands, not the allocation in which they are called.
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_TIME_FORMAT", "SLURM_DEBUG_FLAGS")
# Variables that an allocation, one of its steps or a launcher sets for its own processes. sbatch would pass them to the
# job, where SLURM_MEM_PER_CPU makes srun fail if the job has its own SLURM_MEM_PER_NODE.
_OF_A_JOB = (
    "SLURM_",
    "SLURMD_",
    "SRUN_",
    "PMI_",
    "PMIX_",
    "OMPI_",
    "TORCHELASTIC_",
    "MASTER_",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
)
_OF_ITS_DEVICES = ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def _outside(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables of the allocation, if any, in which this command runs."""
    inside = any(name in environment for name in ("SLURM_JOB_ID", "SLURM_JOBID", "RANK"))
    return {
        name: value
        for name, value in environment.items()
        if not inside or name in _OF_THE_SITE or not (name.startswith(_OF_A_JOB) or name in _OF_ITS_DEVICES)
    }
