"""A rank's process groups share one gloo device, and its thread."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_tempo.config.choices import Device
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.device import select_device
from megatron_tempo.models.parallel import parallel_groups
from tests.support.ranks import run_ranks


def device_threads() -> int:
    """The threads of gloo's devices, by their name. A thread names itself, so its name can come after its device."""
    deadline = time.monotonic() + 60
    while True:
        names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        count = names.count("gloo_tcp_loop")
        if count or time.monotonic() > deadline:
            return count
        time.sleep(0.01)


def opened() -> tuple[int, int, list[float]]:
    """Threads of devices outside and inside, and sums over a group of each kind and a new one."""
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
        return lonely, device_threads(), sums


def test_one_device_for_all_groups(tmp_path: Path) -> None:
    expected = [[3.0, 5.0], [3.0, 10.0], [12.0, 5.0], [12.0, 10.0]]  # tensor ranks 0-1 and 2-3, stages 0-2 and 1-3
    for (lonely, threads, sums), pair in zip(run_ranks(opened, 4, tmp_path / "ranks"), expected, strict=True):
        assert lonely == threads == 1
        assert sums == [*pair, 15.0, 15.0]
