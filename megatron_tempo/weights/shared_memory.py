"""Memory that processes on one machine share: on a CPU through a file in /dev/shm, on a GPU through a CUDA handle.

torch's manager process, `torch_shm_manager`, removes the file when the last process has closed it or is dead.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.torch_private import shareable_memory
from megatron_tempo.types import Bucket


def flat_buffer(size: int, dtype: torch.dtype, device: torch.device, *, shared: bool) -> torch.Tensor:
    """A tensor of `size` elements. `shared`: if it is on a GPU, other processes can open it by a CUDA handle."""
    with shareable_memory() if shared and device.type == "cuda" else nullcontext():
        return torch.empty(size, dtype=dtype, device=device)


def shared_buffers(count: int, nbytes: int, group: dist.ProcessGroup, groups: int = 1) -> list[torch.UntypedStorage]:
    """`count` buffers of `nbytes`, the same memory on every rank of the group. Collective; the first rank creates them.

    `groups`: how many groups of this machine do so at the same time. Raises InputError on every rank if /dev/shm has
    too little free space for all of them.
    """
    first = dist.get_rank(group) == 0
    problem = _too_little_space(count * groups, nbytes) if first else None
    buffers = [torch.UntypedStorage._new_using_filename_cpu(nbytes) for _ in range(count) if first and not problem]
    message: list[Any] = [problem, [buffer._share_filename_cpu_() for buffer in buffers]]
    dist.broadcast_object_list(message, group=group, group_src=0)
    problem, handles = message
    if problem:
        raise InputError(problem)
    return buffers or [torch.UntypedStorage._new_shared_filename_cpu(*handle) for handle in handles]


def _too_little_space(count: int, nbytes: int) -> str | None:
    status = os.statvfs("/dev/shm")
    free, needed = status.f_bavail * status.f_frsize, count * nbytes
    if free >= needed:
        return None
    return (
        f"/dev/shm has {free / 2**20:.1f} MB free, and {count} buckets of weights need {needed / 2**20:.1f} MB: "
        "enlarge it (docker run --shm-size), reduce parallel.bucket_mb, or set rollout.servers.transport=group"
    )


def in_shared_memory(bucket: Bucket) -> Bucket:
    """Copy the tensors of a bucket, all of one type, into a shared buffer of their own."""
    first = bucket[0][1]
    size = sum(tensor.numel() for _, tensor in bucket)
    storage = torch.UntypedStorage._new_using_filename_cpu(size * first.itemsize)
    parts = (
        torch.empty(0, dtype=first.dtype)
        .set_(storage, 0, (size,), (1,))
        .split([tensor.numel() for _, tensor in bucket])
    )
    return [(name, part.view(tensor.shape).copy_(tensor)) for part, (name, tensor) in zip(parts, bucket, strict=True)]
