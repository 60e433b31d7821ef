"""Megatron-Core's checkpoint writer, run in this process instead of in processes that it forks."""

from __future__ import annotations

import inspect
import queue
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

# Megatron-Core 0.16.1 (dist_checkpointing/strategies/filesystem_async.py, `write_preloaded_data`) decorates this with
# `_disable_gc`, which turns off garbage collection while it writes. That is right in Megatron's forked process. In a
# thread of the trainer it would turn off the trainer's.
_write_preloaded_data = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)


@dataclass(frozen=True, slots=True)
class WritePlan:
    """What this rank writes of a sharded state, and what the first rank writes of all."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None  # on the first rank
    config: CheckpointingConfig
    files: list[Any]  # Megatron's write buckets: (path, key, (bytes, [(item, tensor)]))


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's save strategy, stopped after it has planned which rank writes what.

    Megatron-Core 0.16.1 (dist_checkpointing/strategies/torch.py, `_get_save_and_finalize_callbacks`). The public
    `async_save` returns a request that forks a process to write. It is not safe to fork a process with CUDA, gloo
    threads and sockets of an engine. And the fork of a killed trainer would continue to write.
    """

    writer: FileSystemWriterAsync
    metadata: Metadata | None

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


def plan_writes(sharded: dict[str, Any], folder: Path) -> WritePlan:
    """Plan who writes what of a sharded state to `folder`, and copy this rank's part to host memory. Collective.

    Megatron-Core 0.16.1 (dist_checkpointing/strategies/filesystem_async.py, `_get_write_results_queue`): the first
    writer starts a manager process for its results, which outlives a killed trainer. A plain queue replaces it here.
    """
    filesystem_async._results_queue = queue.SimpleQueue()
    planning = _PlanOnly()
    dist_checkpointing.save(sharded, str(folder), sharded_strategy=planning, async_sharded_save=True)
    files = [
        # `copy`: on a CPU, training would otherwise change these tensors while they are written.
        (path, key, (data, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]))
        for path, key, (data, tensors) in planning.writer.write_buckets or []
    ]
    planning.writer.write_buckets = None  # holds the tensors on the device
    return WritePlan(planning.writer, planning.metadata, CheckpointingConfig(planning.backend, planning.version), files)


def write_bucket(writer: FileSystemWriterAsync, bucket: Any) -> list[WriteResult]:
    """Write one of the plan's files in this thread, and sync it. Raises OSError that names the file.

    Megatron-Core 0.16.1 passes results through queues, and an exception as a result
    (dist_checkpointing/strategies/filesystem_async.py, `write_preloaded_data`).
    """
    transforms = [writer.transforms] if hasattr(writer, "transforms") else []
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    running: queue.Queue[int] = queue.Queue()
    running.put(0)
    _write_preloaded_data(transforms, 0, bucket, results, running, use_fsync=True)
    outcome = results.get()[1]
    if isinstance(outcome, Exception):
        # After an OSError, torch's writer raises another error about the incomplete file. The cause is the OSError.
        cause = outcome.__context__ if isinstance(outcome.__context__, OSError) else outcome
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(bucket[0])) from outcome
        raise outcome
    written: list[WriteResult] = outcome
    return written
