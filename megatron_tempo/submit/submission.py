"""A submission from the checked configuration to the numbers of its jobs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_tempo.errors import InputError
from megatron_tempo.submit import queue, snapshot
from megatron_tempo.submit.job import Job
from megatron_tempo.submit.script import render


def preview(job: Job, repository: Path) -> str:
    """The script as it would be submitted now."""
    return render(job, repository / "launch", snapshot.next_folder(job.run), Path.cwd())


def submit(job: Job, repository: Path, chain: int, log: Callable[[str], None]) -> list[str]:
    """Take the snapshot and submit it. Returns SLURM's numbers of the jobs.

    Raises InputError if jobs of the same run wait or run already, or if sbatch refuses; the snapshot is then removed.
    """
    before = snapshot.jobs(job.run)
    if busy := queue.active(before):
        raise InputError(
            f"job {', '.join(busy)} of run.dir={job.config.run.dir} waits or runs: two would write over one another; "
            f"scancel {' '.join(busy)}, or give another run.dir"
        )
    if before and (changes := list(snapshot.changes(before[-1], repository, job.config))):
        log("\n  ".join([f"otherwise than in {before[-1]}:", *changes]))
    folder, name = snapshot.next_folder(job.run), f"{job.kind.name}.sbatch"
    text = render(job, repository / "launch", folder, Path.cwd())
    try:
        snapshot.take(folder, repository, job.config, (name, text))
    except OSError as error:
        raise InputError(f"no snapshot could be taken: {error}") from error
    try:
        ids = queue.put(folder / name, chain)
    except InputError:
        shutil.rmtree(folder)
        raise
    log(f"submitted job {' -> '.join(ids)} from {folder}; it tells what it does in {folder}/{ids[0]}.out")
    return ids
