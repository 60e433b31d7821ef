"""Rules on the run's folder, its device, its rollout folders and its profile."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.choices import Device, Precision
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.resume import checkpoint_folders
from megatron_tempo.config.rules.files import wrong_with_folder
from megatron_tempo.config.rules.rewards import runs_programs
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import MISSING


def check(config: Config, *, training: bool) -> Iterator[Problem]:
    if config.run.device is Device.cpu and config.run.precision is not Precision.fp32:
        wrong = "training on a CPU is done in fp32"
        yield Problem("run.precision", config.run.precision, wrong, "run.precision=fp32, or run.device=cuda")
    if config.run.dir != MISSING:
        yield from _folder(config, training)
    if training and config.rollout.replay is not None:
        yield from _replay(config, config.rollout.replay)
    if training:
        yield from _profile(config)
    yield from _hang(config)


def _profile(config: Config) -> Iterator[Problem]:
    total = sum(stage.iterations for stage in config.stages().values())
    steps = config.profile.steps
    if any(step < 1 for step in steps):
        yield Problem("profile.steps", steps, "iterations count from 1", "profile.steps=[1]")
    elif total and any(step > total for step in steps):
        fix = f"profile.steps={[step for step in steps if step <= total]}".replace(" ", "")
        yield Problem("profile.steps", steps, f"the run has {total} iterations", fix)


def _hang(config: Config) -> Iterator[Problem]:
    """Waits without progress have their own time limits, which must end before the watchdog aborts."""
    limits: dict[str, float] = {"rewards.math.seconds": config.rewards.math.seconds}
    if config.rollout.is_served:
        servers = config.rollout.servers
        limits["rollout.servers.update_seconds"] = servers.update_seconds
        limits["rollout.servers.hang_seconds"] = servers.hang_seconds
    if runs_programs(config):
        limits["rewards.code.wall_seconds"] = config.rewards.code.wall_seconds
    if config.rewards.judge.url is not None:
        limits["rewards.judge.timeout_seconds"] = config.rewards.judge.timeout_seconds
    minutes = config.run.hang_minutes
    name = max(limits, key=lambda name: limits[name], default=None)
    if name is not None and minutes is not None and 0 < minutes * 60 <= limits[name]:
        wrong = f"a wait of {name}={limits[name]:g} would count as a hang"
        fix = f"run.hang_minutes above {limits[name] / 60:g}, or run.hang_minutes=null"
        yield Problem("run.hang_minutes", minutes, wrong, fix)


def _folder(config: Config, training: bool) -> Iterator[Problem]:
    folder = Path(config.run.dir)
    nearest = folder.absolute()
    while (wrong := wrong_with_folder(nearest)) == "does not exist":
        if nearest.is_symlink():
            wrong = f"is a link to {os.readlink(nearest)}, which does not exist"
            yield Problem("run.dir", config.run.dir, f"{nearest} {wrong}", "mount it, or give another run.dir")
            return
        nearest = nearest.parent
    if wrong:
        wrong = "is a file, not a folder" if wrong == "is not a folder" else wrong
        yield Problem("run.dir", config.run.dir, f"{nearest} {wrong}", "give another run.dir")
        return
    if reason := _unwritable(nearest):
        fix = "free disk space, make the directory writable, or give another run.dir"
        yield Problem("run.dir", config.run.dir, f"{nearest} cannot be written: {reason}", fix)
    else:
        yield from _inside(config, folder)
    if not training:
        yield from _used(config, folder)
    if training and not config.run.resume and checkpoint_folders(folder):
        fix = "run.resume=true to resume from them, or another run.dir"
        yield Problem("run.resume", False, f"{folder} already has checkpoints", fix)


def _used(config: Config, folder: Path) -> Iterator[Problem]:
    """An evaluation must not write into another job's folder."""
    used = next((name for name in ("evaluations.jsonl", "config.json") if (folder / name).exists()), None)
    if used is not None:
        wrong = f"belongs to another job: it has {used}"
        fix = "give a folder of its own, or no run.dir: an evaluation then gets a new one in runs/eval"
        yield Problem("run.dir", config.run.dir, wrong, fix)


def _inside(config: Config, folder: Path) -> Iterator[Problem]:
    """Files of an earlier job, perhaps another user's, must be writable."""
    for name in ("metrics.jsonl", "evaluations.jsonl", "seen.jsonl", "config.json"):
        path = folder / name
        if path.exists() and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
            yield Problem("run.dir", config.run.dir, f"{path} is not a file that can be written", _OTHERS)
    for name in ("checkpoints", *(["rollouts"] if config.rollout.dump else [])):
        path = folder / name
        if path.exists() and (reason := _unwritable(path)):
            yield Problem("run.dir", config.run.dir, f"{path} cannot be written: {reason}", _OTHERS)


_OTHERS = "chown or move what an earlier job left there, or give another run.dir"


def _unwritable(folder: Path) -> str | None:
    """Why a folder cannot be written, None if it can. Writes an unnamed file: permissions do not show a full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return None


def _replay(config: Config, replay: str) -> Iterator[Problem]:
    if replay != MISSING and (wrong := wrong_with_folder(Path(replay))):
        fix = "give the rollouts/ folder that a run with rollout.dump=true wrote, or rollout.replay=null"
        yield Problem("rollout.replay", replay, wrong, fix)
    dumped = Path(config.run.dir) / "rollouts"
    if config.rollout.dump and os.path.realpath(replay) == os.path.realpath(dumped):
        wrong = "rollout.dump would write into the folder that is replayed"
        yield Problem("rollout.replay", replay, wrong, "rollout.dump=false, or another run.dir")
