"""SLURM's queue: submit jobs, and list those that wait or run."""

from __future__ import annotations

import os
import shutil
import subprocess
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
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{words[0]} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout
