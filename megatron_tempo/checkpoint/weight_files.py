"""A run's weights as a Megatron distributed checkpoint, written without Megatron's collectives.

Which rank writes what follows from the layout alone: of the ranks that hold the same weights, each writes a part of
about the same size. `weights/distributed.py` describes the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_tempo.files import naming
from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.megatron_compat.torch_private import write_result
from megatron_tempo.runtime import progress_marker
from megatron_tempo.weights.distributed import CHUNK_BYTES, write_description
from megatron_tempo.weights.param_mapping import is_of_expert


@dataclass(frozen=True, slots=True)
class WeightChunk:
    """A part of the tensor of a key.

    >>> WeightChunk("decoder.layers.mlp.linear_fc2.weight", size=(36, 4096, 12288), offsets=(18, 0, 6144),
    ...             data=torch.empty(1, 4096, 6144))
    """

    key: str
    size: tuple[int, ...]  # of the key's tensor
    offsets: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True, slots=True)
class WeightShare:
    """What one rank writes of a model's weights. `objects`: what is not a tensor, by its key; FP8's scales."""

    chunks: list[WeightChunk]
    objects: dict[str, Any]


@dataclass(frozen=True, slots=True)
class WrittenItem:
    """Where a chunk or an object is. `chunk`: without its data; None for an object."""

    key: str
    file: str
    start: int
    length: int
    chunk: tuple[torch.dtype, tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None  # type, size, offsets, sizes


def weight_share(nets: Sequence[PackedGPT]) -> WeightShare:
    """This rank's share of the weights of a model's networks. The model is at work. Not collective."""
    groups = nets[0].pg_collection
    dense: list[WeightChunk] = []
    of_experts: list[WeightChunk] = []
    objects = {}
    for net in nets:
        state = net.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp, "singleton_local_shards": False})
        apply_factories(state)
        for one in nested_values(state):
            if isinstance(one, ShardedTensor):
                held = of_experts if is_of_expert(one.key) else dense
                held += _chunks(one) if is_main_replica(one.replica_id[:-1]) else []
            elif isinstance(one, ShardedObject) and is_main_replica(one.replica_id):
                objects[one.unique_key] = one.data
    shares = shared_out(dense, groups.dp_cp.size())[groups.dp_cp.rank()]
    if of_experts:
        shares += shared_out(of_experts, groups.expt_dp.size())[groups.expt_dp.rank()]
    return WeightShare(shares, objects)


def shared_out(chunks: list[WeightChunk], copies: int) -> list[list[WeightChunk]]:
    """Chunks that `copies` ranks hold, shared out among them by size."""
    shares: list[list[WeightChunk]] = [[] for _ in range(copies)]
    sizes = [0] * copies
    for chunk in sorted(chunks, key=lambda chunk: -chunk.data.nbytes):
        least = sizes.index(min(sizes))
        shares[least].append(chunk)
        sizes[least] += chunk.data.nbytes
    return shares


def _chunks(one: ShardedTensor) -> Iterator[WeightChunk]:
    """A sharded tensor in chunks of at most CHUNK_BYTES, by its first own dimension."""
    axis = one.prepend_axis_num
    data = one.data.detach().view((1,) * axis + tuple(one.local_shape))
    rows = max(1, CHUNK_BYTES // (data[(0,) * (axis + 1)].nbytes or 1))
    for first in range(0, data.shape[axis], rows):
        offsets = list(one.global_offset)
        offsets[axis] += first
        part = data.narrow(axis, first, min(rows, data.shape[axis] - first))
        yield WeightChunk(one.key, tuple(one.global_shape), tuple(offsets), part)


def in_host_memory(share: WeightShare, copies: Sequence[Tensor]) -> WeightShare:
    """The share with copies of its tensors."""
    pairs = zip(share.chunks, copies, strict=True)
    return WeightShare([replace(chunk, data=copy) for chunk, copy in pairs], share.objects)


def write_weights(path: Path, share: WeightShare) -> list[WrittenItem]:
    """Write a rank's file, and sync it. Raises OSError that names the file."""
    if not share.chunks and not share.objects:
        return []
    items = []
    with naming(path), path.open("wb") as file:

        def save(key: str, value: Any, chunk: Any = None) -> None:
            start = file.tell()
            torch.save(value, file)
            items.append(WrittenItem(key, path.name, start, file.tell() - start, chunk))
            progress_marker.mark()

        for one in share.chunks:
            save(one.key, _alone(one.data), (one.data.dtype, one.size, one.offsets, tuple(one.data.shape)))
        for key, value in share.objects.items():
            save(key, [value])
        file.flush()
        os.fsync(file.fileno())
    return items


def _alone(data: Tensor) -> Tensor:
    """The tensor, in the same memory, as a storage that holds nothing else: `torch.save` writes the whole storage."""
    if data.numel() == 0:
        return data.clone()
    numbers = data.flatten().view(torch.uint8).numpy()
    return torch.frombuffer(numbers, dtype=data.dtype).view(data.shape)


def describe_weights(folder: Path, items: Iterable[WrittenItem]) -> None:
    """Write the description of all ranks' files. On one rank."""
    state: dict[str, Any] = {}
    results = []
    for item in items:
        index = MetadataIndex(item.key)
        if item.chunk is None:
            state[item.key] = BytesStorageMetadata()
        else:
            dtype, size, offsets, sizes = item.chunk
            entry = state.setdefault(item.key, TensorStorageMetadata(TensorProperties(dtype), torch.Size(size), []))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            index = MetadataIndex(item.key, torch.Size(offsets))
        results.append(write_result(index, item.file, item.start, item.length))
    write_description(folder, Metadata(state), results)
