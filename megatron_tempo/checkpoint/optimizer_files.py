"""The optimizer's state in a checkpoint: each rank writes what it has, and any layout reads it.

    STEP/actor/optimizer/rank_00003.safetensors    what rank 3 has of the state
    STEP/actor/optimizer/index.json                Adam's steps, the tensor ranks, and who wrote what of which parameter

A rank has a range of a parameter's numbers, in the flat order of its tensor-parallel shard. Its main weight and Adam's
two moments are three tensors, fp32 [stop - start], with names such as

    decoder.layers.17.mlp.linear_fc2.weight|tp 1 of 2|4096:8192|exp_avg

Layers are counted over all pipeline stages, and experts over all expert ranks. An expert's ranks are the expert tensor
ranks. A tied matrix is written once, as the input embedding. A rank that reads in the same tensor parallelism reads the
range that it has now. In another one it puts the old shards of a parameter together to whole Hugging Face tensors, and
cuts its own out of them, by the tables for weights (`weights/tables.py`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tempo.errors import InputError
from megatron_tempo.files import naming, read_json, replace_file
from megatron_tempo.models.megatron_compat.optimizer import STATES
from megatron_tempo.runtime import progress_marker
from megatron_tempo.weights.files import Entry, write_safetensors
from megatron_tempo.weights.param_mapping import ParamMapping, Replicated

FOLDER = "optimizer"
INDEX = "index.json"
_PIECE = 1 << 24  # numbers that are written at a time
_OPEN_FILES = 64  # at most, of a reader

# Where a range of a parameter's shard is: [start, stop, file].
Place = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class SavedSlice:
    """The numbers [start, stop) of a parameter's shard, which one rank writes. `tensors`: by state, fp32."""

    parameter: str
    start: int
    stop: int
    tensors: Mapping[str, Tensor]
    of_expert: bool = False


@dataclass(frozen=True, slots=True)
class OptimizerShare:
    """What one rank writes of a model's optimizer. `step`: Adam's, None if the rank has no part of any parameter."""

    slices: Sequence[SavedSlice]
    step: int | None
    tensor_rank: int
    tensor: int
    expert_tensor_rank: int = 0
    expert_tensor: int = 1

    def name(self, one: SavedSlice, state: str) -> str:
        """The name of a tensor in the file."""
        size = self.expert_tensor if one.of_expert else self.tensor
        return _name(one.parameter, self.rank(one), size, one.start, one.stop, state)

    def rank(self, one: SavedSlice) -> int:
        """The tensor rank, or expert tensor rank, of a slice."""
        return self.expert_tensor_rank if one.of_expert else self.tensor_rank


@dataclass(frozen=True, slots=True)
class WrittenSlices:
    """What one rank has written: of each slice the parameter, the (expert) tensor rank, the start and the stop."""

    file: str
    step: int | None
    tensor: int
    expert_tensor: int
    slices: list[tuple[str, int, int, int]]


def write_share(path: Path, share: OptimizerShare) -> WrittenSlices:
    """Write a rank's file, and sync it. The folder exists. Raises OSError that names the file."""
    slices = [(one.parameter, share.rank(one), one.start, one.stop) for one in share.slices]
    written = WrittenSlices(path.name, share.step, share.tensor, share.expert_tensor, slices)
    if not slices:
        return written
    entries: list[Entry] = [
        (share.name(one, state), torch.float32, (one.stop - one.start,)) for one in share.slices for state in STATES
    ]
    with naming(path), path.open("wb") as file:
        write_safetensors(file, entries, _pieces(share))
        file.flush()
        os.fsync(file.fileno())
    return written


def _pieces(share: OptimizerShare) -> Iterator[Tensor]:
    for one in share.slices:
        for state in STATES:
            for piece in one.tensors[state].flatten().split(_PIECE):
                yield piece
                progress_marker.mark()


def _name(parameter: str, rank: int, tensor: int, start: int, stop: int, state: str) -> str:
    return f"{parameter}|tp {rank} of {tensor}|{start}:{stop}|{state}"


