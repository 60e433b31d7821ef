"""Selects the device of a process. Without CUDA, prepares Megatron-Core to run on the CPU."""

from __future__ import annotations

import torch

from megatron_tempo.config.choices import Device
from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.nullgpu.guard import refuse_null_gpu


def select_device(requested: Device, local_rank: int) -> torch.device:
    """Select the device of this process and make it current. On a CPU, install Megatron-Core's CPU backend.

    Raises InputError if `requested` is cuda and there is no CUDA device, if `requested` is cpu and there is one
    (Megatron would use it anyway), or if the device is the null GPU and this is no rehearsal.
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
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    install_cpu_backend()
    return torch.device("cpu")
