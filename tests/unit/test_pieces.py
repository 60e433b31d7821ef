"""Large tensors in parts: what each rank holds of them, what is sent, and what arrives."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_tempo.config.choices import EngineKind, Precision, Published
from megatron_tempo.config.model_shape import ModelShape, read_model_shape
from megatron_tempo.config.pipeline_layers import PipelineLayers
from megatron_tempo.config.schema import Config, ParallelConfig
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import Layout, parallel_groups
from megatron_tempo.plan.shapes import PUBLISHED
from megatron_tempo.rollout.checksum import checksum, checksums_of, whole_checksums
from megatron_tempo.training import setup
from megatron_tempo.types import Bucket, PartName, whole_name
from megatron_tempo.weights import folder, tables
from megatron_tempo.weights.folder import FolderWeights
from megatron_tempo.weights.pieces import EVEN, JoinedParts, PlannedBucket, TensorRows, planned_buckets
from megatron_tempo.weights.precision import BLOCK, Quantised
from tests.support.tiny import write_model
from tests.support.weights import Given

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return {
        "qwen3": write_model(out / "qwen3", tied=False, ffn=192),
        "olmo3": write_model(out / "olmo3", family="olmo3", ffn=192),
    }


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    install_cpu_backend()
    with parallel_groups(ParallelConfig(), CPU, 0) as found:
        yield found.actor


def shape_of(models: dict[str, Path], kind: str) -> ModelShape:
    return read_model_shape(models[kind])


# The division


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "olmo3"])
@pytest.mark.parametrize("limit", [2_000, 5_000, 40_000, 10**9])
def test_no_bucket_or_message_exceeds_the_bound(models: dict[str, Path], kind: str, limit: int, parts: bool) -> None:
    mappings = tables.mappings(shape_of(models, kind), PipelineLayers(2), critic=False)
    buckets = planned_buckets(mappings, limit, 4, parts=parts)
    named: dict[str, int] = {}
    for bucket in buckets:
        for message in bucket.messages:
            assert 4 * sum(piece.numel for piece in message) <= limit
        if parts:
            assert 4 * bucket.numel <= limit
        for name, tensor in bucket.filled(torch.empty(bucket.numel)):
            assert isinstance(name, PartName) <= parts
            named[whole_name(name)] = named.get(whole_name(name), 0) + tensor.numel()
    shapes = {
        name: prod(shape) for mapping in mappings for name, shape in zip(mapping.names, mapping.shapes, strict=True)
    }
    assert named == shapes
    assert [bucket.stage for bucket in buckets] == sorted(bucket.stage for bucket in buckets)


def test_the_vocabulary_of_a_published_model_keeps_to_the_bound() -> None:
    """Qwen3-8B: the embedding takes 1.24 GB in bf16."""
    mapping = tables.mappings(PUBLISHED[Published.qwen3_8b], critic=False)[0]
    assert mapping.shapes == ((151936, 4096),)
    parts = planned_buckets([mapping], 512 << 20, 2, parts=True)
    assert [2 * part.numel <= 512 << 20 for part in parts] == [True] * 3
    (whole,) = planned_buckets([mapping], 512 << 20, 2, parts=False)
    assert (2 * whole.numel, len(whole.messages)) == (2 * 151936 * 4096, 3)


@pytest.mark.parametrize("multiple", [EVEN, BLOCK])
def test_parts_begin_at_a_multiple(models: dict[str, Path], multiple: int) -> None:
    mappings = tables.mappings(shape_of(models, "qwen3"), critic=False)
    for bucket in planned_buckets(mappings, 3_000, 2, parts=True, multiple=multiple):
        for message in bucket.messages:
            assert all(piece.start % multiple == 0 for piece in message if isinstance(piece, TensorRows))


# What ranks hold


@pytest.mark.parametrize("limit", [600, 5_000])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["qwen3", "olmo3"])
def test_parts_of_shards_are_those_of_the_whole(models: dict[str, Path], kind: str, size: int, limit: int) -> None:
    """Each rank packs what it holds, and all of that fills the tensor: the shards come from `shard`."""
    shape = shape_of(models, kind)
    if shape.groups % size:
        size = shape.groups
    tensors = load_file(models[kind] / "model.safetensors")
    for mapping in tables.mappings(shape, critic=False):
        sources = [tensors[name] for name in mapping.names]
        shards = [mapping.sharding.shard(sources, rank, size) for rank in range(size)]
        for bucket in planned_buckets([mapping], limit, 4, parts=True):
            sent, placed = (torch.full((bucket.numel,), torch.nan) for _ in range(2))
            (((piece, flat),),) = bucket.placed(sent) if len(bucket.messages[0]) == 1 else ()
            for rank, shard in enumerate(shards):
                packed = torch.full((piece.held(shard, rank, size),), torch.nan)
                piece.pack(shard, packed, rank, size)
                piece.unpack(packed, flat, shard, rank, size)
                piece.place(shard, placed, rank, size)
            for name, tensor in [*bucket.filled(sent), *bucket.filled(placed)]:
                rows = slice(name.start, name.stop) if isinstance(name, PartName) else slice(None)
                assert torch.equal(tensor, tensors[whole_name(name)][rows]), name


# Streams of a folder


def test_a_folder_arrives_in_bounded_buckets(models: dict[str, Path], layout: Layout) -> None:
    original = load_file(models["qwen3"] / "model.safetensors")
    weights = FolderWeights(models["qwen3"], layout, 4_000, CPU, torch.float32)
    for stream in (weights.everywhere, weights.from_stages):
        joined, parts = JoinedParts(CPU), 0
        found: Bucket = []
        for bucket in stream(parts=True):
            assert sum(tensor.nbytes for _, tensor in bucket) <= 4_000
            parts += isinstance(bucket[0][0], PartName)
            found += joined.add(bucket)
        assert parts > 20
        assert sorted(name for name, _ in found) == sorted(original)
        assert all(torch.equal(tensor, original[name]) for name, tensor in found)
        whole = [pair for bucket in stream() for pair in bucket]
        assert sorted(name for name, _ in whole) == sorted(original)
        assert all(torch.equal(tensor, original[name]) for name, tensor in whole)


def test_a_folder_is_sent_from_the_ranks_device(
    models: dict[str, Path], layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As evaluation builds it. torch's meta device stands for the GPU, from which alone NCCL sends."""
    monkeypatch.setattr(folder, "is_finite", lambda tensor: True)
    config = Config()
    config.model.path, config.rollout.engine, config.run.precision = (
        str(models["qwen3"]),
        EngineKind.vllm,
        Precision.bf16,
    )
    context = SimpleNamespace(config=config, layouts=SimpleNamespace(actor=layout), device=torch.device("meta"))
    weights = setup.folder_weights(context)  # type: ignore[arg-type]
    for parts in (False, True):
        for shared in (False, True):
            buckets = list(weights.from_stages(shared=shared, parts=parts))
            assert {tensor.device.type for bucket in buckets for _, tensor in bucket} == {"meta"}
            for bucket in buckets:  # one storage, of which another process gets a handle
                assert len({tensor.untyped_storage()._cdata for _, tensor in bucket}) == 1
                assert bucket[0][1].storage_offset() == 0


