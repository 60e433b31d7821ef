"""Checkpoints: actor, critic, optimizers and the run's state, whole or not at all.

    RUN/checkpoints/step_00000040/
        actor/  critic/    Megatron distributed checkpoints: weights and optimizer, loadable in any layout
        run.json           step, streams, optimizer step counts, config
        MANIFEST.json      size and CRC-32 of every file; a folder whose files differ from it is damaged

A folder appears under its name only when it is complete. There is no random-number state to keep: every draw of a run
comes from a generator seeded by the run's seed and the draw's own name (`rollout.engine.seed_of`).
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_tempo import pulse
from megatron_tempo.errors import InputError
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.weights.files import sync, sync_folder

MANIFEST = "MANIFEST.json"
STATE = "run.json"
_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run. All methods are collective."""

    folder: Path
    keep: int
    layout: Layout
    tell: Callable[[str], None]

    def path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, models: dict[str, TrainedModel], state: dict[str, Any]) -> Path:
        """Write a checkpoint and remove those older than the last `keep`. `state` is JSON-able.

        Raises OSError naming what could not be written; earlier checkpoints are then as before.
        """
        path = self.path(step)
        partial = path.with_name(path.name + ".partial")
        if self.layout.is_writer:
            shutil.rmtree(partial, ignore_errors=True)
            for name in models:
                (partial / name).mkdir(parents=True)
        dist.barrier()
        # Megatron's writer would start a process for the results of asynchronous saves, which outlives a trainer that
        # is killed. These saves are not asynchronous: a queue in this process will do.
        filesystem_async._results_queue = queue.SimpleQueue()
        for name, model in models.items():
            with model.at_work():
                dist_checkpointing.save(_sharded(model, is_loading=False), str(partial / name))
        if self.layout.is_writer:
            counts = {name: model.step_count for name, model in models.items()}
            _write_json(partial / STATE, state | {"step": step, "optimizer_steps": counts})
        dist.barrier()
        digests = self._digests(partial)
        if self.layout.is_writer:
            _write_json(partial / MANIFEST, digests)
            sync(partial)
            os.replace(partial, path)
            sync_folder(self.folder)
            for old in self._names()[: -self.keep]:
                shutil.rmtree(self.folder / old)
            for abandoned in self.folder.glob("step_*.partial"):  # of a save that was killed
                shutil.rmtree(abandoned)
        dist.barrier()
        return path

    def newest(self) -> Path | None:
        """The newest whole checkpoint. Damaged ones before it are named and set aside as `NAME.damaged`."""
        while True:
            names: list[Any] = [self._names()]
            dist.broadcast_object_list(names, src=0)
            if not names[0]:
                return None
            path = self.folder / names[0][-1]
            problem = self._damage(path)
            if problem is None:
                return path
            aside = path.with_name(path.name + ".damaged")
            self.tell(f"checkpoint {path} is damaged ({problem}): set aside as {aside.name}, trying the one before")
            if self.layout.is_writer:
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            dist.barrier()

    def load(self, path: Path, models: dict[str, TrainedModel]) -> dict[str, Any]:
        """Fill models and optimizers from a checkpoint, whatever layout wrote it. Returns its state.

        Raises InputError where it lacks one of the models; one that it has beside them stays where it is.
        """
        state = json.loads((path / STATE).read_text())
        for name in models.keys() - state["optimizer_steps"].keys():
            raise InputError(
                f"{path} has no {name}: no stage's method had one so far; set the methods back, or give another run.dir"
            )
        for name, model in models.items():
            with model.at_work():
                loaded = dist_checkpointing.load(_sharded(model, is_loading=True), str(path / name))
                model.net.load_state_dict(loaded["model"])
                model.load_optimizer(loaded["optimizer"])
            model.step_count = state["optimizer_steps"][name]
        return state

    def _names(self) -> list[str]:
        if not self.folder.exists():
            return []
        return sorted(p.name for p in self.folder.iterdir() if p.name.startswith("step_") and not p.suffix)

    def _damage(self, path: Path) -> str | None:
        """What is wrong with a checkpoint's files, the same on every rank; None if they are as written."""
        try:
            wanted = json.loads((path / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            return f"{MANIFEST}: {error}"
        return _difference(wanted, self._digests(path))

    def _digests(self, path: Path) -> dict[str, str]:
        """Size and checksum of every file below `path`, by relative name. Each rank reads its share."""
        names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST)
        mine = {name: _digest(path / name) for name in names[self.layout.rank :: self.layout.world_size]}
        shares: list[dict[str, str]] = [{} for _ in range(self.layout.world_size)]
        dist.all_gather_object(shares, mine)
        return {name: digest for share in shares for name, digest in share.items()}


def damage(path: Path, name: str) -> str | None:
    """What is wrong with the files of the model `name` of a checkpoint, or with its state; None if they are as written.

    In a process of its own, without process groups. It reads the whole of the files.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    wanted = {file: digest for file, digest in manifest.items() if file == STATE or file.startswith(f"{name}/")}
    return _difference(wanted, {file: _digest(path / file) for file in wanted if (path / file).is_file()})


def _difference(wanted: dict[str, str], found: dict[str, str]) -> str | None:
    for name, digest in wanted.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} is {found[name]}, was written as {digest}"
    return None


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


def _digest(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
            pulse.beat()
    return f"{path.stat().st_size}:{checksum:08x}"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
