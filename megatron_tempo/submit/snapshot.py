"""Snapshots of the code and the configuration that a job runs, in the run's folder: RUN/jobs/0001, 0002, ...

    config.json      the composed configuration
    code/            megatron_tempo, configs, launch
    revision.txt     revision of the git checkout, if it is one; changes.diff: uncommitted changes
    train.sbatch     the script (or eval.sbatch, convert.sbatch)
    ids              SLURM's ids of the jobs, one per line

A job that waits in the queue for a day runs what was submitted, even if the checkout has changed since. No folder is
ever overwritten: each submission gets the next number.
"""

from __future__ import annotations

import filecmp
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.problem import ConfigErrors
from megatron_tempo.config.schema import Config
from megatron_tempo.config.shipped import source
from megatron_tempo.config.tree import differences, load, save
from megatron_tempo.files import atomic_folder

CODE = ("megatron_tempo", "configs", "launch")
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "shipped")  # shipped: a wheel's copy of configs and launch


def jobs(run: Path) -> list[Path]:
    """The folders of the jobs that were submitted for a run, oldest first."""
    return sorted(path for path in (run / "jobs").glob("[0-9]" * 4) if path.is_dir())


def next_folder(run: Path) -> Path:
    """The folder of a run's next job."""
    before = jobs(run)
    return run / "jobs" / f"{int(before[-1].name) + 1 if before else 1:04d}"


def take(folder: Path, repository: Path, config: Config, script: tuple[str, str]) -> None:
    """Write the snapshot to a temporary folder and rename it to `folder` when it is complete. `script`: name and text.

    Raises FileExistsError if another submission has created the folder meanwhile, OSError if a file cannot be written.
    """
    try:
        with atomic_folder(folder) as partial:
            for name in CODE:
                shutil.copytree(source(repository, name), partial / "code" / name, ignore=_LEFT_OUT)
            save(config, partial / "config.json")
            (partial / script[0]).write_text(script[1], encoding="utf-8")
            (partial / script[0]).chmod(0o755)
            if revision := _git(repository, "rev-parse", "HEAD"):
                (partial / "revision.txt").write_text(revision)
                (partial / "changes.diff").write_text(_git(repository, "diff", "HEAD", "--", *CODE))
    except FileExistsError as error:
        raise FileExistsError(f"{folder} has just been created by another submission: try again") from error


def changes(folder: Path, repository: Path, config: Config) -> Iterator[str]:
    """What differs now from an older job's folder, one line each."""
    try:
        yield from differences(load(folder / "config.json"), config)
    except (OSError, ConfigErrors, ValueError) as error:
        yield f"config.json cannot be compared: {error}"
    changed = [path for name in CODE for path in _unequal(folder / "code" / name, source(repository, name), name)]
    if changed:
        yield f"code: {', '.join(changed[:5])}{f' and {len(changed) - 5} more' if len(changed) > 5 else ''}"


def _unequal(before: Path, now: Path, name: str) -> Iterator[str]:
    """Files that only one folder has, or that differ."""
    files = {path.relative_to(top) for top in (before, now) for path in top.rglob("*") if path.is_file()}
    for file in sorted(file for file in files if not {"__pycache__", "shipped"} & set(file.parts)):
        paths = before / file, now / file
        if not all(path.is_file() for path in paths) or not filecmp.cmp(*paths, shallow=False):
            yield f"{name}/{file}"


def _git(repository: Path, *words: str) -> str:
    """The output of git in the repository; empty without git or a checkout."""
    if not (repository / ".git").exists():  # a wheel in an environment below somebody else's repository
        return ""
    try:
        done = subprocess.run(["git", "-C", str(repository), *words], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""
