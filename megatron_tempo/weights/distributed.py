"""Reads and writes Megatron's distributed checkpoints one tensor at a time, without a model, process group or GPU.

The format is that of `dist_checkpointing.save({"model": net.sharded_state_dict()}, folder)`, for any layout:

    .metadata       each key's shape and type, its chunks, and the file and offset of each chunk
    __P_N.distcp    the chunks, each as `torch.save` writes it
    common.pt       objects that are not sharded; empty here
    metadata.json   the format's name and version

A key holds a whole tensor. Layers are stacked: `decoder.layers.mlp.linear_fc2.weight` is [layers, hidden, ffn]. So are
the experts of a layer: `decoder.layers.mlp.experts.experts.linear_fc2.weight` is [layers, experts, hidden, ffn], which
both of Megatron's implementations of experts read and write. `TPSharding.shard` divides one of the later dimensions, so
the whole tensor is `shard(sources, 0, 1)`. The vocabulary is padded with zero rows. Their number does not matter:
Megatron reads the rows that exist and fills up with zeros.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_tempo.config.sizes import padded_vocab
from megatron_tempo.errors import InputError
from megatron_tempo.files import atomic_write
from megatron_tempo.models.megatron_compat.torch_private import write_result
from megatron_tempo.weights.files import DTYPES, Entry
from megatron_tempo.weights.locations import CheckpointLocation, locations
from megatron_tempo.weights.param_mapping import ParamMapping, ShardedVocab

BACKEND = CheckpointingConfig("torch_dist", 1)
# Largest chunk of a vocabulary matrix, in bytes. Every other tensor is one chunk per mapping and layer.
CHUNK_BYTES = 256 << 20


# Hugging Face -> Megatron


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk to write: a mapping's whole tensor, or rows of a vocabulary matrix. Padding rows are zero."""

    mapping: ParamMapping
    location: CheckpointLocation
    rows: tuple[int, int] | None
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.location.chunk(self.rows).sizes) * self.dtype.itemsize

    @property
    def index(self) -> MetadataIndex:
        return MetadataIndex(self.location.key, self.location.chunk(self.rows).offsets)

    def read(self, files: dict[str, Path]) -> Tensor:
        """The data, from the files that hold the mapping's tensors. Zeros if no file has them: a new value head.

        The file is mapped into memory until the tensor is freed.
        """
        if self.mapping.names[0] not in files:
            return torch.zeros(self.location.chunk(self.rows).sizes, dtype=self.dtype)
        sources = []
        for name in self.mapping.names:
            with safe_open(files[name], "pt") as file:
                sources.append(file.get_slice(name))
        data = (
            self.mapping.sharding.shard(sources, 0, 1)
            if self.rows is None
            else _rows(self.mapping, sources[0], self.rows)
        )
        return data.view(self.location.chunk(self.rows).sizes)


def _rows(mapping: ParamMapping, source: Any, rows: tuple[int, int]) -> Tensor:
    start, end = rows
    vocab = mapping.shapes[0][0]
    stored = source[min(start, vocab) : min(end, vocab)]
    return (
        stored if end <= vocab else torch.cat([stored, stored.new_zeros(end - start - len(stored), *stored.shape[1:])])
    )


def parts(mappings: list[ParamMapping], files: dict[str, Path], part_bytes: int) -> list[list[Chunk]]:
    """The chunks of a checkpoint, in parts of about `part_bytes`; each part is a file. Deterministic.

    Raises InputError for types that a checkpoint cannot store.
    """
    dtypes = _dtypes(mappings, files)
    parts: list[list[Chunk]] = [[]]
    room = part_bytes
    for mapping, location in locations(mappings).items():
        for rows in _windows(mapping, location, dtypes[mapping]):
            chunk = Chunk(mapping, location, rows, dtypes[mapping])
            if parts[-1] and chunk.nbytes > room:
                parts.append([])
                room = part_bytes
            parts[-1].append(chunk)
            room -= chunk.nbytes
    return parts