def write_index(folder: Path, written: Sequence[WrittenSlices]) -> None:
    """Write what all ranks have written. On one rank. Raises OSError."""
    steps = {one.step for one in written if one.step is not None}
    assert len(steps) == 1, f"all ranks make the same steps: {steps}"
    places: dict[str, dict[str, list[Place]]] = {}
    for one in written:
        for parameter, rank, start, stop in one.slices:
            places.setdefault(parameter, {}).setdefault(str(rank), []).append((start, stop, one.file))
    index = {
        "step": steps.pop(),
        "tensor": written[0].tensor,
        "expert_tensor": written[0].expert_tensor,
        "parameters": {name: {rank: sorted(places[name][rank]) for rank in places[name]} for name in sorted(places)},
    }
    replace_file(folder / INDEX, json.dumps(index, indent=1) + "\n", fsync=True)


@dataclass(slots=True)
class StoredOptimizer:
    """An optimizer's state in a checkpoint. `step`: Adam's steps. `tensor`: the tensor ranks that wrote it."""

    folder: Path
    step: int
    tensor: int
    expert_tensor: int
    _places: dict[str, dict[str, list[Place]]]
    _opened: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> StoredOptimizer:
        """Raises InputError if the index cannot be read."""
        index = read_json(folder / INDEX, dict)
        step, tensor, parameters = (index.get(name) for name in ("step", "tensor", "parameters"))
        if not isinstance(step, int) or not isinstance(tensor, int) or not isinstance(parameters, dict):
            raise InputError(f"{folder / INDEX} is not the index of an optimizer's state")
        expert_tensor = index.get("expert_tensor", 1)  # earlier versions had no experts
        if not isinstance(expert_tensor, int):
            raise InputError(f"{folder / INDEX} is not the index of an optimizer's state")
        return cls(folder, step, tensor, expert_tensor, parameters)

    def read(self, mapping: ParamMapping, state: str, rank: int, tensor: int, start: int, stop: int) -> Tensor:
        """The numbers [start, stop) of the parameter's shard on a tensor rank of `tensor`: fp32 [stop - start].

        Of an expert's parameter, on an expert tensor rank. Raises InputError if they are not there or cannot be read.
        """
        if tensor == self._ranks(mapping):
            return self._range(mapping, state, rank, start, stop)
        shard = mapping.sharding.shard(self._wholes(mapping, state), rank, tensor)
        return shard.flatten()[start:stop]

    def _ranks(self, mapping: ParamMapping) -> int:
        """The ranks that the parameter was cut over."""
        return self.tensor if mapping.expert_rank is None else self.expert_tensor

    def _wholes(self, mapping: ParamMapping, state: str) -> list[Tensor]:
        """The whole Hugging Face tensors of a parameter."""
        wholes = [torch.empty(shape) for shape in mapping.shapes]
        described = [torch.empty(shape, device="meta") for shape in mapping.shapes]
        copies = isinstance(mapping.sharding, Replicated)
        size = self._ranks(mapping)
        for rank in range(1 if copies else size):
            shape = mapping.sharding.shard(described, rank, size).shape
            shard = self._range(mapping, state, rank, 0, prod(shape)).view(shape)
            mapping.sharding.scatter(shard, wholes, rank, size)
        return wholes

    def _range(self, mapping: ParamMapping, state: str, rank: int, start: int, stop: int) -> Tensor:
        """A range of a shard as it was written, from all files that have a part of it."""
        parameter = mapping.megatron
        numbers = torch.empty(stop - start)
        at = start
        for first, last, file in sorted(self._places.get(parameter, {}).get(str(rank), [])):
            if first <= at < last:
                until = min(last, stop)
                name = _name(parameter, rank, self._ranks(mapping), first, last, state)
                self._fill(numbers[at - start : until - start], file, name, at - first)
                at = until
                if at == stop:
                    break
        if at != stop:
            what = f"{parameter}, tensor rank {rank}, has no numbers from {at} on"
            raise InputError(f"{self.folder / INDEX} is damaged: {what}")
        return numbers

    def _fill(self, numbers: Tensor, file: str, name: str, first: int) -> None:
        path = self.folder / file
        try:
            numbers.copy_(self._open(path).get_slice(name)[first : first + len(numbers)])
        except SafetensorError as error:
            raise InputError(f"{path}: a file is not as it was written ({error})") from error
        except OSError as error:
            reason = error.strerror or os.strerror(error.errno) if error.errno else str(error)
            raise InputError(f"{path}: {reason}") from error
        progress_marker.mark()

    def _open(self, path: Path) -> Any:
        if path.name not in self._opened:
            if len(self._opened) == _OPEN_FILES:
                del self._opened[next(iter(self._opened))]
            path.stat()  # whose error has a reason; safetensors' has only the name
            self._opened[path.name] = safe_open(path, "pt")
        return self._opened[path.name]