# FP8 and checksums


def test_parts_of_a_matrix_get_the_scales_of_the_whole() -> None:
    matrix = torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    name = "model.layers.0.mlp.up_proj.weight"
    (whole,) = Quantised(Given([[(name, matrix)]])).everywhere()
    cuts = [(0, 128), (128, 256), (256, 300)]
    given = [[(PartName(name, start, stop, 300), matrix[start:stop])] for start, stop in cuts]
    joined = JoinedParts(CPU)
    found = [pair for bucket in Quantised(Given(given)).everywhere(parts=True) for pair in joined.add(bucket)]
    assert [name for name, _ in found] == [name for name, _ in whole]
    for (_, part), (_, wanted) in zip(found, whole, strict=True):
        assert torch.equal(part.float(), wanted.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_checksum_of_a_tensor_is_that_of_its_parts(dtype: torch.dtype) -> None:
    tensor = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    cuts = [(0, 4), (4, 6), (6, 10)]
    found = checksums_of([(PartName("a", start, stop, 10), tensor[start:stop]) for start, stop in cuts])
    found |= checksums_of([("b", tensor[:1])])
    joined = whole_checksums(found)
    assert joined["a"] == (checksum(tensor), pytest.approx(float(tensor.double().square().mean().sqrt())))
    assert joined["b"] == checksums_of([("b", tensor[:1])])["b"]
    assert joined.keys() == {"a", "b"}


def test_the_name_of_a_part() -> None:
    name = PartName("a.weight", 4, 6, 10)
    again = pickle.loads(pickle.dumps(name))
    assert (again, again.whole, again.start, again.stop, again.rows) == ("a.weight[4:6]", "a.weight", 4, 6, 10)
    assert whole_name(name) == whole_name("a.weight") == "a.weight"


def test_unequal_pieces_of_one_message_lie_one_after_another(models: dict[str, Path]) -> None:
    mappings = tables.mappings(shape_of(models, "qwen3"), critic=False)
    bucket: PlannedBucket = planned_buckets(mappings, 10**9, 4, parts=True)[0]
    flat: Tensor = torch.arange(bucket.numel)
    (placed,) = bucket.placed(flat)
    assert torch.equal(torch.cat([place for _, place in placed]), flat)
    assert torch.equal(torch.cat([tensor.flatten() for _, tensor in bucket.filled(flat)]), flat)