def _windows(mapping: ParamMapping, location: CheckpointLocation, dtype: torch.dtype) -> list[tuple[int, int] | None]:
    if not isinstance(mapping.sharding, ShardedVocab):
        return [None]
    rows, width = location.shape
    assert rows == padded_vocab(mapping.sharding.vocab, 1)
    step = max(1, CHUNK_BYTES // (width * dtype.itemsize))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _dtypes(mappings: list[ParamMapping], files: dict[str, Path]) -> dict[ParamMapping, torch.dtype]:
    """Each mapping's type in the files. A head that the files do not have gets the first mapping's type."""
    names: dict[str, str] = {}
    for path in set(files.values()):
        with safe_open(path, "pt") as file:
            names |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118, no dict
    by_key: dict[str, set[str]] = {}
    keys = {mapping: location.key for mapping, location in locations(mappings).items()}
    for mapping in mappings:
        kinds = {names[name] for name in mapping.names if name in names} or {names[mappings[0].names[0]]}
        by_key.setdefault(keys[mapping], set()).update(kinds)
    problems = [
        f"{', '.join(mapping.names)}: the tensors of {key} have the types {', '.join(sorted(kinds))}"
        for mapping, key in keys.items()
        if len(kinds := by_key[key]) > 1 or not kinds <= DTYPES.keys()
    ]
    if problems:
        shown = "\n  ".join(problems)
        raise InputError(
            f"all tensors of a checkpoint's key must have the same type, {' or '.join(DTYPES)} "
            f"({len(problems)} problems):\n  {shown}"
        )
    return {mapping: DTYPES[next(iter(by_key[key]))] for mapping, key in keys.items()}


def write_part(path: Path, part: list[Chunk], files: dict[str, Path]) -> list[tuple[int, int]]:
    """Write a file of chunks, atomically. Returns the offset and length of each chunk in it.

    Only one chunk is in memory at a time. torch's FileSystemWriter would hold a tensor of each key until the file is
    written.
    """
    places = []
    with atomic_write(path, fsync=True) as file:
        for chunk in part:
            start = file.tell()
            torch.save(_compact(chunk.read(files)), file)
            places.append((start, file.tell() - start))
    return places


def _compact(data: Tensor) -> Tensor:
    """Contiguous, in a storage that holds nothing else, because `torch.save` writes the whole storage."""
    data = data.contiguous()
    return data if data.untyped_storage().nbytes() == data.nbytes else data.clone()


def write_metadata(
    folder: Path, written: dict[str, list[Chunk]], places: dict[str, list[tuple[int, int]]], objects: str
) -> None:
    """Turn files of chunks, given by name, into a checkpoint. `objects`: the name of one more file, which this writes.

    Each of Megatron's linear layers reads an extra state, which is None outside FP8. The file `objects` has them.
    """
    state: dict[str, Any] = {}
    results = []
    for name, chunks in written.items():
        for chunk, (start, length) in zip(chunks, places[name], strict=True):
            key, properties = chunk.location.key, TensorProperties(chunk.dtype)
            entry = state.setdefault(key, TensorStorageMetadata(properties, torch.Size(chunk.location.size), []))
            entry.chunks.append(chunk.location.chunk(chunk.rows))
            results.append(write_result(chunk.index, name, start, length))
    none = io.BytesIO()
    torch.save([None], none)
    with atomic_write(folder / objects, fsync=True) as file:
        # Once for a layer that has a weight and a bias.
        for key in dict.fromkeys(_extra_states([chunk.location for chunks in written.values() for chunk in chunks])):
            state[key] = BytesStorageMetadata()
            results.append(write_result(MetadataIndex(key), objects, file.tell(), len(none.getbuffer())))
            file.write(none.getbuffer())
    write_description(folder, Metadata(state), results)


def write_description(folder: Path, metadata: Metadata, results: list[WriteResult]) -> None:
    """Turn files into a checkpoint that Megatron reads. `results`: where the chunks and objects of `metadata` are."""
    with atomic_write(folder / "common.pt", fsync=True) as file:
        torch.save({}, file)
    FileSystemWriter(folder).finish(metadata, [results])
    save_config(BACKEND, str(folder))


def _extra_states(locations: list[CheckpointLocation]) -> Iterator[str]:
    for location in locations:
        module, _, _ = location.key.rpartition(".")
        if location.at and module.rpartition(".")[2].startswith("linear_"):
            yield ShardedObject(f"{module}._extra_state", None, location.of, location.at).unique_key


# Megatron -> Hugging Face


class StoredWeights:
    """The weights in a distributed checkpoint that any layout wrote. Its other content is not read."""

    def __init__(self, folder: Path, mappings: list[ParamMapping]) -> None:
        """Raises InputError if it is not a complete distributed checkpoint of exactly these mappings."""
        self._folder, self._locations = folder, locations(mappings)
        self._reader = FileSystemReader(folder)
        self._metadata = _read_metadata(folder, self._reader)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._tensors = {
            key: stored
            for key, stored in self._metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata) and not key.startswith("optimizer.")
        }
        self._check()
        self._chunks = {key: _by_place(location, self._tensors[key]) for key, location in self._by_key().items()}

    def _by_key(self) -> dict[str, CheckpointLocation]:
        return {location.key: location for location in self._locations.values()}

    @property
    def files(self) -> set[str]:
        """The names of the files that hold the weights."""
        keys = {location.key for location in self._locations.values()}
        return {place.relative_path for index, place in self._metadata.storage_data.items() if index.fqn in keys}

    def entries(self, mapping: ParamMapping, dtype: torch.dtype | None) -> list[Entry]:
        """The mapping's Hugging Face tensors. `dtype`: None for the stored type."""
        dtype = dtype or self._stored(mapping).properties.dtype
        return [(name, dtype, shape) for name, shape in zip(mapping.names, mapping.shapes, strict=True)]

    def read(self, mapping: ParamMapping, dtype: torch.dtype | None) -> Iterator[Tensor]:
        """The data of the mapping's Hugging Face tensors, in order. A vocabulary matrix comes in its saved chunks.

        In addition to what it yields, it holds a saved chunk and the mapping's tensor in Megatron's format.
        """
        location, stored = self._locations[mapping], self._stored(mapping)
        dtype = dtype or stored.properties.dtype
        if isinstance(mapping.sharding, ShardedVocab):
            vocab = mapping.sharding.vocab
            bounds = sorted({min(chunk.offsets[0], vocab) for chunk in stored.chunks} | {vocab})
            for start, end in pairwise(bounds):
                yield self._read(location, location.chunk((start, end))).to(dtype)
            return
        wholes = [torch.empty(shape, dtype=dtype) for shape in mapping.shapes]
        mapping.sharding.scatter(self._read(location, location.chunk()).view(location.shape), wholes, 0, 1)
        yield from wholes

    def _stored(self, mapping: ParamMapping) -> TensorStorageMetadata:
        return self._tensors[self._locations[mapping].key]

    def _read(self, location: CheckpointLocation, chunk: ChunkStorageMetadata) -> Tensor:
        stored = self._tensors[location.key]
        target = torch.empty(chunk.sizes, dtype=stored.properties.dtype)
        near = replace(stored, chunks=self._chunks[location.key].get(location.at, stored.chunks))
        plan = LoadPlan(create_read_items_for_chunk_list(location.key, near, [chunk]))
        try:
            self._reader.read_data(plan, _LoadIntoTensor(target)).wait()
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{self._folder} is damaged: {location.key} cannot be read ({reason})") from error
        return target

    def _check(self) -> None:
        expected = {location.key: (mapping, location) for mapping, location in self._locations.items()}
        problems = [f"missing: {key}" for key in expected if key not in self._tensors]
        problems += [f"unexpected: {key}" for key in self._tensors if key not in expected]
        problems += [
            problem
            for key, (mapping, location) in expected.items()
            if key in self._tensors and (problem := _mismatch(mapping, location, self._tensors[key]))
        ]
        if problems:
            shown = "\n  ".join(problems)
            raise InputError(f"{self._folder} does not match the model ({len(problems)} problems):\n  {shown}")
        if gone := sorted(name for name in self.files if not (self._folder / name).is_file()):
            raise InputError(f"{self._folder}: files are missing: {', '.join(gone)}; copy the checkpoint again")


