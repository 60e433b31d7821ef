"""Selects the device of a process. Without CUDA, prepares Megatron-Core to run on the CPU."""

from __future__ import annotations

import os

import torch

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
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"process {local_rank} of this machine finds {torch.cuda.device_count()} CUDA devices: launch no more "
                f"processes than devices, or hide them with CUDA_VISIBLE_DEVICES='' to run on the CPU"
            )
        set_cuda_numerics(deterministic=deterministic)  # before the first call that starts CUDA's libraries
        use_expandable_segments()
        device = torch.device("cuda", local_rank)
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
