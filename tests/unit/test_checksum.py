"""The checksum of a tensor's bytes, against a loop over Python's integers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tempo.rollout import checksum as module
from megatron_tempo.rollout.checksum import checksum, root_mean_square

WORKER = Path(module.__file__).with_name("vllm_worker.py")


def by_hand(tensor: Tensor) -> str:
    data = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
    words = [int.from_bytes(data[i : i + 4].ljust(4, b"\0"), "little", signed=True) for i in range(0, len(data), 4)]
    return f"{sum((2 * i + 1) * word for i, word in enumerate(words)) % 2**64:016x}"


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(-128, 128, shape, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 8)], ids=str)
def test_it_is_the_sum_by_hand(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = random(shape, dtype)
    assert checksum(tensor) == by_hand(tensor)


@pytest.mark.parametrize("numel", [1, 7, 8, 9, 64, 77])
def test_it_does_not_depend_on_where_it_is_cut(monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    tensor = random((numel,), torch.int8)
    monkeypatch.setattr(module, "_CHUNK", 2)
    assert checksum(tensor) == by_hand(tensor)


def test_it_wraps_at_64_bits() -> None:
    tensor = torch.full((1 << 20,), -(2**31), dtype=torch.int32)
    assert (1 << 40) * 2**31 > 2**64
    assert checksum(tensor) == f"{-(1 << 40) * 2**31 % 2**64:016x}"
    assert checksum(tensor[:1]) == f"{2**64 - 2**31:016x}"


def test_order_matters_and_so_does_a_single_bit() -> None:
    tensor = random((64,), torch.float32)
    changed = tensor.view(torch.int32).clone()
    changed[63] ^= 1
    assert len({checksum(tensor), checksum(tensor.flip(0)), checksum(changed.view(torch.float32))}) == 3


def test_of_a_view_the_elements_count_and_not_where_they_lie() -> None:
    flat = random((65,), torch.bfloat16)
    assert checksum(flat[1:].view(8, 8).T) == checksum(flat[1:].view(8, 8).T.clone()) == by_hand(flat[1:].view(8, 8).T)


def test_no_elements() -> None:
    assert checksum(torch.empty(0, 4)) == "0" * 16
    assert root_mean_square(torch.empty(0, 4)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_root_mean_square(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tensor = random((7, 9), dtype)
    wanted = math.sqrt(sum(x * x for x in tensor.double().flatten().tolist()) / 63)
    assert root_mean_square(tensor) == pytest.approx(wanted, rel=1e-6)
    monkeypatch.setattr(module, "_CHUNK", 4)
    assert root_mean_square(tensor) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("function", [checksum, root_mean_square])
def test_the_worker_has_the_same(function: Callable[..., object]) -> None:
    assert inspect.getsource(function) in WORKER.read_text()
