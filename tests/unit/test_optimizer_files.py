"""The files of an optimizer's state: written by hand-made ranks, read in every tensor parallelism."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megatron_tempo.checkpoint import optimizer_files
from megatron_tempo.checkpoint.host_memory import HostMemory
from megatron_tempo.checkpoint.optimizer_files import (
    INDEX,
    OptimizerShare,
    SavedSlice,
    StoredOptimizer,
    write_index,
    write_share,
)
from megatron_tempo.checkpoint.weight_files import WeightChunk, shared_out
from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.optimizer import STATES
from megatron_tempo.weights.param_mapping import (
    ParamMapping,
    Replicated,
    ShardedDim0,
    ShardedDim1,
    ShardedGateUp,
    ShardedQKV,
    ShardedVocab,
)
from tests.support.file_size import file_size_limit

CPU = torch.device("cpu")
# A vocabulary of 35 rows has 48 with padding at tensor 1, 64 at tensor 2 or 4.
MAPPINGS = {
    mapping.megatron: mapping
    for mapping in (
        ParamMapping("vocab", ("v",), ((35, 3),), ShardedVocab(35), 0),
        ParamMapping("qkv", ("q", "k", "v"), ((16, 6), (8, 6), (8, 6)), ShardedQKV(8, 4, 2), 0),
        ParamMapping("out", ("o",), ((3, 8),), ShardedDim1(8), 0),
        ParamMapping("gate_up", ("g", "u"), ((8, 3), (8, 3)), ShardedGateUp(8), 0),
        ParamMapping("wide_norm", ("n",), ((16,),), ShardedDim0(16), 0),
        ParamMapping("norm", ("m",), ((5,),), Replicated(), 0),
    )
}


def whole(mapping: ParamMapping, state: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(ord, mapping.megatron + state)))
    return [torch.randn(shape, generator=generator) for shape in mapping.shapes]


def shard(mapping: ParamMapping, state: str, rank: int, tensor: int) -> Tensor:
    return mapping.sharding.shard(whole(mapping, state), rank, tensor).flatten()


def write(folder: Path, tensor: int, cuts: tuple[float, ...] = (0.0, 0.3, 1.0)) -> None:
    """A checkpoint of `tensor` ranks; data-parallel ranks have the numbers between `cuts`, as shares of a parameter."""
    folder.mkdir()
    written = []
    for rank in range(tensor):
        for data, (low, high) in enumerate(itertools.pairwise(cuts)):
            slices = []
            for name, mapping in MAPPINGS.items():
                states = {state: shard(mapping, state, rank, tensor) for state in STATES}
                start, stop = (int(len(states["main"]) * cut) for cut in (low, high))
                if start < stop:
                    slices.append(SavedSlice(name, start, stop, {key: x[start:stop] for key, x in states.items()}))
            share = OptimizerShare(slices, 7 if slices else None, rank, tensor)
            written.append(write_share(folder / f"rank_{rank * 10 + data:05d}.safetensors", share))
    write_index(folder, written)


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("now", [1, 2, 4])
def test_any_range_of_any_tensor_parallelism(tmp_path: Path, before: int, now: int) -> None:
    write(tmp_path / "optimizer", before)
    stored = StoredOptimizer.open(tmp_path / "optimizer")
    assert (stored.step, stored.tensor) == (7, before)
    for mapping in MAPPINGS.values():
        for state in STATES:
            for rank in range(now):
                expected = shard(mapping, state, rank, now)
                for start, stop in ((0, len(expected)), (1, len(expected)), (len(expected) // 4, len(expected) // 2)):
                    found = stored.read(mapping, state, rank, now, start, stop)
                    assert torch.equal(found, expected[start:stop]), (mapping.megatron, state, rank)


def test_a_data_rank_without_any_numbers_writes_no_file(tmp_path: Path) -> None:
    write(tmp_path / "optimizer", 1, cuts=(0.0, 1.0, 1.0))
    assert sorted(path.name for path in (tmp_path / "optimizer").iterdir()) == [INDEX, "rank_00000.safetensors"]
    assert StoredOptimizer.open(tmp_path / "optimizer").step == 7


def test_the_names_say_what_the_numbers_are(tmp_path: Path) -> None:
    write(tmp_path / "optimizer", 2)
    with safe_open(tmp_path / "optimizer/rank_00011.safetensors", "pt") as file:
        assert "out|tp 1 of 2|3:12|exp_avg_sq" in file.keys()  # noqa: SIM118, no dict
        tensor = file.get_tensor("out|tp 1 of 2|3:12|exp_avg_sq")
    assert torch.equal(tensor, whole(MAPPINGS["out"], "exp_avg_sq")[0][:, 4:].flatten()[3:])
    index = json.loads((tmp_path / "optimizer" / INDEX).read_text())
    assert index["parameters"]["out"]["1"] == [[0, 3, "rank_00010.safetensors"], [3, 12, "rank_00011.safetensors"]]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4)


def without(parameter: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        index = json.loads(path.read_text())
        index["parameters"][parameter]["0"].pop()
        path.write_text(json.dumps(index))

    return remove


FILE = "rank_00001.safetensors"
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a file is gone": (FILE, Path.unlink, f"{FILE}: No such file or directory"),
    "a file is cut": (FILE, cut, f"{FILE}: a file is not as it was written"),
    "the index is gone": (INDEX, Path.unlink, f"{INDEX} does not exist"),
    "the index is cut": (INDEX, cut, f"{INDEX} ends too early"),
    "the index is another file": (INDEX, lambda path: path.write_text("{}"), "is not the index of an optimizer's"),
    "a range is missing": (INDEX, without("out"), "out, tensor rank 0, has no numbers from 7 on"),
}


@pytest.mark.parametrize("now", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, now: int) -> None:
    write(tmp_path / "optimizer", 1)
    file, damage, words = FAULTS[name]
    damage(tmp_path / "optimizer" / file)
    with pytest.raises(InputError) as raised:
        StoredOptimizer.open(tmp_path / "optimizer").read(MAPPINGS["out"], "main", 0, now, 0, 24 // now)
    assert words in str(raised.value)
    assert str(tmp_path / "optimizer") in str(raised.value)


def test_a_reader_holds_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_files, "_OPEN_FILES", 2)
    write(tmp_path / "optimizer", 4)
    stored = StoredOptimizer.open(tmp_path / "optimizer")
    assert torch.equal(stored.read(MAPPINGS["qkv"], "main", 0, 1, 0, 192), shard(MAPPINGS["qkv"], "main", 0, 1))
    assert len(stored._opened) == 2


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    share = OptimizerShare([SavedSlice("big", 0, 100_000, dict.fromkeys(STATES, torch.zeros(100_000)))], 1, 0, 1)
    with file_size_limit(100_000), pytest.raises(OSError, match="File too large") as raised:
        write_share(tmp_path / "rank_00000.safetensors", share)
    assert raised.value.filename == str(tmp_path / "rank_00000.safetensors")


def test_host_memory_is_one_copy_and_is_kept() -> None:
    tensors = [torch.arange(5.0), torch.arange(3, dtype=torch.bfloat16), torch.empty(0), torch.ones(2, 3)]
    memory = HostMemory()
    memory.reserve(tensors, CPU)
    first = memory.copy(tensors, CPU)
    assert all(torch.equal(one, other) for one, other in zip(first.tensors, tensors, strict=True))
    storage = first.tensors[0].untyped_storage()
    assert storage.nbytes() == 24 + 8 + 24  # each begins at a multiple of 8 bytes
    tensors[0].zero_()
    assert torch.equal(first.tensors[0], torch.arange(5.0)), "training does not change the copy"
    second = memory.copy(tensors, CPU)
    assert {one.untyped_storage().data_ptr() for one in second.tensors if one.numel()} == {storage.data_ptr()}


def test_weights_are_shared_out_by_size() -> None:
    sizes = [7, 1, 5, 3, 3, 9, 1, 1]
    chunks = [WeightChunk(str(number), (size,), (0,), torch.empty(size)) for number, size in enumerate(sizes)]
    shares = shared_out(chunks, 3)
    assert sorted(chunk.key for share in shares for chunk in share) == [chunk.key for chunk in chunks]
    assert [sum(chunk.data.numel() for chunk in share) for share in shares] == [10, 10, 10]
    assert shared_out(chunks, 1) == [sorted(chunks, key=lambda chunk: -chunk.data.numel())]
