"""A checkpoint on its way to the disk, while training goes on.

What a rank has to write is copied to host memory first; from there a thread writes it, in step with the threads of the
other ranks, over a process group of their own. A thread rather than a forked process, as Megatron has it: to fork what
holds CUDA, threads of gloo and sockets of an engine is not safe, and the fork of a killed trainer would go on writing.
"""

from __future__ import annotations

import inspect
import json
import os
import queue
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.storage import WriteResult

from megatron_tempo.checkpoint import manifest
from megatron_tempo.runtime import progress_marker
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.weights.files import sync, sync_folder

# Without Megatron's decorator, which turns off the collection of garbage while it writes: in its forked process that is
# right, here it would be the trainer's.
_write_file = inspect.unwrap(FileSystemWriterAsync.write_preloaded_data)


class _Planning(TorchDistSaveShardedStrategy):
    """Megatron's way to save, as far as the plan of who writes what: `writer` and, on the first rank, `metadata`."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret: Any) -> AsyncRequest:
        self.writer, self.metadata = writer, save_state_dict_ret[1]
        return AsyncRequest(None, (), [])


@dataclass(slots=True)
class ShardWriter:
    """What this rank writes of one model: its files' contents in host memory."""

    writer: FileSystemWriterAsync
    metadata: Metadata | None
    config: CheckpointingConfig
    files: list[Any]  # Megatron's write buckets

    @classmethod
    def of(cls, sharded: dict[str, Any], folder: Path) -> ShardWriter:
        """Copy this rank's share of a sharded state to host memory, to be written to `folder`. Collective."""
        # Megatron's writer would start a process for the results, which outlives a trainer that is killed.
        filesystem_async._results_queue = queue.SimpleQueue()
        planning = _Planning()
        dist_checkpointing.save(sharded, str(folder), sharded_strategy=planning, async_sharded_save=True)
        files = [
            # `copy`: on a CPU the tensors are those that are trained on.
            (path, key, (data, [(item, tensor.to("cpu", copy=True)) for item, tensor in tensors]))
            for path, key, (data, tensors) in planning.writer.write_buckets or []
        ]
        planning.writer.write_buckets = None  # holds the tensors on the device
        return cls(planning.writer, planning.metadata, CheckpointingConfig(planning.backend, planning.version), files)

    def write(self) -> list[WriteResult]:
        """Write this rank's files to the disk, and let go of their contents. Raises OSError."""
        transforms = [self.writer.transforms] if hasattr(self.writer, "transforms") else []
        results: list[WriteResult] = []
        while self.files:
            answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
            running: queue.Queue[int] = queue.Queue()
            running.put(0)
            path, *content = self.files.pop(0)
            _write_file(transforms, 0, (path, *content), answers, running, use_fsync=True)
            outcome = answers.get()[1]
            if isinstance(outcome, Exception):
                # torch's writer trips over what an OSError has left of its file, and raises that.
                cause = outcome.__context__ if isinstance(outcome.__context__, OSError) else outcome
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, cause.strerror, str(path)) from outcome
                raise outcome
            results += outcome
            progress_marker.mark()
        return results


class Saving:
    """A checkpoint that is being written to `PATH.partial`, and is `path` when it is whole.

    All ranks begin one at the same point; nothing else of it is collective for the thread that trains.
    """

    def __init__(
        self,
        path: Path,
        writers: dict[str, ShardWriter],
        state: dict[str, Any],
        group: dist.ProcessGroup,
        done: Callable[[], None],
    ) -> None:
        """`writers` by the model's name; `state` is JSON-able; `done` is called on the first rank when it is whole."""
        self.path = path
        self.error: Exception | None = None  # once it has ended: why it is not whole, on any rank
        self._partial = partial_of(path)
        self._writers, self._state, self._group, self._done = writers, state, group, done
        self._is_writer = dist.get_rank() == 0
        self._thread = threading.Thread(target=self._run, name=f"saving {path.name}", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Until it has ended, one way or the other."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # noqa: BLE001 - for whoever waits
            self.error = error
            if self._is_writer:
                shutil.rmtree(self._partial, ignore_errors=True)  # makes room again

    def _write(self) -> None:
        results = raise_on_all_ranks(self._write_files, self._group)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(results, gathered if self._is_writer else None, group=self._group)
        raise_on_all_ranks(lambda: self._describe(gathered), self._group)
        digests: list[manifest.Digests] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(digests, raise_on_all_ranks(self._read_back, self._group), group=self._group)
        raise_on_all_ranks(lambda: self._finish(digests), self._group)

    def _write_files(self) -> dict[str, list[WriteResult]]:
        return {name: writer.write() for name, writer in self._writers.items()}

    def _describe(self, results: list[dict[str, list[WriteResult]]]) -> None:
        """What Megatron wants to know of the files, and the run's state."""
        if not self._is_writer:
            return
        for name, writer in self._writers.items():
            assert writer.metadata is not None
            writer.writer.finish(writer.metadata, [of_rank[name] for of_rank in results])
            save_config(writer.config, str(self._partial / name))
        (self._partial / manifest.STATE).write_text(json.dumps(self._state, indent=1) + "\n")

    def _read_back(self) -> manifest.Digests:
        return manifest.digests(self._partial, manifest.files(self._partial)[dist.get_rank() :: dist.get_world_size()])

    def _finish(self, digests: list[manifest.Digests]) -> None:
        if not self._is_writer:
            return
        manifest.write(self._partial, {name: digest for of_rank in digests for name, digest in of_rank.items()})
        sync(self._partial)
        os.replace(self._partial, self.path)
        sync_folder(self.path.parent)
        self._done()


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
