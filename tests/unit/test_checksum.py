"""The checksum of a tensor's bytes, against a loop over Python's integers."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_tempo.rollout import tensor_sums as module
from megatron_tempo.rollout.checksum import checksum, checksums_of, whole_checksums
from megatron_tempo.rollout.tensor_sums import tensor_sums
from megatron_tempo.types import Bucket, PartName


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


@pytest.mark.parametrize("numel", [1, 127, 128, 129, 1000, 1024])
def test_it_does_not_depend_on_where_it_is_cut(monkeypatch: pytest.MonkeyPatch, numel: int) -> None:
    tensor = random((numel,), torch.int8)
    monkeypatch.setattr(module, "_STEP", 2)
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


def size_of(tensor: Tensor) -> float:
    return math.sqrt(sum(x * x for x in tensor.double().flatten().tolist()) / max(tensor.numel(), 1))


def test_no_elements() -> None:
    assert tensor_sums([torch.empty(0, 4)], [0]) == [("0" * 16, 0.0)]
    assert tensor_sums([], []) == []
    full = torch.ones(64)
    assert tensor_sums([full, torch.empty(0), full], [0] * 3) == [
        (by_hand(full), 1.0),
        ("0" * 16, 0.0),
        (by_hand(full), 1.0),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_root_mean_square(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tensor = random((70, 9), dtype)
    ((_, size),) = tensor_sums([tensor], [0])
    assert size == pytest.approx(size_of(tensor), rel=1e-6)
    monkeypatch.setattr(module, "_STEP", 4)
    assert tensor_sums([tensor], [0]) == [(by_hand(tensor), pytest.approx(size, rel=1e-12))]


# Buckets

# Rows of sums (128 bytes) are whole in the first and third bucket.
SHAPES = [[(64,), (64, 2), (128,)], [(7, 3), (64,), (33,), (5, 5)], [(32, 4), (1, 64), (256,), (64,)], [(1,)] * 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_a_bucket_has_the_checksums_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, shapes: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    """In line, apart, after something else, and in several steps: always what each tensor has by hand."""
    monkeypatch.setattr(module, "_STEP", 3)
    sizes = [math.prod(shape) for shape in shapes]
    flat = random((sum(sizes) + 5,), dtype)
    for start in (0, 5):
        parts = flat[start : start + sum(sizes)].split(sizes)
        in_line = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        for tensors in (in_line, [one.clone() for one in in_line], in_line[::-1], [in_line[0], in_line[-1]]):
            sums = tensor_sums(tensors, [0] * len(tensors))
            assert [total for total, _ in sums] == [by_hand(one) for one in tensors]
            assert [size for _, size in sums] == pytest.approx([size_of(one) for one in tensors], rel=1e-6)


def test_a_bucket_of_several_types() -> None:
    """As FP8 has them: a matrix and its scales, one after the other in one piece of memory."""
    memory = torch.empty(3 * (128 * 128 + 128), dtype=torch.uint8)
    tensors = []
    for part in memory.split(128 * 128 + 128):
        matrix, scales = part[: 128 * 128].view(torch.float8_e4m3fn), part[128 * 128 :].view(torch.float32)
        matrix.copy_(random((128 * 128,), torch.float32)), scales.copy_(random((32,), torch.float32))
        tensors += [matrix.view(128, 128), scales]
    assert [total for total, _ in tensor_sums(tensors, [0] * 6)] == [by_hand(one) for one in tensors]


def test_a_nan_stays_in_its_tensor() -> None:
    flat = torch.ones(96)
    flat[40] = math.nan
    (_, first), (_, second), (_, third) = tensor_sums(list(flat.split(32)), [0] * 3)
    assert (first, third) == (1.0, 1.0)
    assert math.isnan(second)


@pytest.mark.parametrize("width", [2, 3, 64])
def test_parts_add_up_to_the_tensor(width: int) -> None:
    tensor, norm = random((10, width), torch.float32), random((64,), torch.float32)
    parts: Bucket = [(PartName("a", first, last, 10), tensor[first:last]) for first, last in pairwise((0, 4, 6, 10))]
    found = whole_checksums(checksums_of([*parts, ("norm", norm)]))
    assert found["a"] == (by_hand(tensor), pytest.approx(size_of(tensor), rel=1e-6))
    assert found["norm"] == (by_hand(norm), pytest.approx(size_of(norm), rel=1e-6))


def launches(tensors: list[Tensor]) -> int:
    """Operations that read or write a tensor, each a kernel on a GPU, and reads of a number, which wait for it."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        tensor_sums(tensors, [0] * len(tensors))
    names = ("copy_", "mul", "sum", "add", "arange", "pow", "mm", "index_add_", "index", "cat", "fill_", "cumsum")
    return sum(event.name in {f"aten::{name}" for name in names} for event in found.events())


def test_a_bucket_takes_as_many_launches_with_many_tensors_as_with_few() -> None:
    flat = torch.ones(1 << 18)
    few, many = launches(list(flat.split(1 << 17))), launches(list(flat.split(1 << 9)))
    assert few == many < 40, "512 tensors"
    assert launches([one.clone() for one in flat.split(1 << 13)]) > 10 * few, "this is what is counted"
