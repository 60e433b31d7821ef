"""What workers say that they have installed, against tensors that were cut by hand."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.rollout.checksum import checksum, checksums_of
from megatron_tempo.rollout.read_back import EVERYTHING, SELECTIONS, Selection
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.sglang_checksums import bytes_hash, gpu_hash, installed
from megatron_tempo.rollout.vllm import READ_BACK, Vllm
from megatron_tempo.types import Bucket
from tests.support.in_vllm import loaded

WIDTH, HEAD, HEADS, KEYS, GATES, WORDS = 16, 4, 8, 2, 24, 67
ATTENTION, MLP = "model.layers.3.self_attn", "model.layers.3.mlp"
HEAD_NAME, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def tensors() -> dict[str, Tensor]:
    return {
        EMBEDDING: random(WORDS, WIDTH),
        f"{ATTENTION}.q_proj.weight": random(HEADS * HEAD, WIDTH),
        f"{ATTENTION}.k_proj.weight": random(KEYS * HEAD, WIDTH),
        f"{ATTENTION}.v_proj.weight": random(KEYS * HEAD, WIDTH) + 1,
        f"{ATTENTION}.o_proj.weight": random(WIDTH, HEADS * HEAD),
        f"{MLP}.gate_proj.weight": random(GATES, WIDTH),
        f"{MLP}.up_proj.weight": random(GATES, WIDTH) - 1,
        NORM: random(WIDTH - 1),
        HEAD_NAME: random(WORDS, WIDTH) * 2,
    }


# A checksum of parts


@pytest.fixture(scope="module")
def module() -> Iterator[ModuleType]:
    with loaded(READ_BACK) as module:
        yield module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("chunk", [1, 40, 1 << 19])
def test_parts_add_up_to_the_checksum(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(module, "_CHUNK", chunk)
    whole = torch.randn(7, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks = [(rows, columns) for rows in ((0, 3), (3, 7)) for columns in ((0, 8), (8, 24))]
    total = sum(
        int(module.block_checksum(whole[top:bottom, left:right], top, left, 24))
        for (top, bottom), (left, right) in blocks
    )
    assert f"{total % 2**64:016x}" == checksum(whole)
    row = whole.flatten()[None, :41]  # which ends within a word in bf16 and FP8
    assert f"{int(module.block_checksum(row, 0, 0, 41)) % 2**64:016x}" == checksum(row)


def test_a_part_that_begins_within_a_word_is_refused(module: ModuleType) -> None:
    with pytest.raises(AssertionError, match="parts of a word"):
        module.block_checksum(torch.zeros(2, 3).bfloat16(), 0, 3, 6)


# vLLM


class Unquantized:
    pass


def layer_of(module: ModuleType, kind: str, weight: Tensor, **attributes: Any) -> torch.nn.Module:
    """A layer of vLLM's class `kind`. QKV and merged layers are column-parallel, and all of these are linear."""
    bases = {
        "QKVParallelLinear": ("QKVParallelLinear", "ColumnParallelLinear", "LinearBase"),
        "MergedColumnParallelLinear": ("MergedColumnParallelLinear", "ColumnParallelLinear", "LinearBase"),
        "RowParallelLinear": ("RowParallelLinear", "LinearBase"),
        "ParallelLMHead": ("ParallelLMHead", "VocabParallelEmbedding"),
        "VocabParallelEmbedding": ("VocabParallelEmbedding",),
    }[kind]
    layer = type("Layer", (*(getattr(module, base) for base in bases), torch.nn.Module), {})()
    torch.nn.Module.__init__(layer)
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    layer.quant_method = Unquantized()
    for name, value in {"input_size": WIDTH, "input_size_per_partition": WIDTH, **attributes}.items():
        setattr(layer, name, value)
    return layer


