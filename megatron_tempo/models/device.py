"""Selects the device of a process. Without CUDA, prepares Megatron-Core to run on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.config.choices import Device
from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend


def select_device(requested: Device, local_rank: int) -> torch.device:
    """Select the device of this process and make it current. On a CPU, install Megatron-Core's CPU backend.

    Raises InputError if `requested` is cuda and there is no CUDA device, or if `requested` is cpu and there is one
    (Megatron would use it anyway).
    """
    if requested is Device.cuda and not torch.cuda.is_available():
        raise InputError("run.device=cuda: torch finds no CUDA device. Check the driver, or set run.device=cpu")
    if torch.cuda.is_available():
        if requested is Device.cpu:
            raise InputError(
                "run.device=cpu: this machine has CUDA devices, and Megatron-Core would use them. Set run.device=cuda, "
                "or hide them with CUDA_VISIBLE_DEVICES=''"
            )
        count = torch.cuda.device_count()
        if local_rank >= count > 1:
            raise InputError(
                f"process {local_rank} of this machine finds {count} CUDA devices: launch no more processes than "
                f"devices, or hide them with CUDA_VISIBLE_DEVICES='' to run on the CPU"
            )
        # Where a launcher shows each process one GPU, its own, that GPU is number 0 in every process.
        device = torch.device("cuda", local_rank % count)
        torch.cuda.set_device(device)
        return device
    install_cpu_backend()
    return torch.device("cpu")


def refuse_shared_gpus(device: torch.device, local_rank: int) -> None:
    """Raise InputError, on every rank, if several ranks of a machine have one GPU. Collective.

    A process that sees one GPU cannot tell whether the others of its machine see the same one.
    """
    if device.type != "cuda":
        return
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, (str(torch.cuda.get_device_properties(device).uuid), local_rank))
    if problem := shared_gpu(places):
        raise InputError(problem)


def shared_gpu(places: Sequence[tuple[str, int]]) -> str | None:
    """What is wrong if several processes have one GPU. `places`: each rank's GPU, and its number on its machine."""
    processes: dict[str, set[int]] = {}
    for gpu, local_rank in places:
        processes.setdefault(gpu, set()).add(local_rank)
    for gpu, numbers in processes.items():
        if len(numbers) > 1:
            return (
                f"processes {', '.join(map(str, sorted(numbers)))} of a machine have one GPU, {gpu}, and NCCL needs "
                f"one for each: launch one process for each GPU, or let the launcher show each process its own GPU"
            )
    return None
