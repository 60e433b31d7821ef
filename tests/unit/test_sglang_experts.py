"""SGLang's checksums of experts on GPUs, put together from what several senders know of a layer."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.rollout.checksum import whole_checksums
from megatron_tempo.rollout.read_back import EVERYTHING
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.sglang_checksums import TILE, gpu_hash, of_rank
from megatron_tempo.types import Bucket, PartName

EXPERTS, FFN, WIDTH = 3, 256, 128  # a tensor rank of two has one tile of each matrix, in bf16
LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
SHAPES = {"gate": (FFN, WIDTH), "up": (FFN, WIDTH), "down": (WIDTH, FFN)}
DENSE = "model.norm.weight"


def tensors(seed: int = 0, shapes: dict[str, tuple[int, int]] | None = None) -> dict[str, Tensor]:
    """A mixture of two layers and a norm."""
    generator = torch.Generator().manual_seed(seed)
    shapes = SHAPES if shapes is None else shapes
    names = [(layer, expert, part) for layer in LAYERS for expert in range(EXPERTS) for part in shapes]
    drawn = {
        f"{layer}.{expert}.{part}_proj.weight": torch.randn(shapes[part], generator=generator).bfloat16()
        for layer, expert, part in names
    }
    return drawn | {DENSE: torch.ones(8).bfloat16()}


def parameters(sent: dict[str, Tensor], rank: int, ranks: int, *, up_first: bool = False) -> dict[str, Tensor]:
    """What a tensor rank has, by SGLang's loaders (0.5.23, `srt/layers/moe/fused_moe_triton/layer.py`, `_load_w13`)."""
    held = {DENSE: sent[DENSE]}
    for layer in LAYERS:
        cut = {
            part: [
                sent[f"{layer}.{expert}.{part}_proj.weight"].chunk(ranks, int(part == "down"))[rank]
                for expert in range(EXPERTS)
            ]
            for part in SHAPES
        }
        pairs = zip(cut["up" if up_first else "gate"], cut["gate" if up_first else "up"], strict=True)
        held[f"{layer}.w13_weight"] = torch.stack([torch.cat(pair) for pair in pairs])
        held[f"{layer}.w2_weight"] = torch.stack(cut["down"])
    return held


def answer(sent: dict[str, Tensor], ranks: int, **given: Any) -> dict[str, Any]:
    return {
        "ranks": [
            {
                "parallelism_info": [{"tp_rank": rank}],
                "checksums": {name: gpu_hash(one) for name, one in parameters(sent, rank, ranks, **given).items()},
            }
            for rank in range(ranks)
        ]
    }


def adapter_of(ranks: int, *, cpu: bool = False) -> Sglang:
    return Sglang(cpu=cpu, tensor=ranks, key_heads=2, experts=EXPERTS)


def expected(adapter: Sglang, sent: dict[str, Tensor], senders: int = 2) -> dict[str, tuple[str, float]]:
    """What senders expect that have every other expert, in buckets of two tensors; joined as `ServersEngine` does."""
    found: dict[str, tuple[str, float]] = {}
    for sender in range(senders):
        own: Bucket = [
            (name, one)
            for name, one in sent.items()
            if (int(name.split(".")[5]) % senders if "experts" in name else 0) == sender
        ]
        for first in range(0, len(own), 2):
            found |= adapter.expected(own[first : first + 2])
    return whole_checksums(found)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("senders", [1, 2, 3])
def test_the_senders_parts_are_the_checksum_of_sglangs_parameters(ranks: int, senders: int) -> None:
    """Against the checksum of each whole parameter, which is SGLang's (tests/engines/test_drift.py)."""
    sent, adapter = tensors(), adapter_of(ranks)
    wanted = expected(adapter, sent, senders)
    assert sum("experts" in name for name in wanted) == len(LAYERS) * EXPERTS * 3 * ranks
    assert adapter.not_installed(wanted, EVERYTHING, answer(sent, ranks)) == []
    for name in (f"{LAYERS[1]}.2.up_proj.weight", f"{LAYERS[0]}.0.down_proj.weight"):
        changed = sent | {name: sent[name].clone()}
        changed[name][-1, -1] += 0.5
        layer, own = name.split(".experts.")[0] + ".experts", "w2_weight" if "down" in name else "w13_weight"
        found = [one for one, _ in adapter.not_installed(wanted, EVERYTHING, answer(changed, ranks))]
        assert found == [of_rank(f"{layer}.{own}", ranks - 1, ranks)]


def test_another_layout_of_experts_is_not_taken_for_a_drift(caplog: pytest.LogCaptureFixture) -> None:
    """A kernel that has the up projection first: nothing is compared, and the rest still is."""
    sent, adapter = tensors(), adapter_of(1)
    wanted = expected(adapter, sent)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert adapter.not_installed(wanted, EVERYTHING, answer(sent, 1, up_first=True)) == []
    said = [record.getMessage() for record in caplog.records]
    assert said == ["SGLang's kernel has another layout of w13_weight than expected: it is not compared"]
    name = f"{LAYERS[0]}.1.down_proj.weight"
    changed = sent | {DENSE: sent[DENSE] + 1, name: sent[name] + 1}
    found = [one for one, _ in adapter.not_installed(wanted, EVERYTHING, answer(changed, 1, up_first=True))]
    assert found == [DENSE, f"{LAYERS[0]}.w2_weight"]


def test_experts_that_are_all_wrong_are_found_once_some_were_right() -> None:
    sent, adapter = tensors(), adapter_of(1)
    wanted = expected(adapter, sent)
    assert adapter.not_installed(wanted, EVERYTHING, answer(sent, 1)) == []
    wrong = adapter.not_installed(wanted, EVERYTHING, answer(tensors(seed=1), 1))
    assert sorted(name for name, _ in wrong) == sorted(
        f"{layer}.{own}" for layer in LAYERS for own in ("w13_weight", "w2_weight")
    )


def test_what_is_not_whole_tiles_or_not_whole_or_quantised_is_not_compared() -> None:
    small = {part: (rows // 2, columns) for part, (rows, columns) in SHAPES.items()}
    for name, one in tensors(shapes=small).items():
        if "experts" in name:
            assert one.nbytes // 4 == TILE
            assert {total for total, _ in adapter_of(2).expected([(name, one)]).values()} == {""}
    name, one = f"{LAYERS[0]}.0.gate_proj.weight", tensors()[f"{LAYERS[0]}.0.gate_proj.weight"]
    part: Bucket = [(PartName(name, 0, FFN // 2, FFN), one[: FFN // 2])]
    quantised: Bucket = [(name, one.to(torch.float8_e4m3fn)), (f"{name}_scale_inv", torch.ones(2, 1))]
    for bucket in (part, quantised):
        adapter, sent = adapter_of(1), tensors()
        wanted = expected(adapter, sent) | adapter.expected(bucket)
        changed = tensors(seed=1) | {DENSE: sent[DENSE]}
        found = {one for one, _ in adapter.not_installed(expected(adapter, sent), EVERYTHING, answer(sent, 1))}
        assert found == set()
        found = {one for one, _ in adapter.not_installed(wanted, EVERYTHING, answer(changed, 1))}
        assert f"{LAYERS[0]}.w13_weight" not in found
        assert f"{LAYERS[0]}.w2_weight" in found


def test_the_cpus_checksums_leave_experts_out() -> None:
    adapter = adapter_of(1, cpu=True)
    assert list(adapter.expected(list(tensors().items()))) == [DENSE]
