"""Private names of torch: process groups and their counters, checkpoint records, GPU memory.

This file imports torch only, so that the rollout engines can use it without Megatron-Core.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.distributed_c10d import GroupName, _abort_process_group, _new_process_group_helper, _world

# Where a user gives the allocator's settings. torch reads them when CUDA starts.
_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


def hide_missing_cuda() -> None:
    """Keep torch from telling each command that a machine with CUDA's compiler has no GPU. Call it before the import of
    Megatron-Core, which 0.19.2 imports torch.utils.cpp_extension with. A second call does nothing.

    torch 2.10 to 2.13 (utils/cpp_extension.py, `_find_cuda_home`): a build for CUDA, on a CPU.
    """
    logging.getLogger("torch.utils.cpp_extension").addFilter(_is_of_another_matter)


def _is_of_another_matter(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("No CUDA runtime is found")


def join_separate_group(
    store: dist.Store, name: str, rank: int, world: int, backend: str, timeout: timedelta
) -> dist.ProcessGroup:
    """Join a process group whose members need not be in the default group.

    torch 2.10 to 2.13 (distributed/distributed_c10d.py, `_new_process_group_helper`). `dist.new_group` makes groups of
    ranks in the default group only, and an engine's workers are not in the trainer's. vLLM and SGLang do the same on
    their side. Without the entry in `_world.pg_group_ranks`, `dist.broadcast` refuses the group.
    """
    group, _ = _new_process_group_helper(
        world, rank, [], dist.Backend(backend), store, group_name=GroupName(name), timeout=timeout
    )
    _world.pg_group_ranks[group] = {member: member for member in range(world)}
    return group


def begun_collectives() -> dict[str, int]:
    """How many collectives this process has begun in each of its process groups, by a name that its members share.

    torch 2.10 to 2.13 (distributed/distributed_c10d.py, `_World`; csrc/distributed/c10d, `getSequenceNumberForGroup`).
    No public function tells it. Without it, a hang under NCCL cannot be told from waiting: all ranks stand at the line
    where they next need a number from the GPU. NCCL does not count messages from one rank to another. gloo does, so its
    groups are left out, except the default one, in which no such messages are sent. So are groups of
    `join_separate_group`: torch names its own ones by numbers. May be called from any thread.
    """
    default = _world.default_pg
    counts = {}
    for group, name in list(_world.pg_names.items()):
        for device in group._device_types if name.isdecimal() else ():
            with suppress(RuntimeError):  # of a group that another thread closes
                backend: Any = group._get_backend(device)  # torch's stubs lack the method
                if group is default or backend.name() != "gloo":
                    counts[f"{name} {device.type}"] = backend._get_sequence_number_for_group()
    return counts


def abort_separate_group(group: dist.ProcessGroup) -> None:
    """Leave a group of `join_separate_group`, whatever it still does.

    torch 2.10 to 2.13 (distributed/distributed_c10d.py, `_abort_process_group`). `dist.destroy_process_group` waits
    under NCCL for what has been launched, for ever if a member is lost. And torch's NCCL watchdog ends the process if a
    collective exceeds the group's timeout.
    """
    _abort_process_group(group)


def write_result(index: MetadataIndex, file: str, offset: int, length: int) -> WriteResult:
    """The record that `FileSystemWriter.finish` needs of a chunk that other code wrote.

    torch 2.10 to 2.13 (distributed/checkpoint/filesystem.py, `_StorageInfo`): .metadata pickles these records with
    their class. Without them, a `FileSystemReader` cannot find the chunks of a checkpoint.
    """
    return WriteResult(index, length, _StorageInfo(file, offset, length))


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], *, non_blocking: bool) -> None:
    """Copy each source to its target, in one call.

    torch 2.10 to 2.13 (native_functions.yaml, `_foreach_copy_`). A checkpoint copies thousands of tensors; a call for
    each costs some microseconds of Python.
    """
    torch._foreach_copy_(list(targets), list(sources), non_blocking)


def share_cuda_storage(storage: torch.UntypedStorage) -> Sequence[Any]:
    """A CUDA handle for one reader in another process: the arguments of `UntypedStorage._new_shared_cuda`.

    torch 2.10 to 2.13 (multiprocessing/reductions.py, `reduce_storage`). Each call counts one more reader. The only
    public way to get a handle is to pickle the tensor for a process that torch's multiprocessing started.
    """
    handle: Sequence[Any] = storage._share_cuda_()
    return handle


def use_expandable_segments(environment: Mapping[str, str] = os.environ) -> None:
    """Let torch's allocator grow its segments of GPU memory, unless the user's environment has settings of its own.

    torch 2.10 to 2.13 (torch/csrc/DeviceAccelerator.cpp, `_accelerator_setAllocatorSettings`). The public way is an
    environment variable, which servers that this process starts would inherit. vLLM opens torch's memory from its other
    workers by CUDA handles, which expandable segments do not have.
    """
    if not any(environment.get(name) for name in _ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


@contextmanager
def shareable_memory(environment: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Inside the block, other processes can open GPU memory that is allocated: it is in segments of fixed size.

    torch 2.10 to 2.13 (c10/cuda/CUDACachingAllocator.cpp): while the setting is off, the allocator uses no block of an
    expandable segment. A user's own settings stay as they are.
    """
    if any(environment.get(name) for name in _ALLOCATOR_VARIABLES):
        yield
        return
    torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
    try:
        yield
    finally:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