def worker_of(module: ModuleType, rank: int, ranks: int, sent: dict[str, Tensor]) -> torch.nn.Module:
    """What a worker of vLLM holds: its shards, the vocabulary padded to 64 rows, heads of keys repeated."""
    cut = {name: tensor.chunk(ranks)[rank] for name, tensor in sent.items() if name != NORM}
    copies = max(1, ranks // KEYS)
    for name in ("k_proj", "v_proj"):
        cut[f"{ATTENTION}.{name}.weight"] = sent[f"{ATTENTION}.{name}.weight"].chunk(ranks // copies)[rank // copies]
    common = {"tp_rank": rank, "tp_size": ranks}
    rows = 128 // ranks
    kept = max(0, min(WORDS - rank * rows, rows))
    indices = type("Indices", (), {"org_vocab_start_index": min(rank * rows, WORDS), "num_org_elements": kept})
    vocabulary = {"shard_indices": indices, "embedding_dim": WIDTH}

    def padded(name: str) -> Tensor:
        own = sent[name][rank * rows : (rank + 1) * rows]
        return torch.nn.functional.pad(own, (0, 0, 0, rows - len(own)), value=7.0)

    qkv = torch.cat([cut[f"{ATTENTION}.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")])
    heads = {"num_heads": HEADS // ranks, "num_kv_heads": max(1, KEYS // ranks), "num_kv_head_replicas": copies}
    heads |= {"head_size": HEAD, "v_head_size": HEAD}
    gated = torch.cat([cut[f"{MLP}.{name}.weight"] for name in ("gate_proj", "up_proj")])
    columns = sent[f"{ATTENTION}.o_proj.weight"].chunk(ranks, dim=1)[rank]
    by_column = {"input_size": HEADS * HEAD, "input_size_per_partition": columns.shape[1], "output_size": WIDTH}
    norm = torch.nn.Module()
    norm.weight = torch.nn.Parameter(sent[NORM].clone())
    layers = {
        EMBEDDING: layer_of(module, "VocabParallelEmbedding", padded(EMBEDDING), **vocabulary, **common),
        f"{ATTENTION}.qkv_proj.weight": layer_of(module, "QKVParallelLinear", qkv, **heads, **common),
        f"{ATTENTION}.o_proj.weight": layer_of(module, "RowParallelLinear", columns, **by_column, **common),
        f"{MLP}.gate_up_proj.weight": layer_of(
            module, "MergedColumnParallelLinear", gated, output_sizes=[GATES, GATES], **common
        ),
        NORM: norm,
        HEAD_NAME: layer_of(module, "ParallelLMHead", padded(HEAD_NAME), **vocabulary, **common),
    }
    model = torch.nn.Module()
    for name, layer in layers.items():
        *above, own, _ = name.split(".")
        parent = model
        for word in above:
            if word not in parent._modules:
                parent.add_module(word, torch.nn.Module())
            parent = parent.get_submodule(word)
        parent.add_module(own, layer)
    return model


def differences(module: ModuleType, workers: list[torch.nn.Module], sent: dict[str, Tensor], **given: Any) -> list[str]:
    selection = given.get("selection", EVERYTHING)
    tied = given.get("tied", False)
    results = [module.read_back(worker, selection.index, selection.of, tied=tied) for worker in workers]
    expected = checksums_of(list(sent.items()))
    return [name for name, _ in Vllm(cpu=True, tensor=1).not_installed(expected, selection, {"results": results})]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_vllms_workers_hold_each_tensor_once(module: ModuleType, ranks: int) -> None:
    """With four ranks two have the same head of keys, and the last of the vocabulary's shards has only padding."""
    sent = tensors()
    assert differences(module, [worker_of(module, rank, ranks, sent) for rank in range(ranks)], sent) == []


@pytest.mark.parametrize("name", list(tensors()))
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_number_that_is_not_installed_on_one_rank_is_found(module: ModuleType, name: str, rank: int) -> None:
    sent = tensors()
    changed = {key: tensor.clone() for key, tensor in sent.items()}
    changed[name].flatten()[-1] += 0.5
    wrong = worker_of(module, rank, 4, changed)
    workers = [wrong if one == rank else worker_of(module, one, 4, sent) for one in range(4)]
    # The last element of a tensor that is cut by rows is on the last rank, of keys on the last two, of a vocabulary of
    # 67 words in shards of 32 on the third.
    held = {"q_proj": (3,), "k_proj": (2, 3), "v_proj": (2, 3), "o_proj": (3,), "gate_proj": (3,), "up_proj": (3,)}
    held |= {"embed_tokens": (2,), "lm_head": (2,), "norm": (0, 1, 2, 3)}
    assert differences(module, workers, sent) == ([name] if rank in held[name.split(".")[-2]] else [])


def test_a_tied_head_is_compared_with_the_embedding(module: ModuleType) -> None:
    sent = tensors()
    tied = sent | {HEAD_NAME: sent[EMBEDDING]}
    named = {name: tensor for name, tensor in sent.items() if name != HEAD_NAME}
    assert differences(module, [worker_of(module, 0, 1, tied)], named, tied=True) == []
    assert differences(module, [worker_of(module, 0, 1, sent)], named, tied=True) == [EMBEDDING]


def test_a_tensor_that_nothing_holds_is_found_and_one_that_cannot_be_read_is_not_accused(module: ModuleType) -> None:
    sent = tensors()
    worker = worker_of(module, 0, 1, sent)
    layer: Any = worker.get_submodule(f"{MLP}.gate_up_proj")
    layer.quant_method = type("Fp8LinearMethod", (), {})()
    layer.weight = torch.nn.Parameter(torch.zeros(3, 3))
    assert differences(module, [worker], sent) == []
    other = "model.layers.9.mlp.up_proj.weight"
    assert differences(module, [worker], sent | {other: random(2, 2)}) == [other]


def test_all_selections_together_are_everything(module: ModuleType) -> None:
    sent = tensors()
    selections = [Selection(index, SELECTIONS) for index in range(SELECTIONS)]
    assert all(sum(one.has(name) for one in selections) == 1 for name in sent)
    changed = {name: tensor + 1 for name, tensor in sent.items()}
    found = [
        differences(module, [worker_of(module, 0, 1, changed)], sent, selection=selection) for selection in selections
    ]
    assert sorted(name for names in found for name in names) == sorted(sent)


# SGLang


def test_sglangs_shards_by_hand() -> None:
    sent = tensors()
    held = {(name, rank): tensor for name, rank, tensor in installed(list(sent.items()), 4, KEYS)}
    qkv = held[f"{ATTENTION}.qkv_proj.weight", 3]
    parts = [sent[f"{ATTENTION}.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(qkv, torch.cat([parts[0][24:], parts[1][4:], parts[2][4:]]))
    assert torch.equal(held[f"{ATTENTION}.o_proj.weight", 1], sent[f"{ATTENTION}.o_proj.weight"][:, 8:16])
    assert torch.equal(held[NORM, 2], sent[NORM])
    assert [len(held[EMBEDDING, rank]) for rank in range(4)] == [32] * 4
    assert torch.equal(held[EMBEDDING, 2], torch.cat([sent[EMBEDDING][64:], torch.zeros(29, WIDTH).bfloat16()]))
    assert not held[EMBEDDING, 3].any()


def ranks_of(adapter: Sglang, bucket: Bucket, changed: str = "") -> dict[str, Any]:
    """An answer of SGLang's servers of these tensors."""
    ranks: list[dict[str, Any]] = []
    for name, (total, _) in adapter.expected(bucket).items():
        own, _, rank = name.removesuffix(")").partition(" (tensor rank ")
        while len(ranks) <= int(rank or 0):
            ranks.append({"parallelism_info": [{"tp_rank": len(ranks)}], "checksums": {}})
        ranks[int(rank or 0)]["checksums"][own] = "0" * 16 if name == changed else total
    return {"ranks": ranks}


@pytest.mark.parametrize("cpu", [True, False])
def test_each_rank_of_sglang_is_compared(cpu: bool) -> None:
    adapter, bucket = Sglang(cpu=cpu, tensor=2, key_heads=KEYS), list(tensors().items())
    expected = adapter.expected(bucket)
    name = f"{MLP}.gate_up_proj.weight (tensor rank 1)"
    assert adapter.not_installed(expected, EVERYTHING, ranks_of(adapter, bucket)) == []
    ((found, apart),) = adapter.not_installed(expected, EVERYTHING, ranks_of(adapter, bucket, name))
    assert found == name
    assert math.isnan(apart)
    answer = ranks_of(adapter, bucket)
    del answer["ranks"][1]["checksums"][NORM]
    assert [name for name, _ in adapter.not_installed(expected, EVERYTHING, answer)] == [f"{NORM} (tensor rank 1)"]


def test_sglangs_fp8_weights_are_not_accused() -> None:
    name = f"{MLP}.down_proj.weight"
    bucket: Bucket = [(name, torch.zeros(4, 4).to(torch.float8_e4m3fn)), (f"{name}_scale_inv", torch.ones(1, 1))]
    adapter = Sglang(cpu=False, tensor=1)
    answer = {"ranks": [{"parallelism_info": [{"tp_rank": 0}], "checksums": {name: "of something else"}}]}
    assert adapter.not_installed(adapter.expected(bucket), EVERYTHING, answer) == []


def test_the_cpus_checksum_is_the_beginning_of_the_sha256() -> None:
    tensor = random(3, 5)
    data = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
    assert bytes_hash(tensor) == hashlib.sha256(data).hexdigest()[:16]
    assert bytes_hash(tensor.t()) == bytes_hash(tensor.t().contiguous()) != bytes_hash(tensor)


@pytest.mark.parametrize("numel", [0, 1, 3, 8192 * 2, 8192 * 2 + 2, 50_000])
def test_the_gpus_checksum_by_hand(numel: int) -> None:
    assert gpu_hash(random(numel)) == by_hand(random(numel))


def by_hand(tensor: Tensor) -> str:
    """With Python's integers, one word at a time: SGLang's `gpu_tensor_hash.py` as its comments describe it."""
    data = bytes(tensor.view(torch.uint8).tolist())
    words = [int.from_bytes(data[i : i + 4].ljust(4, b"\0"), "little") for i in range(0, len(data), 4)]
    if not words:
        return "0" * 16

    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    def turned(x: int, bits: int) -> int:
        return (x << bits | x >> 32 - bits) % 2**32

    seed = 0x243F6A88
    seeds = (seed, (seed * 0x9E3779B1 ^ 0xDEADBEEF) % 2**32)
    total = 0
    for first in range(0, len(words), 8192):
        sums = [0, 0]
        for number, word in enumerate(words[first : first + 8192], first):
            for which, (factor, bits) in enumerate(((0x27D4EB2D, 15), (0x165667B1, 13))):
                place = (number * factor + seeds[which]) % 2**32 ^ turned(number, bits)
                sums[which] = (sums[which] + mix(word ^ place)) % 2**32
        high, low = (mix(one ^ len(words) * 4 % 2**32) for one in sums)
        total = (total + (high << 32 | low)) % 2**64
    total = (total ^ total >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    total = (total ^ total >> 27) * 0x94D049BB133111EB % 2**64
    return f"{total ^ total >> 31:016x}"
