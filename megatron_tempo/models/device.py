"""Selects the device of a process. Without CUDA, prepares Megatron-Core to run on the CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.config.choices import Device
from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.megatron_compat.torch_private import use_expandable_segments
from megatron_tempo.nullgpu.guard import refuse_null_gpu

# The values with which cuBLAS gives the same bits in each run ("Results reproducibility" in its documentation).
REPRODUCIBLE_WORKSPACES = (":4096:8", ":16:8")


def select_device(requested: Device, local_rank: int, *, deterministic: bool = True) -> torch.device:
    """Select the device of this process and make it current. On a CPU, install Megatron-Core's CPU backend.

    On CUDA, torch's allocator gets expandable segments, before it allocates anything: models that take turns on the
    device (models/offload.py), and micro-batches of many shapes, leave gaps in segments of fixed size.

    `deterministic`: `run.deterministic`, for `set_cuda_numerics`. Raises InputError if `requested` is cuda and there is
    no CUDA device, if `requested` is cpu and there is one (Megatron would use it anyway), or if the device is the null
    GPU and this is no rehearsal.
    """
    refuse_null_gpu(f"run.device={requested.value}")
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
        set_cuda_numerics(deterministic=deterministic)  # before the first call that starts CUDA's libraries
        use_expandable_segments()
        # Where a launcher shows each process one GPU, its own, that GPU is number 0 in every process.
        device = torch.device("cuda", local_rank % count)
        torch.cuda.set_device(device)
        return device
    install_cpu_backend()
    return torch.device("cpu")


def set_cuda_numerics(*, deterministic: bool) -> None:
    """Set how CUDA's libraries compute in this process. Call it before they start, because they read their
    environment once.

    - `deterministic`: cuBLAS gets a workspace with which a product gives the same bits in each run. Raises InputError
      if CUBLAS_WORKSPACE_CONFIG has another one.
    - fp32 is fp32, not TF32 with its 10-bit mantissa. NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which
      torch reads when it is imported. It would round the products of the value head, and of every layer in fp32.
    - torch's attention does not use cuDNN, so it uses flash in bf16. torch 2.13 prefers cuDNN on Hopper, which builds a
      plan for each new shape, and nearly every micro-batch has a new shape. The switch holds for the whole process: the
      trainer's attention, its backward pass and the embedded engine.
    """
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    if deterministic and workspace is None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = REPRODUCIBLE_WORKSPACES[0]
    elif deterministic and workspace not in REPRODUCIBLE_WORKSPACES:
        raise InputError(
            f"CUBLAS_WORKSPACE_CONFIG={workspace} in the environment: cuBLAS may then give other bits in each run, and "
            f"run.deterministic=true forbids it. Unset it, set it to {' or '.join(REPRODUCIBLE_WORKSPACES)}, or set "
            f"run.deterministic=false"
        )
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"  # cuBLAS heeds it above all else
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)


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
