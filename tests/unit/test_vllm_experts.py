"""A mixture's experts on several workers of vLLM: what each gets of them, and what it says that it has installed."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.rollout.checksum import checksums_of
from megatron_tempo.rollout.read_back import EVERYTHING
from megatron_tempo.rollout.slices import Block, Places, sliced
from megatron_tempo.rollout.vllm import READ_BACK, WORKER, Vllm
from tests.support.in_vllm import loaded
from tests.unit.test_slices import Receiver

EXPERTS, FFN, WIDTH = 6, 8, 12
NAME = "model.layers.3.mlp.experts"
GATED = ["gate_proj", "up_proj"]
# The first number of a worker's experts, and how many it has, as vLLM deals six out (`determine_expert_map`).
DEALT = {1: [(0, 6)], 2: [(0, 3), (3, 3)], 4: [(0, 2), (2, 2), (4, 1), (5, 1)]}
LAYOUTS = [(1, False), (2, False), (4, False), (2, True), (4, True)]  # workers, each expert on one of them


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def tensors() -> dict[str, Tensor]:
    shapes = {"gate_proj": (FFN, WIDTH), "up_proj": (FFN, WIDTH), "down_proj": (WIDTH, FFN)}
    names = [(expert, part) for expert in range(EXPERTS) for part in shapes]
    return {f"{NAME}.{e}.{part}.weight": random(i, *shapes[part]) for i, (e, part) in enumerate(names)}


class Unquantized:
    def __init__(self, kernel: str) -> None:
        self.unquantized_backend = type("Backend", (), {"name": kernel})


class Fp8:
    pass


def worker_of(
    module: ModuleType,
    rank: int,
    ranks: int,
    apart: bool,
    sent: dict[str, Tensor],
    kernel: str = "TRITON",
    pad: int = 0,
) -> torch.nn.Module:
    """The layer of a worker, cut by hand. `pad`: rows and columns that a kernel has more, with other numbers."""
    first, count = DEALT[ranks][rank] if apart else (0, EXPERTS)
    cut = 1 if apart else ranks
    own = FFN // cut
    rows = slice(0, FFN) if apart else slice(rank * own, (rank + 1) * own)
    gates, down = [], []
    for expert in range(first, first + count):
        parts = [sent[f"{NAME}.{expert}.{part}.weight"][rows] for part in GATED]
        padded = [torch.nn.functional.pad(part, (0, pad, 0, pad), value=7.0) for part in parts]
        gates.append(torch.cat(padded[::-1] if kernel == "FLASHINFER_CUTLASS" else padded))
        columns = sent[f"{NAME}.{expert}.down_proj.weight"][:, rows]
        down.append(torch.nn.functional.pad(columns, (0, pad, 0, pad), value=7.0))
    layer: Any = type("Layer", (module.RoutedExperts, torch.nn.Module), {})()
    torch.nn.Module.__init__(layer)
    layer.w13_weight = torch.nn.Parameter(torch.stack(gates), requires_grad=False)
    layer.w2_weight = torch.nn.Parameter(torch.stack(down), requires_grad=False)
    numbers = torch.full((EXPERTS,), -1, dtype=torch.int32)
    numbers[first : first + count] = torch.arange(count, dtype=torch.int32)
    parallel = {"tp_size": cut, "tp_rank": 0 if apart else rank, "enable_eplb": False}
    config = {
        "moe_parallel_config": type("Parallel", (), parallel),
        "intermediate_size_per_partition_unpadded": own,
        "hidden_dim_unpadded": WIDTH,
        "tp_shard_with_padding": False,
    }
    layer.moe_config = type("Config", (), config)
    layer.expert_map_manager = type("Manager", (), {"expert_map": numbers if apart and ranks > 1 else None})
    layer.global_num_experts, layer.quant_method = EXPERTS, Unquantized(kernel)
    model = torch.nn.Module()
    parent = model
    for word in NAME.split("."):
        parent.add_module(word, torch.nn.Module())
        parent = parent.get_submodule(word)
    parent.add_module("routed_experts", layer)
    return model


def workers_of(module: ModuleType, ranks: int, apart: bool, sent: dict[str, Tensor], **given: Any) -> list[Any]:
    return [worker_of(module, rank, ranks, apart, sent, **given) for rank in range(ranks)]


def places_of(module: ModuleType, workers: list[Any]) -> Places:
    answer = {"results": [module.places(one, tied=False) for one in workers]}
    return Vllm(cpu=True, tensor=len(workers)).places(answer)


def differences(module: ModuleType, workers: list[Any], sent: dict[str, Tensor]) -> list[str]:
    results = [module.read_back(worker, 0, 1, tied=False) for worker in workers]
    expected = checksums_of(list(sent.items()))
    return [name for name, _ in Vllm(cpu=True, tensor=1).not_installed(expected, EVERYTHING, {"results": results})]


@pytest.fixture(scope="module")
def reader() -> Iterator[ModuleType]:
    with loaded(READ_BACK) as module:
        yield module


@pytest.fixture
def worker(reader: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    with loaded(WORKER) as module:
        monkeypatch.setattr(module, "block_checksum", reader.block_checksum)
        yield module


@pytest.mark.parametrize(("ranks", "apart"), LAYOUTS)
@pytest.mark.parametrize(("kernel", "pad"), [("TRITON", 0), ("FLASHINFER_CUTLASS", 0), ("BATCHED_TRITON", 4)])
def test_the_experts_of_all_workers_are_what_was_sent(
    reader: ModuleType, ranks: int, apart: bool, kernel: str, pad: int
) -> None:
    sent = tensors()
    workers = workers_of(reader, ranks, apart, sent, kernel=kernel, pad=pad)
    assert differences(reader, workers, sent) == []
    read = {part[0] for one in workers for part in reader.read_back(one, 0, 1, tied=False)["tensors"]}
    assert read == set(sent), "nothing is left out"


@pytest.mark.parametrize(("ranks", "apart"), LAYOUTS)
@pytest.mark.parametrize("name", [f"{NAME}.5.{part}.weight" for part in (*GATED, "down_proj")])
def test_a_number_of_an_expert_that_is_not_installed_is_found(
    reader: ModuleType, ranks: int, apart: bool, name: str
) -> None:
    """The last number of the last expert is on the last worker, however the experts are shared out."""
    sent = tensors()
    changed = sent | {name: sent[name].clone()}
    changed[name].flatten()[-1] += 0.5
    workers = workers_of(reader, ranks, apart, sent)
    assert differences(reader, [*workers[:-1], worker_of(reader, ranks - 1, ranks, apart, changed)], sent) == [name]


def test_experts_in_each_others_place_are_found(reader: ModuleType) -> None:
    sent = tensors()
    one, other = f"{NAME}.0.up_proj.weight", f"{NAME}.1.up_proj.weight"
    swapped = sent | {one: sent[other], other: sent[one]}
    assert sorted(differences(reader, workers_of(reader, 2, False, swapped), sent)) == [one, other]


@pytest.mark.parametrize("kernel", ["CPU", "FLASHINFER_TRTLLM", "AITER"])
def test_kernels_that_reorder_experts_are_not_accused(reader: ModuleType, kernel: str) -> None:
    sent = tensors()
    workers = workers_of(reader, 2, False, {name: tensor + 1 for name, tensor in sent.items()}, kernel=kernel)
    assert differences(reader, workers, sent) == []


@pytest.mark.parametrize(("ranks", "apart"), [case for case in LAYOUTS if case[0] > 1])
def test_each_worker_is_sent_its_experts_or_its_part_of_them(
    reader: ModuleType, worker: ModuleType, ranks: int, apart: bool
) -> None:
    """Each byte is sent once. What a worker hands to vLLM's loader is right where it is the worker's, else NaN."""
    sent = tensors()
    workers = workers_of(reader, ranks, apart, sent)
    places = places_of(reader, workers)
    slices = sliced(list(sent.items()), places, torch.device("cpu"))
    assert slices is not None
    assert slices.common == []
    assert sum(own.nbytes for own in slices.own) == sum(tensor.nbytes for tensor in sent.values())
    adapter = Vllm(cpu=True, tensor=ranks)
    for rank, model in enumerate(workers):
        receiver = Receiver(worker, rank)
        receiver.elsewhere = reader.elsewhere(model)
        receiver.receive(list(sent.items()), adapter, places)
        first, count = DEALT[ranks][rank]
        here = {name for name in sent if not apart or first <= int(name.split(".")[5]) < first + count}
        assert receiver.tensors.keys() == here
        for part in reader._pieces(model, tied=False):
            loaded = receiver.tensors[part.tensor]
            rows, columns = part.rows.shape
            assert torch.equal(loaded[part.row : part.row + rows, part.column : part.column + columns], part.rows)
            assert loaded.isnan().sum() == loaded.numel() - part.rows.numel()


def test_a_quantised_expert_is_sent_whole_to_its_worker_and_not_cut(reader: ModuleType) -> None:
    """Weights in FP8 have a scale for each block of 128 x 128."""
    sent = tensors()
    for apart in (False, True):
        workers = workers_of(reader, 2, apart, sent)
        for model in workers:
            layer: Any = model.get_submodule(f"{NAME}.routed_experts")
            layer.quant_method = Fp8()
            layer.moe_config.intermediate_size_per_partition_unpadded = 384
            layer.moe_config.hidden_dim_unpadded = 256
        found = places_of(reader, workers)
        if not apart:
            assert found == [{}, {}]
            continue
        assert found[0][f"{NAME}.0.down_proj.weight"] == Block(0, 256, 0, 384)
        assert found[0][f"{NAME}.0.down_proj.weight_scale_inv"] == Block(0, 2, 0, 3)
        assert found[1][f"{NAME}.0.down_proj.weight_scale_inv"] == Block(0, 0, 0, 0)
        assert [len(place) for place in found] == [6 * EXPERTS] * 2
        assert reader.elsewhere(workers[1]) == {name for name in found[1] if found[1][name].rows == 0}


def test_experts_that_vllm_moves_are_sent_whole_and_not_read(reader: ModuleType) -> None:
    sent = tensors()
    workers = workers_of(reader, 2, True, sent)
    for model in workers:
        layer: Any = model.get_submodule(f"{NAME}.routed_experts")
        layer.moe_config.moe_parallel_config.enable_eplb = True
    assert places_of(reader, workers) == [{}, {}]
    assert reader.read_back(workers[0], 0, 1, tied=False)["tensors"] == []
