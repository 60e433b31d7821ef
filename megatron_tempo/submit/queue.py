"""SLURM's queue: what goes in, what is in it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from megatron_tempo.errors import InputError

IDS = "ids"  # below a job's folder


def active(folders: list[Path]) -> list[str]:
    """The jobs of these folders that wait or run."""
    submitted = {word for folder in folders if (folder / IDS).exists() for word in (folder / IDS).read_text().split()}
    if not submitted:
        return []
    user = str(os.getuid())
    listed = _call(["squeue", "--noheader", f"--user={user}", "--format=%A"])
    return sorted(submitted & set(listed.split()), key=int)


def put(script: Path, chain: int) -> list[str]:
    """Submit a script, or `chain` of it, each to start when the one before has ended however it did. Their numbers.

    Raises InputError with what sbatch says where it refuses; what went in before that is taken out again.
    """
    ids: list[str] = []
    for left in reversed(range(chain)):
        behind = [f"--dependency=afterany:{ids[-1]}"] if ids else []
        words = [str(left)] if chain > 1 else []  # the script is told how many follow it
        try:
            ids.append(_call(["sbatch", "--parsable", *behind, str(script), *words]).strip().partition(";")[0])
        except InputError:
            if ids:
                _call(["scancel", *ids])
            raise
        with (script.parent / IDS).open("a", encoding="utf-8") as file:
            file.write(ids[-1] + "\n")
    return ids


def _call(words: list[str]) -> str:
    if shutil.which(words[0]) is None:
        raise InputError(f"there is no {words[0]} here: submit from a login node of the cluster, or use --dry-run")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{words[0]} refused: {(done.stderr or done.stdout).strip()}")
    return done.stdout
