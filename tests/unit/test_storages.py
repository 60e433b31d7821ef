"""The count of live storages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.support.storages import Storages

SIZE = 4 << 10  # bytes of a tensor


@pytest.fixture
def alone() -> Iterator[None]:
    """A gloo group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_tensor_of_a_finished_collective_is_not_counted() -> None:
    """Whoever still holds the work, as gloo's thread may, holds no tensor that is counted."""
    with Storages() as storages:
        mine, whole = torch.ones(SIZE // 4), torch.empty(SIZE // 4)
        work = [dist.all_reduce(mine, async_op=True), dist.all_gather_into_tensor(whole, mine, async_op=True)]
        for one in work:
            one.wait()
        assert torch.equal(whole, mine)
        assert storages.now() == storages.peak == 2 * SIZE
        dist.reduce_scatter_tensor(whole, 3 * mine)
        assert torch.equal(whole, 3 * mine)
        assert storages.peak == 3 * SIZE
        del mine, whole
        assert storages.now() == 0


def test_freed_storages_are_not_counted() -> None:
    before = torch.empty(SIZE // 4)
    with Storages([before]) as storages:
        first = torch.empty(SIZE // 4)
        view = first[1:]
        before.add_(1.0)
        del first
        assert storages.now() == SIZE
        view.untyped_storage().resize_(SIZE // 2)
        assert storages.now() == SIZE // 2
        assert storages.peak == SIZE
        assert storages.restart() == storages.peak == SIZE // 2
