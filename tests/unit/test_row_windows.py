"""Rows that move between ranks in windows: what moves, in how many calls, and how much is held at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tempo.runtime.row_windows import _divided, row_windows
from tests.support.ranks import run_ranks


def test_windows_by_hand() -> None:
    sizes = [3, 2, 0, 6, 9, 1, 1]
    assert list(_divided(sizes, 5)) == [range(3), range(3, 4), range(4, 5), range(5, 7)]
    assert list(_divided(sizes, 1)) == [range(row, row + 1) for row in range(7)]
    assert list(_divided(sizes, 100)) == [range(7)]
    assert list(_divided([], 5)) == []


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 40))
def test_windows_keep_to_their_size(sizes: list[int], size: int) -> None:
    windows = list(_divided(sizes, size))
    assert [row for rows in windows for row in rows] == list(range(len(sizes)))
    for rows in windows:
        assert sum(sizes[row] for row in rows) <= size or len(rows) == 1
    for rows, after in itertools.pairwise(windows):
        assert sum(sizes[row] for row in rows) + sizes[after.start] > size, "no window is closed while there is room"


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_a_single_process_gets_its_own_rows(sizes: list[int], size: int) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ids = [torch.arange(n, dtype=torch.int32) + 100 * row for row, n in enumerate(sizes)]
    floats = [-torch.rand(n) for n in sizes]
    lengths = torch.tensor(sizes, dtype=torch.int64)
    for sources in (None, torch.zeros(len(sizes), dtype=torch.int64)):
        moved = [
            (rows, window.clone())
            for rows, window in row_windows(lengths, lambda row: (ids[row], floats[row]), 2, sources, size)
        ]
        flat = torch.cat([window for _, window in moved] or [torch.empty(2, 0, dtype=torch.int32)], dim=1)
        assert torch.equal(flat[0], torch.cat([*ids, ids[0][:0] if ids else torch.empty(0, dtype=torch.int32)]))
        assert torch.equal(flat[1].view(torch.float32), torch.cat([*floats, torch.empty(0)]))


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


SIZES = [5, 1, 7, 3, 3, 2, 8, 1]
NUMBERS = [-0.0, float("nan"), float("-inf"), 1e-45, -1.5, 3e38]  # zeros of both signs, what is not finite, the least


def row_of(row: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(SIZES[row], dtype=torch.int32) - 2**31 + row  # every bit matters
    return ids, torch.tensor([NUMBERS[(row + t) % len(NUMBERS)] for t in range(SIZES[row])])


def moved(owner: Sequence[int], known: bool) -> tuple[list[tuple[range, bytes]], dict[str, list[int]]]:
    """The windows, as bytes, and the number of elements of each collective call by its name."""
    dist.init_process_group("gloo")
    calls: dict[str, list[int]] = {"broadcast": [], "all_reduce": []}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in calls:

            def counted(tensor: Tensor, *args: object, name: str = name, call: object = getattr(dist, name)) -> object:
                calls[name].append(tensor.numel())
                return call(tensor, *args)  # type: ignore[operator]

            monkeypatch.setattr(dist, name, counted)
        rank = dist.get_rank()
        windows = [
            (rows, window.numpy().tobytes())
            for rows, window in row_windows(
                torch.tensor(SIZES), lambda row: row_of(row) if owner[row] == rank else None, 2,
                torch.tensor(owner) if known else None, 9
            )
        ]  # fmt: skip
    dist.destroy_process_group()
    return windows, calls


@pytest.mark.parametrize(
    ("world", "owner", "known", "calls"),
    [
        (2, [0] * 8, True, {"broadcast": [12, 14, 16, 18], "all_reduce": []}),
        (4, [0] * 8, True, {"broadcast": [12, 14, 16, 18], "all_reduce": []}),
        (4, [3, 3, 1, 0, 2, 2, 1, 1], True, {"broadcast": [12, 14, 18], "all_reduce": [16]}),
        (4, [3, 3, 1, 0, 2, 2, 1, 1], False, {"broadcast": [], "all_reduce": [12, 14, 16, 18]}),
    ],
)
def test_every_rank_sees_every_bit_in_calls_that_do_not_grow_with_the_ranks(
    tmp_path: Path, world: int, owner: list[int], known: bool, calls: dict[str, list[int]]
) -> None:
    ranges = [range(2), range(2, 3), range(3, 6), range(6, 8)]  # of nine numbers at most
    expected = [
        (rows, b"".join(torch.cat([row_of(row)[column] for row in rows]).numpy().tobytes() for column in range(2)))
        for rows in ranges
    ]
    for windows, counted in run_ranks(moved, world, tmp_path / "ranks", owner, known):
        assert windows == expected
        assert counted == calls
