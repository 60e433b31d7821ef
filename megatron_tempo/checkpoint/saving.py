"""Writes a checkpoint to the disk while training continues.

A rank's share is copied to host memory first, without a message to another rank. A thread writes it from there,
synchronised with the threads of the other ranks over a separate process group. Megatron uses a forked process instead.
Forking a process with CUDA, gloo threads and engine sockets is unsafe, and the fork of a killed trainer would continue
to write.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.checkpoint import manifest
from megatron_tempo.checkpoint.host_memory import HostCopy, HostMemory
from megatron_tempo.checkpoint.optimizer_files import (
    FOLDER,
    OptimizerShare,
    SavedSlice,
    WrittenSlices,
    write_index,
    write_share,
)
from megatron_tempo.checkpoint.weight_files import (
    WeightShare,
    WrittenItem,
    describe_weights,
    in_host_memory,
    weight_share,
    write_weights,
)
from megatron_tempo.files import partial_of, publish_folder
from megatron_tempo.models.gpt import EMBEDDING
from megatron_tempo.models.megatron_compat.optimizer import STATES, adam_step, optimizer_slices
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.weights.param_mapping import is_of_expert


@dataclass(frozen=True, slots=True)
class WrittenShare:
    """What one rank has written of a model. The first rank describes the checkpoint with those of all ranks."""

    weights: list[WrittenItem]
    optimizer: WrittenSlices


@dataclass(slots=True)
class ModelShare:
    """This rank's share of one model's checkpoint, in host memory."""

    weights: WeightShare
    optimizer: OptimizerShare
    copy: HostCopy


@dataclass(frozen=True, slots=True)
class _Copied:
    """A share in host memory, made of these tensors there."""

    tensors: list[Tensor]
    weights: WeightShare
    optimizer: OptimizerShare


class ModelSource:
    """Where this rank's share of one model comes from, and the host memory that it is copied to.

    Both are kept between checkpoints: to find the tensors again takes as long as to copy them, for a small share.
    """

    def __init__(self, model: TrainedModel) -> None:
        self._model = model
        self._memory = HostMemory()
        self._share: tuple[WeightShare, OptimizerShare] | None = None
        self._tensors: list[Tensor] = []  # of the share
        self._found: list[object] = []  # what the share was made from
        self._copied: _Copied | None = None

    def reserve(self) -> None:
        """Allocate the host memory. The model is at work. Raises InputError if CUDA refuses."""
        self._current()
        self._memory.reserve(self._tensors, self._model.device)

    def copy(self) -> ModelShare:
        """Copy this rank's share to host memory. The model is at work. Not collective.

        On a GPU the copy runs while the model is used, until its next optimizer step or until it is offloaded.
        """
        model, (weights, optimizer) = self._model, self._current()
        copy = self._memory.copy(self._tensors, model.device)
        model.copied = copy.done
        if copy.done is not None and model.offloader.one_at_a_time:
            torch.cuda.current_stream(model.device).wait_event(copy.done)
        if self._copied is None or self._copied.tensors is not copy.tensors:
            count = len(optimizer.slices) * len(STATES)
            states = iter(copy.tensors[:count])
            slices = [replace(one, tensors={state: next(states) for state in STATES}) for one in optimizer.slices]
            weights = in_host_memory(weights, copy.tensors[count:])
            self._copied = _Copied(copy.tensors, weights, replace(optimizer, slices=slices))
        copied = self._copied
        return ModelShare(copied.weights, replace(copied.optimizer, step=adam_step(model.optimizer)), copy)

    def _current(self) -> tuple[WeightShare, OptimizerShare]:
        """The share, found anew if a tensor of the model has been replaced or has moved, or if objects may change."""
        found: list[object] = [(parameter, parameter.data_ptr()) for parameter in self._model.net.parameters()]
        found += (state for one in optimizer_slices(self._model.optimizer) for state in one.tensors.values())
        share = self._share
        same = len(found) == len(self._found) and all(map(_is_same, found, self._found))
        if share is None or not same or any(value is not None for value in share[0].objects.values()):
            share = self._share = share_of(self._model)
            self._found, self._tensors = found, _tensors(*share)
        return share


def _is_same(one: object, other: object) -> bool:
    """Whether two tensors are one object, or two parameters with their addresses."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[0] is other[0] and one[1] == other[1]
    return one is other


