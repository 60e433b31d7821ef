"""The device of a process. On a machine without CUDA, Megatron-Core is prepared to run on the CPU."""

from __future__ import annotations

import torch

from megatron_tempo.config.choices import Device
from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend


def select_device(wanted: Device, local_rank: int) -> torch.device:
    """The device of this process, made current; on a CPU, Megatron-Core is prepared for it.

    Raises InputError if `wanted` is cuda and there is none, or cpu where there is one (Megatron would use it anyway).
    """
    if wanted is Device.cuda and not torch.cuda.is_available():
        raise InputError("run.device=cuda, but torch finds no CUDA device: set run.device=cpu, or check the driver")
    if torch.cuda.is_available():
        if wanted is Device.cpu:
            raise InputError("run.device=cpu on a machine with CUDA: set run.device=cuda, or CUDA_VISIBLE_DEVICES=''")
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
