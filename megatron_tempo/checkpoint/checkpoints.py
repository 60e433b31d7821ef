"""Checkpoints: actor, critic, optimizers and the run's state, written completely or not at all.

    RUN/checkpoints/step_00000040/
        actor/  critic/    Megatron distributed checkpoints: weights and optimizer, loadable in any layout
        run.json           step, streams, optimizer step counts, config
        MANIFEST.json      size and CRC-32 of every file; a folder whose files differ from it is damaged

A folder appears under its name only when it is complete. Only folders named `step_` and eight digits, the step of their
run.json, count as checkpoints; other files there are left alone. RUN/last_checkpoint.json notes the last complete
one. It tells a run whose checkpoints are gone from one that had none yet. There is no random-number state to
save: every draw of a run comes from a generator that is seeded by the run's seed and the draw's own name
(`types.seed_of`).
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.checkpoint import manifest, optimizer_files
from megatron_tempo.checkpoint.loading import FORMAT, GATHERED, cannot_read, load_model
from megatron_tempo.checkpoint.saving import ModelSource, Saving
from megatron_tempo.config.resume import step_folders
from megatron_tempo.errors import InputError
from megatron_tempo.files import partial_of, replace_file
from megatron_tempo.models.parallel import COLLECTIVE_TIMEOUT, Layout
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.observability.console import readable
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.weights.param_mapping import is_of_expert

log = logging.getLogger(__name__)

LAST = "last_checkpoint.json"  # in the run's folder: {"step": the last complete checkpoint's, or null}
# A checkpoint's bytes per parameter in addition to its weights: Adam's main weight and two moments, in fp32.
OPTIMIZER_BYTES = 12
_PARTIAL = re.compile(r"step_\d{8}\.partial")


@dataclass(frozen=True, slots=True)
class LatestCheckpoint:
    """The newest complete checkpoint, and the later ones that are damaged, with the reasons."""

    path: Path | None
    state: dict[str, Any]  # of `path`; empty without one
    damaged: tuple[tuple[Path, str], ...]


class Checkpoints:
    """The checkpoints of one run. The latest may still be being written. All methods are collective."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        layout: Layout,
        *,
        asynchronous: bool = True,
        timeout: timedelta = COLLECTIVE_TIMEOUT,
    ) -> None:
        """`keep`: number of complete checkpoints to keep. `asynchronous`: `save` returns as soon as the state is copied
        and the models may change. `timeout`: how long a rank that has written its files waits for the others."""
        self.folder, self._keep, self._layout = folder, keep, layout
        self._asynchronous = asynchronous
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._saving: Saving | None = None
        self._sources: dict[str, ModelSource] = {}  # by model name
        self.saved: int | None = None  # step of the latest checkpoint that was complete when written or read

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def check_room(self, models: dict[str, TrainedModel]) -> None:
        """Raises InputError if the disk has no space for one checkpoint; warns if it has none for `keep` of them."""
        size, (free, kept) = _size(models), self._agreed(lambda: [self._free(), len(self._own())])
        space = f"{self.folder}: a checkpoint takes {_gb(size)}, and the disk has {_gb(free)} free"
        if free < size:
            raise InputError(f"{space}; free disk space, or give a run.dir on another disk")
        wanted = self._keep + 1 - kept  # one is written before one is removed
        if free < wanted * size and self._layout.is_writer:
            advice = "free disk space, or keep fewer"
            log.warning("%s, but checkpoint.keep=%d needs space for %d more; %s", space, self._keep, wanted, advice)

    def reserve(self, models: dict[str, TrainedModel]) -> None:
        """Allocate the host memory that checkpoints are copied to. Raises InputError, on every rank, if that fails."""

        def allocate() -> None:
            for name, model in models.items():
                with model.at_work():
                    self._source(name, model).reserve()

        raise_on_all_ranks(allocate, self._group)

    def save(self, step: int, models: dict[str, TrainedModel], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint. When it is complete, all but the last `keep` are removed. `state`: JSON data.

        Waits for the previous checkpoint if that is still being written. Raises UnwrittenError, on every rank, if
        either cannot be written; complete checkpoints stay.
        """
        self.wait()
        path = self.path(step)
        size = _size(models)

        def begin() -> None:
            if not self._layout.is_writer:
                return
            shutil.rmtree(partial_of(path), ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._free() < size:
                words = f"the checkpoint takes {_gb(size)}, and the disk has {_gb(self._free())} free"
                raise OSError(errno.ENOSPC, words, str(path))
            for name in models:
                (partial_of(path) / name / optimizer_files.FOLDER).mkdir(parents=True)

        raise_on_all_ranks(begin, self._group)
        shares = {}
        for name, model in models.items():
            with model.at_work():
                shares[name] = self._source(name, model).copy()
        counts = {name: model.step_count for name, model in models.items()}
        state = state | {"step": step, "format": FORMAT, "optimizer_steps": counts}
        self._saving = Saving(path, shares, state, self._group, partial(self._completed, step))
        if not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Note whether the current save is complete. Raises UnwrittenError, on every rank, if it failed on any."""
        if self._saving is None:
            return
        ended = self._saving.has_ended
        state = torch.tensor([ended, not (ended and self._saving.error is not None)])
        dist.all_reduce(state, op=dist.ReduceOp.MIN)
        have_all_ended, is_well = state.tolist()
        if have_all_ended or not is_well:
            self.wait()

    def wait(self) -> None:
        """Wait until the current save is complete. Raises UnwrittenError, on every rank, if it cannot be written."""
        saving, self._saving = self._saving, None
        if saving is None:
            return
        saving.wait()
        if saving.error is not None:
            raise saving.error
        self.saved = _step_of(saving.path)

    def close(self) -> None:
        """Let the current save end. Not collective: a rank that ends with an error calls it too."""
        if self._saving is not None:
            self._saving.wait()

    def find(self) -> LatestCheckpoint:
        """The newest complete checkpoint, and later damaged ones. Collective. Changes nothing.

        Raises InputError if one cannot be read for another reason: an I/O error or a missing permission is no damage.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self._agreed(lambda: self._own(logged=True))):
            problem = self._damage(path)
            if problem is None:
                return LatestCheckpoint(path, self._agreed(partial(manifest.read_state, path)), tuple(damaged))
            damaged.append((path, problem))
        return LatestCheckpoint(None, {}, tuple(damaged))

    def set_aside(self, latest: LatestCheckpoint) -> None:
        """Rename the damaged checkpoints, so that they are not read again. Nothing is removed."""

        def rename() -> None:
            for path, problem in latest.damaged if self._layout.is_writer else ():
                aside = _free_name(path.with_name(path.name + ".damaged"))
                text = "checkpoint %s is damaged (%s): renamed to %s, the previous one is used"
                log.warning(text, path, problem, aside.name)
                os.replace(path, aside)

        raise_on_all_ranks(rename, self._group)

    def manifest_sha256(self, step: int) -> str | None:
        """A hash of all files of a checkpoint, None if there is none of this step. Collective."""
        path = self.path(step)
        digest: str | None = self._agreed(lambda: manifest.sha256(path) if path.exists() else None)
        return digest

    def note(self, step: int | None) -> None:
        """Note the last complete checkpoint's step in the run's folder; None if there is none yet. On one rank."""
        replace_file(self.folder.parent / LAST, json.dumps({"step": step}) + "\n", fsync=True)

    def require(self, latest: LatestCheckpoint, models: dict[str, TrainedModel]) -> None:
        """Raises InputError if the checkpoint lacks one of the models. Other models in it are ignored."""
        for name in models.keys() - latest.state["optimizer_steps"].keys():
            raise InputError(
                f"{latest.path} has no {name}: no stage's method has used one so far; restore the stages' lengths, or "
                f"give another run.dir"
            )

    def load(self, latest: LatestCheckpoint, models: dict[str, TrainedModel]) -> None:
        """Load models and optimizers from a checkpoint of any layout.

        Raises what `require` raises, and InputError if a file that was whole before can no longer be read.
        """
        assert latest.path is not None
        self.require(latest, models)
        for name, model in models.items():
            with model.at_work():
                load_model(model, latest.path / name, latest.state.get("format", GATHERED), self._group)
            model.step_count = latest.state["optimizer_steps"][name]
        self.saved = latest.state["step"]

    def _source(self, name: str, model: TrainedModel) -> ModelSource:
        return self._sources.setdefault(name, ModelSource(model))

    def _own(self, *, logged: bool = False) -> list[Path]:
        """The folders that are checkpoints by their names and their run.json, oldest first. `logged`: log others.

        One whose run.json is missing or not JSON is included if it has a manifest: its damage is found later. Raises
        OSError.
        """
        own, level = [], logging.WARNING if logged else logging.DEBUG
        for path in step_folders(self.folder):
            if not any((path / name).exists() for name in (manifest.STATE, manifest.MANIFEST)):
                other = f"it has neither {manifest.STATE} nor {manifest.MANIFEST}"
                log.log(level, "%s is not counted as a checkpoint: %s", path, other)
                continue
            try:
                step = manifest.read_state(path)["step"]
            except (*manifest.ABSENT, ValueError):
                step = _step_of(path)
            if step == _step_of(path):
                own.append(path)
            else:
                other = f"its {manifest.STATE} is of step {step}"
                log.log(level, "%s is not counted as a checkpoint: %s", path, other)
        return own

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint's files, the same on every rank; None if they are unchanged."""
        wanted = self._agreed(lambda: _state_problem(path) or manifest.read(path))
        if isinstance(wanted, str):
            return wanted
        names = sorted(wanted)[self._layout.rank :: self._layout.world_size]
        digests: list[manifest.Digests] = [{} for _ in range(self._layout.world_size)]
        dist.all_gather_object(digests, manifest.digests_or_errors(path, names), group=self._group)
        now = {name: digest for of_rank in digests for name, digest in of_rank.items()}
        if fault := manifest.first_read_error(now):
            raise cannot_read(path, fault)
        return manifest.difference(wanted, now)

    def _completed(self, step: int) -> None:
        """Note the checkpoint, and remove what is no longer needed. If that fails, the checkpoint is still complete."""
        self.note(step)
        try:
            self._prune()
        except OSError as error:
            log.warning("older checkpoints cannot be removed (%s: %s)", error.filename, error.strerror)

    def _prune(self) -> None:
        """Remove checkpoints beyond `keep`, and partial files of killed saves. Links are left alone."""
        for old in self._own()[: -self._keep]:
            if not old.is_symlink():
                shutil.rmtree(old)
        for abandoned in self.folder.iterdir():
            if _PARTIAL.fullmatch(abandoned.name) and not abandoned.is_symlink():
                shutil.rmtree(abandoned)

    def _free(self) -> int:
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free

    def _agreed(self, find: Callable[[], Any]) -> Any:
        """The result of `find`, which only reads, from the first rank, on all ranks. InputError for its OSError."""
        result: Any = None
        failure: str | None = None
        if self._layout.is_writer:
            try:
                result = find()
            except OSError as error:
                failure = (
                    f"{error.filename or self.folder} cannot be read ({error.strerror or error}); nothing was changed. "
                    f"Mend the disk, its mount or the permissions, then run the same command again, or give another "
                    f"run.dir"
                )
        message = [result, failure]
        dist.broadcast_object_list(message, src=0, group=self._group)
        if message[1] is not None:
            raise InputError(message[1])
        return message[0]


def last_step(run: Path) -> int | None:
    """The step of the last complete checkpoint that a run's folder notes; None if it notes that there was none yet.

    Raises FileNotFoundError if there is no note, ValueError if it is damaged.
    """
    noted = json.loads((run / LAST).read_text(encoding="utf-8"))
    if not isinstance(noted, dict) or not isinstance(noted.get("step", ""), int | None):
        raise ValueError(f"{run / LAST} is not a note of a checkpoint")
    step: int | None = noted["step"]
    return step


def _state_problem(path: Path) -> str | None:
    try:
        manifest.read_state(path)
    except (*manifest.ABSENT, ValueError) as error:
        return f"{manifest.STATE}: {error}"
    return None


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _free_name(path: Path) -> Path:
    """The path, with a number appended if that name exists."""
    names = (path if number == 1 else path.with_name(f"{path.name}-{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists() and not name.is_symlink())


def _size(models: dict[str, TrainedModel]) -> int:
    """Bytes of a checkpoint. Collective."""
    total = torch.zeros((), dtype=torch.int64)
    for model in models.values():
        for name, parameter in model.net.weights().items():
            layout = model.layout
            if layout.is_first_expert_copy if is_of_expert(name) else layout.is_first_copy:
                total += parameter.nbytes + OPTIMIZER_BYTES * parameter.numel()
    dist.all_reduce(total)
    return int(total)


def _gb(size: int) -> str:
    return f"{readable(size / 1e9)} GB"