def share_of(model: TrainedModel) -> tuple[WeightShare, OptimizerShare]:
    """What this rank writes of a model, which is at work: the tensors themselves."""
    layout, names = model.layout, model.net.names_in_checkpoints()
    # A tied matrix has a copy, with the same numbers, on the last stage. The first stage writes it.
    slices = [
        SavedSlice(names[one.parameter], one.start, one.stop, one.tensors, is_of_expert(names[one.parameter]))
        for one in optimizer_slices(model.optimizer)
        if names[one.parameter] != EMBEDDING or layout.is_first_stage
    ]
    ranks = layout.tensor_rank, layout.tensor, layout.expert_tensor_rank, layout.expert_tensor
    share = OptimizerShare(slices, adam_step(model.optimizer), *ranks)
    return weight_share(model.net.chunks), share


def _tensors(weights: WeightShare, optimizer: OptimizerShare) -> list[Tensor]:
    states = [one.tensors[state] for one in optimizer.slices for state in STATES]
    return states + [chunk.data for chunk in weights.chunks]


def write_model(share: ModelShare, folder: Path, rank: int) -> WrittenShare:
    """Write this rank's files of a model to the disk. Raises OSError."""
    share.copy.wait()
    weights = write_weights(folder / f"__{rank}_0.distcp", share.weights)
    path = folder / FOLDER / f"rank_{rank:05d}.safetensors"
    return WrittenShare(weights, write_share(path, share.optimizer))


def describe_model(folder: Path, written: Sequence[WrittenShare]) -> None:
    """Write what describes all ranks' files of a model. On the first rank. Raises OSError."""
    describe_weights(folder, chain.from_iterable(of_rank.weights for of_rank in written))
    write_index(folder / FOLDER, [of_rank.optimizer for of_rank in written])


class Saving:
    """A checkpoint that is being written to `PATH.partial`, which is renamed to `path` when it is complete.

    All ranks must create it at the same point. The training thread makes no other collective call for it.
    """

    def __init__(
        self,
        path: Path,
        shares: dict[str, ModelShare],
        state: dict[str, Any],
        group: dist.ProcessGroup,
        done: Callable[[], None],
    ) -> None:
        """`shares`: by model name. `state`: JSON data. `done`: called on the first rank when it is complete.

        The caller may change `state` while the checkpoint is written: it is saved as it is now.
        """
        self.path = path
        self.error: Exception | None = None  # once it has ended: why it is not complete, on any rank
        self._partial = partial_of(path)
        self._shares, self._group, self._done = shares, group, done
        self._rank = dist.get_rank()
        self._is_writer = self._rank == 0
        self._state = json.dumps(state, indent=1) + "\n" if self._is_writer else ""
        self._thread = threading.Thread(target=self._run, name=f"saving {path.name}", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it has succeeded or failed."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # noqa: BLE001 - reported to the caller that waits
            self.error = error
            if self._is_writer:
                shutil.rmtree(self._partial, ignore_errors=True)  # frees disk space

    def _write(self) -> None:
        results = raise_on_all_ranks(self._write_files, self._group)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(results, gathered if self._is_writer else None, group=self._group)
        raise_on_all_ranks(lambda: self._describe(gathered), self._group)
        digests: list[manifest.Digests] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(digests, raise_on_all_ranks(self._read_back, self._group), group=self._group)
        raise_on_all_ranks(lambda: self._finish(digests), self._group)

    def _write_files(self) -> dict[str, WrittenShare]:
        written = {name: write_model(share, self._partial / name, self._rank) for name, share in self._shares.items()}
        self._shares = {}
        return written

    def _describe(self, written: list[dict[str, WrittenShare]]) -> None:
        """Write the description of all ranks' files, and the run's state."""
        if not self._is_writer:
            return
        for name in written[0]:
            describe_model(self._partial / name, [of_rank[name] for of_rank in written])
        (self._partial / manifest.STATE).write_text(self._state)

    def _read_back(self) -> manifest.Digests:
        return manifest.digests(self._partial, manifest.files(self._partial)[self._rank :: dist.get_world_size()])

    def _finish(self, digests: list[manifest.Digests]) -> None:
        if not self._is_writer:
            return
        manifest.write(self._partial, {name: digest for of_rank in digests for name, digest in of_rank.items()})
        publish_folder(self._partial, self.path)
        self._done()
