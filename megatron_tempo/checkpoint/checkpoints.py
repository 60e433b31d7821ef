"""Checkpoints: actor, critic, optimizers and the run's state, written completely or not at all.

    RUN/checkpoints/step_00000040/
        actor/  critic/    Megatron distributed checkpoints: weights and optimizer, loadable in any layout
        run.json           step, streams, optimizer step counts, config
        MANIFEST.json      size and CRC-32 of every file; a folder whose files differ from it is damaged

A folder appears under its name only when it is complete. There is no random-number state to save: every draw of a run
comes from a generator that is seeded by the run's seed and the draw's own name (`types.seed_of`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_tempo.checkpoint import manifest
from megatron_tempo.checkpoint.saving import Saving, ShardWriter, partial_of
from megatron_tempo.errors import InputError
from megatron_tempo.models.parallel import COLLECTIVE_TIMEOUT, Layout
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.observability.console import readable
from megatron_tempo.runtime.collective_call import raise_on_all_ranks

# A checkpoint's bytes per parameter in addition to its weights: Adam's main weight and two moments, in fp32.
OPTIMIZER_BYTES = 12


class Checkpoints:
    """The checkpoints of one run. The latest may still be being written. All methods are collective."""

    def __init__(
        self,
        folder: Path,
        keep: int,
        layout: Layout,
        log: Callable[[str], None],
        *,
        asynchronous: bool = True,
        timeout: timedelta = COLLECTIVE_TIMEOUT,
    ) -> None:
        """`keep`: number of complete checkpoints to keep. `asynchronous`: `save` returns as soon as the state is copied
        and the models may change. `timeout`: how long a rank that has written its files waits for the others."""
        self.folder, self._keep, self._layout, self._log = folder, keep, layout, log
        self._asynchronous = asynchronous
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._saving: Saving | None = None
        self.saved: int | None = None  # step of the latest checkpoint that was complete when written or read

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def check_room(self, models: dict[str, TrainedModel]) -> None:
        """Raises InputError if the disk has no space for one checkpoint; warns if it has none for `keep` of them."""
        size, (free, kept) = _size(models), self._agreed(lambda: [self._free(), len(self._names())])
        space = f"{self.folder}: a checkpoint takes {_gb(size)}, and the disk has {_gb(free)} free"
        if free < size:
            raise InputError(f"{space}; free disk space, or give a run.dir on another disk")
        wanted = self._keep + 1 - kept  # one is written before one is removed
        if free < wanted * size:
            self._log(
                f"warning: {space}, but checkpoint.keep={self._keep} needs space for {wanted} more; free disk space, "
                f"or keep fewer"
            )

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
                (partial_of(path) / name).mkdir(parents=True)

        raise_on_all_ranks(begin, self._group)
        writers = {}
        for name, model in models.items():
            with model.at_work():
                writers[name] = ShardWriter.of(_sharded(model, is_loading=False), partial_of(path) / name)
        counts = {name: model.step_count for name, model in models.items()}
        state = state | {"step": step, "optimizer_steps": counts}
        self._saving = Saving(path, writers, state, self._group, self._prune)
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
        self.saved = int(saving.path.name.removeprefix("step_"))

    def close(self) -> None:
        """Let the current save end. Not collective: a rank that ends with an error calls it too."""
        if self._saving is not None:
            self._saving.wait()

    def newest(self) -> Path | None:
        """The latest complete checkpoint. Later ones that are damaged are logged and renamed to `NAME.damaged`."""
        while True:
            names = self._agreed(self._names)
            if not names:
                return None
            path = self.folder / names[-1]
            problem = self._damage(path)
            if problem is None:
                return path
            aside = path.with_name(path.name + ".damaged")
            self._log(f"checkpoint {path} is damaged ({problem}): renamed to {aside.name}, trying the previous one")
            if self._layout.is_writer:
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            dist.barrier()

    def load(self, path: Path, models: dict[str, TrainedModel]) -> dict[str, Any]:
        """Load models and optimizers from a checkpoint of any layout. Returns its state.

        Raises InputError if the checkpoint lacks one of the models. Other models in it are ignored.
        """
        state = json.loads((path / manifest.STATE).read_text())
        for name in models.keys() - state["optimizer_steps"].keys():
            raise InputError(
                f"{path} has no {name}: no stage's method has used one so far; restore the methods, or give another "
                f"run.dir"
            )
        for name, model in models.items():
            with model.at_work():
                loaded = dist_checkpointing.load(_sharded(model, is_loading=True), str(path / name))
                model.net.load_state_dict(loaded["model"])
                model.load_optimizer(loaded["optimizer"])
            model.step_count = state["optimizer_steps"][name]
        self.saved = state["step"]
        return state

    def _names(self) -> list[str]:
        if not self.folder.exists():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.name.startswith("step_") and not p.suffix)

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint's files, the same on every rank; None if they are as written."""
        wanted = self._agreed(lambda: manifest.read(path))
        if isinstance(wanted, str):
            return wanted
        names = self._agreed(lambda: manifest.files(path))[self._layout.rank :: self._layout.world_size]
        digests: list[manifest.Digests] = [{} for _ in range(self._layout.world_size)]
        dist.all_gather_object(digests, manifest.digests_or_errors(path, names), group=self._group)
        return manifest.difference(wanted, {name: digest for of_rank in digests for name, digest in of_rank.items()})

    def _prune(self) -> None:
        """Remove checkpoints beyond `keep`, and the remains of killed saves."""
        for old in self._names()[: -self._keep]:
            shutil.rmtree(self.folder / old)
        for abandoned in self.folder.glob("step_*.partial"):
            shutil.rmtree(abandoned)

    def _free(self) -> int:
        there = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        return shutil.disk_usage(there).free

    def _agreed(self, find: Callable[[], Any]) -> Any:
        """The result of `find` on the first rank, on every rank."""
        message = [find() if self._layout.is_writer else None]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return message[0]


def _size(models: dict[str, TrainedModel]) -> int:
    """Bytes of a checkpoint. Collective."""
    total = torch.zeros((), dtype=torch.int64)
    for model in models.values():
        if model.layout.is_first_copy:
            total += sum(p.nbytes + OPTIMIZER_BYTES * p.numel() for p in model.net.parameters())
    dist.all_reduce(total)
    return int(total)


def _gb(size: int) -> str:
    return f"{readable(size / 1e9)} GB"


def _sharded(model: TrainedModel, *, is_loading: bool) -> dict[str, Any]:
    # This sharding of the optimizer state can be read back under any tensor, pipeline and data parallelism.
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    weights = model.net.sharded_state_dict(metadata=metadata)
    return {"model": weights, "optimizer": model.sharded_optimizer(weights, metadata, is_loading=is_loading)}
