"""The weight stream of a mixture with 128 experts: bounded buckets, each tensor once, few of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from math import ceil, prod
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from megatron_tempo.config.choices import Published
from megatron_tempo.config.pipeline_layers import PipelineLayers
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.parallel import Layout, parallel_groups
from megatron_tempo.plan.shapes import PUBLISHED
from megatron_tempo.types import whole_name
from megatron_tempo.weights import tables
from megatron_tempo.weights.pieces import JoinedParts, PlannedBucket, planned_buckets
from megatron_tempo.weights.stream import WeightStream

SHAPE = PUBLISHED[Published.qwen3_30b_a3b]
LAYERS, EXPERTS, HIDDEN, FFN, VOCAB = 48, 128, 2048, 768, 151936
BF16 = 2


def published_tensors() -> dict[str, int]:
    """The numbers in each tensor of Qwen3-30B-A3B's folder, written down by hand."""
    found = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), VOCAB * HIDDEN) | {
        "model.norm.weight": HIDDEN
    }
    for layer in (f"model.layers.{number}" for number in range(LAYERS)):
        found |= {f"{layer}.self_attn.{name}_proj.weight": HIDDEN * 4096 for name in "qo"}
        found |= {f"{layer}.self_attn.{name}_proj.weight": HIDDEN * 512 for name in "kv"}
        found |= {f"{layer}.self_attn.{name}_norm.weight": 128 for name in "qk"}
        found |= {f"{layer}.{name}_layernorm.weight": HIDDEN for name in ("input", "post_attention")}
        found[f"{layer}.mlp.gate.weight"] = EXPERTS * HIDDEN
        experts = (f"{layer}.mlp.experts.{number}" for number in range(EXPERTS))
        found |= {f"{one}.{name}_proj.weight": FFN * HIDDEN for one in experts for name in ("gate", "up", "down")}
    return found


def sizes_of(bucket: PlannedBucket) -> list[tuple[str, int]]:
    pieces = chain.from_iterable(bucket.messages)
    return [(whole_name(name), prod(shape)) for piece in pieces for name, shape in piece.tensors()]


@pytest.mark.parametrize(("expert_ranks", "bucket_mb"), [(1, 512), (8, 512), (8, 64), (128, 4)])
def test_buckets_of_the_published_model_are_bounded_and_few(expert_ranks: int, bucket_mb: int) -> None:
    """Two neighbouring buckets of one kind do not fit into one. So besides those that are half full at least, there is
    one for each layer and expert rank, one for each stage's dense weights, and the parts of large tensors."""
    mappings = tables.mappings(SHAPE, PipelineLayers(2), critic=False, expert_ranks=expert_ranks)
    wanted, limit = published_tensors(), bucket_mb << 20
    assert BF16 * sum(wanted.values()) == 61_064_245_248
    buckets = planned_buckets(mappings, limit, BF16, parts=True)
    assert max(BF16 * bucket.numel for bucket in buckets) <= limit
    found: dict[str, int] = {}
    for name, numel in chain.from_iterable(map(sizes_of, buckets)):
        found[name] = found.get(name, 0) + numel
    assert found == wanted
    assert len(buckets) <= 2 * ceil(BF16 * sum(wanted.values()) / limit) + LAYERS * expert_ranks + 2
    for bucket in buckets:
        names = [name for name, _ in sizes_of(bucket)]
        assert len({".experts." in name for name in names}) == 1
        if bucket.expert_rank is not None:
            layers = {name.split(".")[2] for name in names}
            ranks = {int(name.split(".")[5]) // (EXPERTS // expert_ranks) for name in names}
            assert (len(layers), ranks) == (1, {bucket.expert_rank})


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    install_cpu_backend()
    with parallel_groups(ParallelConfig(), torch.device("cpu"), 0) as found:
        yield found.actor


class Net(nn.Module):
    """What a stream reads of a network of one process."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.config = SimpleNamespace(params_dtype=torch.float32)
        self._named = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
        self._list = nn.ParameterList(self._named.values())

    def weights(self) -> dict[str, nn.Parameter]:
        return self._named


@pytest.mark.parametrize("limit", [3_000, 20_000, 10**6])
def test_a_stream_of_128_experts_sends_each_tensor_once(layout: Layout, limit: int) -> None:
    """Two layers of 128 experts, with narrow matrices: 3 KB hold an expert's first two, 20 KB five experts and more."""
    assert SHAPE.experts is not None
    shape = replace(
        SHAPE, layers=2, hidden=32, heads=4, groups=2, head_dim=8, vocab=100, experts=replace(SHAPE.experts, ffn=8)
    )
    mappings = tables.mappings(shape, critic=False)
    generator = torch.Generator().manual_seed(5)
    given = {
        name: torch.randn(size, generator=generator)
        for mapping in mappings
        for name, size in zip(mapping.names, mapping.shapes, strict=True)
    }
    assert sum(".experts." in name for name in given) == 2 * EXPERTS * 3
    shards = {one.megatron: one.sharding.shard([given[name] for name in one.names], 0, 1) for one in mappings}
    joined, arrived, buckets = JoinedParts(torch.device("cpu")), {}, 0
    for bucket in WeightStream(Net(shards), layout, mappings, limit).everywhere(parts=True):  # type: ignore[arg-type]
        assert sum(tensor.nbytes for _, tensor in bucket) <= limit
        buckets += 1
        for name, tensor in joined.add(bucket):
            assert name not in arrived
            arrived[name] = tensor.clone()
    assert arrived.keys() == given.keys()
    assert all(torch.equal(arrived[name], given[name]) for name in given)
    assert buckets <= 2 * ceil(4 * sum(prod(tensor.shape) for tensor in given.values()) / limit) + 3
