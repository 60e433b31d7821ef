"""Weights leave a model as they are in its folder, from every layout and on every way, in bounded memory."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_tempo.config.choices import Logits, Precision
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.errors import InputError
from megatron_tempo.kernels import REFERENCE
from megatron_tempo.models.chunks import ModelChunks
from megatron_tempo.models.families import transformer_config
from megatron_tempo.models.gpt import LanguageModel, PackedGPT
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import Layout, parallel_groups
from megatron_tempo.types import Bucket, PartName, Share, whole_name
from megatron_tempo.weights import folder, tables
from megatron_tempo.weights.param_mapping import ParamMapping, Replicated, RowRun, TPSharding
from megatron_tempo.weights.pieces import JoinedParts, plan
from megatron_tempo.weights.stream import WeightStream
from tests.support.fork_server import ROOT
from tests.support.matrix import matrix
from tests.support.ranks import run_ranks
from tests.support.storages import Storages
from tests.support.tiny import write_model

# name: tensor, pipeline, processes, perhaps virtual pipeline stages
LAYOUTS: dict[str, tuple[int, ...]] = {
    "tp2-pp2": (2, 2, 4),
    "dp2-tp2": (2, 1, 4),
    "tp2": (2, 1, 2),
    "dp2": (1, 1, 2),
    "pp2": (1, 2, 2),
    "pp3": (1, 3, 3),
    "pp2-virtual-2": (1, 2, 2, 2),
}
LIMIT = 20_000  # bytes: several mappings in some buckets, and the larger mappings alone
WAYS: dict[str, Callable[[WeightStream], Iterator[Bucket]]] = {
    "everywhere": lambda weights: weights.everywhere(),
    "messages": lambda weights: weights.from_stages(),
    "shared": lambda weights: weights.from_stages(shared=True),
    "everywhere, in parts": lambda weights: weights.everywhere(parts=True),
    "messages, in parts": lambda weights: weights.from_stages(parts=True),
    "shared, in parts": lambda weights: weights.from_stages(shared=True, parts=True),
}


@contextmanager
def opened(
    model: Path, tensor: int, pipeline: int, virtual: int = 1
) -> Iterator[tuple[PackedGPT | ModelChunks, Layout, list[ParamMapping]]]:
    """Process groups, and the model of a folder in them."""
    install_cpu_backend()
    parallel = ParallelConfig(tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual)
    with parallel_groups(parallel, torch.device("cpu"), 0) as layouts:
        shape, layout = read_model_shape(model), layouts.actor
        config = transformer_config(shape, layout, Precision.fp32)
        build = partial(LanguageModel, config, shape, layout, REFERENCE, Logits.recomputed, temperature=1.0)
        net = ModelChunks([build(chunk=chunk) for chunk in range(virtual)]) if virtual > 1 else build()
        mappings = tables.mappings(shape, layout.pipeline_layers, critic=False)
        folder.load(net, layout, mappings, model)
        yield net, layout, mappings


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("models")
    return {
        "tied": write_model(out / "tied", tied=True, ffn=192),
        "untied": write_model(out / "untied", ffn=192),
        "olmo3": write_model(out / "olmo3", family="olmo3", ffn=192),
    }


# What arrives


def stream(model: Path, tensor: int, pipeline: int, virtual: int = 1) -> dict[str, Any]:
    """What this rank gets: three times from one stream, of weights doubled in between, and once in bfloat16."""
    with opened(model, tensor, pipeline, virtual) as (net, layout, mappings):
        weights = WeightStream(net, layout, mappings, LIMIT)
        result: dict[str, Any] = {"sends": weights.sends, "place": (layout.tensor_rank, layout.data_rank)}
        half = WeightStream(net, layout, mappings, LIMIT, torch.bfloat16)
        result["bfloat16"] = {way: copies(start(half)) for way, start in WAYS.items()}
        own = Share(weights.copies, (weights.copy,))
        result["shares"] = {
            (shared, parts): copies(weights.from_stages(shared=shared, parts=parts, share=own))
            for shared in (False, True)
            for parts in (False, True)
        }
        for repeat in range(3):
            result[f"float32/{repeat}"] = {way: copies(start(weights)) for way, start in WAYS.items()}
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(2)
        return result


def copies(buckets: Iterable[Bucket]) -> list[tuple[str, Tensor]]:
    return [(name, tensor.clone()) for bucket in buckets for name, tensor in bucket]


CASES = [(kind, name) for kind in ("tied", "untied") for name in LAYOUTS] + [("olmo3", "tp2-pp2"), ("olmo3", "tp2")]


FEW = [("tied", "dp2-tp2"), ("tied", "pp3"), ("tied", "pp2-virtual-2"), ("untied", "dp2"), ("untied", "pp2")]
FEW += [("untied", "tp2"), ("olmo3", "tp2-pp2")]


@pytest.mark.parametrize(("kind", "name"), matrix(CASES, FEW))
def test_what_arrives_is_what_the_folder_holds(models: dict[str, Path], kind: str, name: str, tmp_path: Path) -> None:
    tensor, pipeline, world, *virtual = LAYOUTS[name]
    ranks = run_ranks(stream, world, tmp_path, models[kind], tensor, pipeline, *virtual)
    original = load_file(models[kind] / "model.safetensors")
    assert [rank["sends"] for rank in ranks] == [rank["place"][0] == 0 for rank in ranks]
    for shares in [[rank["shares"][way] for rank in ranks] for way in ranks[0]["shares"]]:
        assert [bool(share) for share in shares] == [rank["sends"] for rank in ranks]
        assert_same([pair for share in shares for pair in share], original)
    wanted = {f"float32/{repeat}": {n: t * 2**repeat for n, t in original.items()} for repeat in range(3)}
    wanted["bfloat16"] = {n: t.bfloat16() for n, t in original.items()}
    for key, tensors in wanted.items():
        for rank in ranks:
            for way in ("everywhere", "everywhere, in parts"):
                assert_same(rank[key][way], tensors)
        for way in ("messages", "shared", "messages, in parts", "shared, in parts"):
            assert [bool(rank[key][way]) for rank in ranks] == [rank["place"] == (0, 0) for rank in ranks]
            assert_same([pair for rank in ranks for pair in rank[key][way]], tensors)


def assert_same(tensors: list[tuple[str, Tensor]], wanted: dict[str, Tensor]) -> None:
    """To the bit, and every name once, or every row of it."""
    tensors = JoinedParts(torch.device("cpu")).add(tensors)
    assert sorted(name for name, _ in tensors) == sorted(wanted)
    for name, tensor in tensors:
        assert tensor.dtype == wanted[name].dtype
        assert torch.equal(tensor, wanted[name]), name


# Shared memory


@dataclasses.dataclass(frozen=True)
class Slow:
    """A sharding that scatters after a while."""

    of: TPSharding

    def shard(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        return self.of.shard(sources, rank, size)

    def scatter(self, shard: Tensor, wholes: Sequence[Tensor], rank: int, size: int) -> None:
        time.sleep(0.02)
        self.of.scatter(shard, wholes, rank, size)

    def runs(self, tensor: int, rows: int, rank: int, size: int) -> list[RowRun]:
        time.sleep(0.02)
        return self.of.runs(tensor, rows, rank, size)


def watch(model: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    """Whether the last two buckets hold what they should, with other ranks that write late and a consumer that waits.

    With it the buffers' addresses, and the files of this process while the stream is there and after.
    """
    original = load_file(model / "model.safetensors")
    with opened(model, tensor, pipeline) as (net, layout, mappings):
        if layout.tensor_rank:
            mappings = [
                s if isinstance(s.sharding, Replicated) else dataclasses.replace(s, sharding=Slow(s.sharding))
                for s in mappings
            ]
        weights = WeightStream(net, layout, mappings, LIMIT)
        good, addresses, last = [], [], []
        for _ in range(2):
            last = []
            for bucket in weights.from_stages(shared=True):
                time.sleep(0.1)
                good += [torch.equal(tensor, original[name]) for name, tensor in [*last, *bucket]]
                addresses.append(bucket[0][1].untyped_storage().data_ptr())
                last = bucket
        files = [len(own_files())]
        bucket = last = []
        del weights
        gc.collect()
        dist.barrier()  # the other ranks have let go of them too
        return {"good": good, "addresses": addresses, "files": [*files, len(own_files())]}


def own_files() -> list[Path]:
    return list(Path("/dev/shm").glob(f"torch_{os.getpid()}_*"))


@pytest.mark.parametrize("name", ["tp2", "pp2"])
def test_the_last_two_buckets_stay_until_the_next_is_asked_for(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    tensor, pipeline, world, *_ = LAYOUTS[name]
    for rank, result in enumerate(run_ranks(watch, world, tmp_path, models["untied"], tensor, pipeline)):
        sends = tensor == 1 or rank == 0
        assert bool(result["good"]) == sends
        assert all(result["good"])
        half = len(result["addresses"]) // 2
        first, second = result["addresses"][:half], result["addresses"][half:]
        assert first == second
        assert len(set(first)) == (2 if sends else 0)
        assert all(a != b for a, b in pairwise(first))
        assert result["files"] == [2 if sends else 0, 0]


def stream_without_room(model: Path) -> str:
    with opened(model, 2, 1) as (net, layout, mappings), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=3, f_frsize=2**20))
        weights = WeightStream(net, layout, mappings, LIMIT, torch.float32)
        list(weights.from_stages(shared=True))  # 3 MB are enough
        monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=10_000))
        with pytest.raises(InputError) as error:
            list(WeightStream(net, layout, mappings, LIMIT).from_stages(shared=True))
        return str(error.value)


def test_too_little_shared_memory_is_reported_on_every_rank(models: dict[str, Path], tmp_path: Path) -> None:
    for message in run_ranks(stream_without_room, 2, tmp_path, models["untied"]):
        assert "/dev/shm has 0.0 MB free, and 2 buckets of weights need 0.1 MB" in message
        for fix in ("--shm-size", "parallel.bucket_mb", "rollout.servers.transport=group"):
            assert fix in message


HOLD = """
import time, torch.distributed as dist
from megatron_tempo.weights.shared_memory import shared_buffers
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
buffers = shared_buffers(2, 10**6, dist.group.WORLD)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_killed_process_leaves_no_files_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            files = list(Path("/dev/shm").glob(f"torch_{process.pid}_*"))
        finally:
            process.send_signal(signal.SIGKILL)
    assert len(files) == 2
    deadline = time.monotonic() + 120
    while any(file.exists() for file in files):  # torch_shm_manager looks every few seconds
        assert time.monotonic() < deadline
        time.sleep(0.1)


