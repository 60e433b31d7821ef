"""Experts leave the ranks that have them, to the bit, on every way and in bounded memory, in several layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import Layout, parallel_groups
from megatron_tempo.types import Bucket, Share
from megatron_tempo.weights import tables
from megatron_tempo.weights.param_mapping import ParamMapping, is_held, tensor_part
from megatron_tempo.weights.pieces import JoinedParts
from megatron_tempo.weights.stream import WeightStream
from tests.support.ranks import run_ranks
from tests.support.storages import Storages
from tests.support.tiny import write_model

# tensor, expert tensor, expert, pipeline; of four processes. Then the copies of a stage that the ranks make.
LAYOUTS = {
    "ep2": (1, 1, 2, 1, 2),
    "tp2-etp1-ep4": (2, 1, 4, 1, 1),
    "tp2-etp2-ep2": (2, 2, 2, 1, 1),
    "tp2-etp1-ep1": (2, 1, 1, 1, 2),
    "tp2-etp1-ep2-pp2": (2, 1, 2, 2, 1),
}
LIMIT = 10_000  # bytes: one expert of 9,216 and a half, and smaller than the vocabularies


class Net(nn.Module):
    """What a stream reads of a network: this rank's shards, under the tables' names."""

    def __init__(self, shards: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = SimpleNamespace(params_dtype=torch.float32)
        self._named = {name: nn.Parameter(shard.clone()) for name, shard in shards.items()}
        self._list = nn.ParameterList(self._named.values())

    def weights(self) -> dict[str, nn.Parameter]:
        return self._named


@contextmanager
def opened(model: Path, sizes: tuple[int, ...]) -> Iterator[tuple[Any, Layout, list[ParamMapping]]]:
    install_cpu_backend()
    tensor, expert_tensor, expert, pipeline = sizes
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, expert=expert, expert_tensor=expert_tensor)
    with parallel_groups(parallel, torch.device("cpu"), 0) as layouts:
        layout = layouts.actor
        shape, whole = read_model_shape(model), load_file(model / "model.safetensors")
        mappings = tables.mappings(shape, layout.pipeline_layers, critic=False, expert_ranks=expert)
        held = {
            mapping.megatron: mapping.sharding.shard(
                [whole[name] for name in mapping.names], *tensor_part(mapping, layout)
            )
            for mapping in mappings
            if is_held(mapping, layout)
        }
        yield Net(held), layout, mappings


def stream(model: Path, sizes: tuple[int, ...]) -> dict[str, Any]:
    with opened(model, sizes) as (net, layout, mappings):
        weights = WeightStream(net, layout, mappings, LIMIT)
        result: dict[str, Any] = {"copies": weights.copies, "copy": weights.copy, "expert rank": layout.expert_rank}
        own = Share(weights.copies, (weights.copy,))
        for parts in (False, True):
            result[f"everywhere {parts}"] = copies(weights.everywhere(parts=parts))
            for shared in (False, True):
                result[f"first {parts} {shared}"] = copies(weights.from_stages(shared=shared, parts=parts))
                result[f"shares {parts} {shared}"] = copies(weights.from_stages(shared=shared, parts=parts, share=own))
        with Storages(net.parameters()) as storages:
            for bucket in weights.from_stages(parts=True):
                assert sum(tensor.nbytes for _, tensor in bucket) <= LIMIT
                del bucket
        return result | {"peak": storages.peak / LIMIT, "sends": weights.sends}


def copies(buckets: Iterable[Bucket]) -> list[tuple[str, Tensor]]:
    return [(name, tensor.clone()) for bucket in buckets for name, tensor in bucket]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "moe", family="qwen3_moe", layers=3)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_arrives_is_what_the_folder_holds(model: Path, tmp_path: Path, name: str) -> None:
    *sizes, whole_copies = LAYOUTS[name]
    ranks = run_ranks(stream, 4, tmp_path, model, tuple(sizes))
    original = load_file(model / "model.safetensors")
    assert {rank["copies"] for rank in ranks} == {whole_copies}
    assert {rank["copy"] for rank in ranks} == set(range(whole_copies))
    for parts in (False, True):
        for rank in ranks:
            assert_same(rank[f"everywhere {parts}"], original)
        for way in (f"{kind} {parts} {shared}" for kind in ("first", "shares") for shared in (False, True)):
            assert_same([pair for rank in ranks for pair in rank[way]], original)
            assert all(rank["sends"] for rank in ranks if rank[way])
    experts = 8 // sizes[2]
    for rank in ranks:
        sent = {
            int(name.split(".experts.")[1].split(".")[0]) for name, _ in rank["shares True False"] if "experts" in name
        }
        assert sent <= set(range(rank["expert rank"] * experts, (rank["expert rank"] + 1) * experts))
        assert rank["peak"] <= 2


def assert_same(tensors: list[tuple[str, Tensor]], wanted: dict[str, Tensor]) -> None:
    """To the bit, and every name once, or every row of it."""
    tensors = JoinedParts(torch.device("cpu")).add(tensors)
    assert sorted(name for name, _ in tensors) == sorted(wanted)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors)
