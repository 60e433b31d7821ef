"""Reads a model's part of a checkpoint in any layout, also of earlier versions."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tempo.checkpoint.optimizer_files import FOLDER, StoredOptimizer
from megatron_tempo.errors import InputError
from megatron_tempo.models.gpt import ValueModel
from megatron_tempo.models.megatron_compat.optimizer import optimizer_slices, set_adam_step
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.weights import tables
from megatron_tempo.weights.param_mapping import tensor_part

# "format" of a checkpoint's run.json. A version that did not write it wrote the optimizer's state in Megatron's fully
# reshardable form, which gathers all of the state on every rank.
GATHERED, FORMAT = 1, 2


def load_model(model: TrainedModel, folder: Path, form: int, group: dist.ProcessGroup) -> None:
    """Load a model and its optimizer, which is at work. Collective over `group`, which contains all ranks.

    `form`: the checkpoint's format. Raises InputError, on every rank, if a file cannot be read.
    """
    if form > FORMAT:
        raise InputError(f"{folder.parent} was written by a newer version (format {form}): resume with that version")
    loaded = _loaded(model, folder, with_optimizer=form == GATHERED)
    model.net.load_state_dict(loaded["model"])
    if form == GATHERED:
        model.load_optimizer(loaded["optimizer"])
    else:
        raise_on_all_ranks(partial(_load_optimizer, model, folder), group)


@torch.no_grad()
def _load_optimizer(model: TrainedModel, folder: Path) -> None:
    """Fill this rank's part of the optimizer's state. Not collective. Raises InputError."""
    net, layout = model.net, model.layout
    mappings = tables.mappings(net.shape, critic=isinstance(net.chunks[0], ValueModel))
    by_name = {mapping.megatron: mapping for mapping in mappings}
    names = net.names_in_checkpoints()
    try:
        stored = StoredOptimizer.open(folder / FOLDER)
        for one in optimizer_slices(model.optimizer):
            mapping = by_name[names[one.parameter]]
            for state, numbers in one.tensors.items():
                found = stored.read(mapping, state, *tensor_part(mapping, layout), one.start, one.stop)
                numbers.copy_(found.view_as(numbers))
    except InputError as error:
        raise cannot_read(folder.parent, str(error)) from error
    set_adam_step(model.optimizer, stored.step)


def _loaded(model: TrainedModel, folder: Path, *, with_optimizer: bool) -> dict[str, Any]:
    """Megatron's part of a checkpoint for one model."""
    try:
        return dist_checkpointing.load(_wanted(model, with_optimizer=with_optimizer), str(folder))
    except (CheckpointException, Exception) as error:
        fault = _lost(folder / "common.pt") or _io_fault(error)
        if fault is None:
            raise
        raise cannot_read(folder.parent, fault) from error


def _lost(file: Path) -> str | None:
    """Megatron-Core 0.19 takes the absence of common.pt for a format of its own, and misses another key."""
    return None if file.exists() else f"{file}: No such file or directory"


def gathered_form(layout: Layout) -> dict[str, Any]:
    """Megatron's settings of the format `GATHERED`."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": layout.groups.dp_cp,
    }


def _wanted(model: TrainedModel, *, with_optimizer: bool) -> dict[str, Any]:
    """What Megatron is to read: the weights and, from an earlier version's checkpoint, the optimizer's state."""
    metadata = gathered_form(model.layout)
    weights = model.net.sharded_state_dict(metadata=metadata)
    if not with_optimizer:
        return {"model": weights}
    return {"model": weights, "optimizer": model.sharded_optimizer(weights, metadata)}


def _io_fault(error: BaseException) -> str | None:
    """What cannot be read, if that is the cause of an error of Megatron's or torch's loading; else None."""
    if isinstance(error, CheckpointException):  # torch gathers the errors of all ranks
        return next(filter(None, (_io_fault(wrapped[0]) for wrapped in error.failures.values())), None)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, EOFError | UnpicklingError | json.JSONDecodeError) or "PytorchStreamReader" in str(error):
        return f"a file is not as it was written ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    if _UNREAD_INDEX in str(error):  # torch keeps only the text of this one
        return str(error).partition(_UNREAD_INDEX)[2].splitlines()[0]
    inner = error.__cause__ or error.__context__  # Megatron fails while it handles a missing common.pt
    return _io_fault(inner) if inner is not None else None


_UNREAD_INDEX = "metadata read failed: "


def cannot_read(path: Path, fault: str) -> InputError:
    return InputError(
        f"{path}: {fault}; nothing was changed. Mend the disk, its mount or the permissions, then run the same "
        f"command again; if the file is lost, rename {path.name} to {path.name}.damaged to use the one before"
    )
