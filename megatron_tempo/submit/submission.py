"""Submits a checked configuration: takes the snapshot and puts the jobs into SLURM's queue."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from megatron_tempo.errors import InputError
from megatron_tempo.submit import queue, snapshot
from megatron_tempo.submit.job import Job
from megatron_tempo.submit.script import render

log = logging.getLogger(__name__)


def preview(job: Job, repository: Path) -> str:
    """The script as it would be submitted now."""
    return render(job, repository / "launch", snapshot.next_folder(job.run), Path.cwd())


def submit(job: Job, repository: Path, chain: int) -> str:
    """Take the snapshot and submit it. Returns what was submitted, in a line.

    Raises InputError if jobs of the same run already wait or run, or if sbatch fails; the snapshot is then removed.
    """
    before = snapshot.jobs(job.run)
    if busy := queue.active(before):
        raise InputError(
            f"run.dir={job.config.run.dir}: job {', '.join(busy)} of this run waits or runs; two would overwrite each "
            f"other's files; scancel {' '.join(busy)}, or give another run.dir"
        )
    if before and (changes := list(snapshot.changes(before[-1], repository, job.config))):
        log.info("%s", "\n  ".join([f"differences from {before[-1]}:", *changes]))
    folder, name = snapshot.next_folder(job.run), f"{job.kind.name}.sbatch"
    text = render(job, repository / "launch", folder, Path.cwd())
    try:
        snapshot.take(folder, repository, job.config, (name, text))
    except OSError as error:
        raise InputError(f"the snapshot cannot be written: {error}") from error
    try:
        ids = queue.put(folder / name, chain)
    except InputError:
        shutil.rmtree(folder)
        raise
    return f"submitted job {' -> '.join(ids)} from {folder}; its output is in {folder}/{ids[0]}.out"