def _by_place(
    location: CheckpointLocation, stored: TensorStorageMetadata
) -> dict[tuple[int, ...], list[ChunkStorageMetadata]]:
    """A key's chunks by the layer and expert that they are of. torch compares what is read with each chunk that it is
    given, of which a mixture of experts has thousands. Empty if a chunk is of several."""
    count, places = len(location.at), dict[tuple[int, ...], list[ChunkStorageMetadata]]()
    for chunk in stored.chunks:
        if any(size != 1 for size in chunk.sizes[:count]):
            return {}
        places.setdefault(tuple(chunk.offsets[:count]), []).append(chunk)
    return places


def _mismatch(mapping: ParamMapping, location: CheckpointLocation, stored: TensorStorageMetadata) -> str | None:
    size, expected = tuple(stored.size), location.size
    if isinstance(mapping.sharding, ShardedVocab):  # its padding depends on the tensor parallelism that wrote it
        size = (min(size[0], mapping.sharding.vocab), *size[1:])
        expected = (mapping.sharding.vocab, *expected[1:])
    if size != expected:
        return f"wrong shape: {location.key} is {list(stored.size)}, the config.json says {list(expected)}"
    if stored.properties.dtype not in DTYPES.values():
        return f"unsupported type: {location.key} is {stored.properties.dtype}"
    if sum(prod(chunk.sizes) for chunk in stored.chunks) != prod(stored.size):
        return f"incomplete: {location.key}"
    return None


def _read_metadata(folder: Path, reader: FileSystemReader) -> Metadata:
    try:
        backend = maybe_load_config(str(folder))
        if backend is None:
            raise InputError(f"{folder} is not a distributed checkpoint of Megatron: it has no metadata.json")
        if backend.sharded_backend != BACKEND.sharded_backend:
            raise InputError(f"{folder} has the format {backend.sharded_backend!r}; supported: torch_dist")
        return reader.read_metadata()
    except (OSError, EOFError, ValueError, TypeError, AttributeError, ImportError, pickle.UnpicklingError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder}: its .metadata or metadata.json cannot be read ({error})") from error


class _LoadIntoTensor(DefaultLoadPlanner):
    """Reads into one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing to do: the data was read into the tensor's own memory."""
