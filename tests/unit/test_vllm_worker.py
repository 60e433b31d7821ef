"""The file that runs in vLLM's workers, as far as it needs no vLLM: memory of another device, tensors in parts."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tempo.rollout.server_adapter import described
from megatron_tempo.rollout.vllm import WORKER, Vllm
from megatron_tempo.types import Bucket, PartName
from megatron_tempo.weights.shared_memory import in_shared_memory
from tests.support.in_vllm import loaded


@pytest.fixture(scope="module")
def worker() -> Iterator[ModuleType]:
    """The worker's module, with stand-ins for what it imports of vLLM."""
    with loaded(WORKER) as module:
        yield module


def receiver_on(worker: ModuleType, device: str) -> Any:
    """A receiver that only knows its device and its rank."""
    receiver = worker.WeightReceiver.__new__(worker.WeightReceiver)
    receiver.device, receiver._groups = torch.device(device), {}
    receiver.parallel_config = type("Parallel", (), {"rank": 1})
    return receiver


def test_memory_of_another_gpu_is_copied_to_the_workers(worker: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the trainer's GPU, torch's meta device for the worker's."""
    memory = torch.arange(6, dtype=torch.int16).untyped_storage()
    asked: list[list[Any]] = []

    def opened(handle: list[Any]) -> torch.UntypedStorage:
        asked.append(handle)
        return memory

    monkeypatch.setattr(worker, "opened", opened)
    info = worker.UpdateInfo([], [], [], cuda=[["first"], ["second"]])
    there = receiver_on(worker, "meta")._bytes(info)
    assert (there.device.type, there.dtype, there.shape) == ("meta", torch.uint8, (12,))
    here = receiver_on(worker, "cpu")._bytes(info)
    assert here.view(torch.int16).tolist() == list(range(6))
    assert here.data_ptr() == memory.data_ptr(), "no copy where it is not needed"
    assert asked == [["second"]] * 2


def test_shared_memory_of_the_cpu_is_mapped(worker: ModuleType) -> None:
    bucket = in_shared_memory([("a", torch.arange(3.0)), ("b", torch.ones(2))])
    call = Vllm(cpu=True, tensor=1).update(bucket, None, 0, compare=False)
    assert call.body is not None
    info = worker.UpdateInfo(**call.body["update_info"])
    tensors = worker._tensors(receiver_on(worker, "cpu")._bytes(info), info)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {"a": [0, 1, 2], "b": [1, 1]}


def received(worker: ModuleType, bucket: Bucket, begun: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that are whole with a bucket, described as the adapter does."""
    call = Vllm(cpu=True, tensor=1).update(bucket, "group", 0, compare=False)
    assert call.body is not None
    info = worker.UpdateInfo(**call.body["update_info"])
    flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
    tensors: dict[str, Tensor] = worker.joined(worker._tensors(flat, info), info, begun)
    return tensors


def test_a_tensor_in_parts_is_loaded_when_it_is_whole(worker: ModuleType) -> None:
    matrix, norm = torch.randn(7, 3).bfloat16(), torch.randn(3)
    begun: dict[str, Tensor] = {}
    cuts = [(0, 4), (4, 6), (6, 7)]
    found = [received(worker, [(PartName("m", a, b, 7), matrix[a:b])], begun) for a, b in cuts]
    assert found[:2] == [{}, {}]
    assert torch.equal(found[2]["m"], matrix)
    assert begun == {}
    alone = received(worker, [("norm", norm)], begun)
    assert torch.equal(alone["norm"], norm)


def test_an_update_that_is_begun_anew_forgets_the_older_parts(worker: ModuleType) -> None:
    begun: dict[str, Tensor] = {}
    received(worker, [(PartName("m", 0, 2, 4), torch.zeros(2, 1))], begun)
    received(worker, [(PartName("m", 0, 2, 4), torch.ones(2, 1))], begun)
    assert received(worker, [(PartName("m", 2, 4, 4), torch.ones(2, 1))], begun)["m"].tolist() == [[1.0]] * 4


def test_other_engines_are_told_nothing_of_parts() -> None:
    bucket = [("a", torch.zeros(2, 3))]
    assert described(bucket) == {"names": ["a"], "dtypes": ["float32"], "shapes": [[2, 3]]}
