"""A rank's process groups share one gloo device with its thread, and have one worker thread each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_tempo.config.choices import Device
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.device import select_device
from megatron_tempo.models.parallel import parallel_groups
from tests.support.ranks import run_ranks

GATHERS = 50_000  # with two workers, two of six processes ended before the last one


def device_threads() -> int:
    """The threads of gloo's devices, by their name. A thread names itself, so its name can come after its device."""
    deadline = time.monotonic() + 60
    while True:
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        count = names.count("gloo_tcp_loop")
        if count or time.monotonic() > deadline:
            return count
        time.sleep(0.01)


def backend(group: Any) -> Any:
    return group._get_backend(torch.device("cpu"))


def opened() -> tuple[int, int, list[int], list[float]]:
    """Threads of devices outside and inside; workers of a group of each kind and a new one, and sums over them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    lonely = device_threads()
    dist.destroy_process_group()
    config = ParallelConfig(tensor=2, pipeline=2)
    with parallel_groups(config, select_device(Device.cpu, 0), seed=0):
        groups = [
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_model_parallel_group(),
            dist.new_group(),
        ]
        sums = []
        for group in groups:
            one = torch.tensor(float(2 ** dist.get_rank()))
            dist.all_reduce(one, group=group)
            sums.append(float(one))
        return (
            lonely,
            device_threads(),
            [backend(group).options._threads for group in (dist.group.WORLD, *groups)],
            sums,
        )


def test_one_device_for_all_groups(tmp_path: Path) -> None:
    expected = [[3.0, 5.0], [3.0, 10.0], [12.0, 5.0], [12.0, 10.0]]  # tensor ranks 0-1 and 2-3, stages 0-2 and 1-3
    for (lonely, threads, of_groups, sums), pair in zip(
        run_ranks(opened, 4, tmp_path / "ranks"), expected, strict=True
    ):
        assert lonely == threads == 1
        assert of_groups == [1] * 5
        assert sums == [*pair, 15.0, 15.0]


def gathered() -> list[float]:
    """Many gathers under way at once, as of weights after an optimizer's step, in a group of one rank."""
    with parallel_groups(ParallelConfig(), select_device(Device.cpu, 0), seed=0):
        gloo, weights, whole = backend(dist.group.WORLD), torch.arange(4.0), torch.zeros(4)
        for _ in range(GATHERS // 200):
            for work in [gloo.allgather_coalesced([[whole]], [weights]) for _ in range(200)]:
                work.wait()
        return whole.tolist()


def test_gathers_under_way_at_once_keep_the_heap_whole(tmp_path: Path) -> None:
    assert run_ranks(gathered, 1, tmp_path / "ranks") == [[0.0, 1.0, 2.0, 3.0]]