# Memory


def measure(model: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    """The peak of each way, in largest buckets of this rank's streams, for a consumer that keeps none."""
    with opened(model, tensor, pipeline) as (net, layout, mappings):
        limit = 50_000  # by turns 43 and 49 KB: a bucket that is kept too long is seen
        groups = plan(mappings, limit, 4)
        measured: dict[str, Any] = {"sends": layout.tensor_rank == 0, "buckets": len(groups)}
        largest = 4 * max(sum(mapping.numel for mapping in group) for group in groups)
        for way, start in WAYS.items():
            weights = WeightStream(net, layout, mappings, limit)
            with Storages(net.parameters()) as storages:
                for bucket in start(weights):
                    del bucket
            measured[way] = storages.peak / largest
        return measured


def test_no_rank_holds_more_than_two_buckets(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", tied=False, ffn=192, layers=8)
    for measured in run_ranks(measure, 4, tmp_path / "ranks", model, 2, 2):
        assert measured["buckets"] > 10
        assert 1 <= measured["everywhere"] <= 2
        assert measured["shared"] == pytest.approx(2, abs=1e-2)  # and the few bytes of barriers and names
        assert (1 if measured["sends"] else 0) < measured["messages"] <= (2 if measured["sends"] else 1)


def measure_large(model: Path) -> dict[str, Any]:
    """The peak of each way, in buckets, where no vocabulary matrix and no projection fits into a bucket."""
    with opened(model, 2, 1) as (net, layout, mappings):
        largest, limit = 4 * max(mapping.numel for mapping in mappings), 4_000
        measured: dict[str, Any] = {"sends": layout.tensor_rank == 0, "largest": largest / limit, "parts": set()}
        for way, start in WAYS.items():
            weights = WeightStream(net, layout, mappings, limit)
            with Storages(net.parameters()) as storages:
                for bucket in start(weights):
                    measured["parts"] |= {(way, whole_name(n)) for n, _ in bucket if isinstance(n, PartName)}
                    del bucket
            measured[way] = storages.peak / limit
        return measured


def test_a_large_tensor_takes_no_more_than_two_buckets_either(tmp_path: Path) -> None:
    """Its parts are bounded. Where it is whole, it is in memory once, and what other ranks send of it is bounded."""
    model = write_model(tmp_path / "model", tied=False, ffn=192)
    for measured in run_ranks(measure_large, 2, tmp_path / "ranks", model):
        assert measured["largest"] > 6
        names = {name for way, name in measured["parts"]}
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"} <= names
        assert all(way.endswith("in parts") for way, _ in measured["parts"])
        for way in WAYS:
            whole = 0 if way.endswith("in parts") else measured["largest"] - 1
            assert measured[way] <= (2 if way.startswith("shared") else 1) * whole + 2 + 1e-2, way
