"""Writes a checkpoint to the disk while training continues.

A rank's share is copied to host memory first. A thread writes it from there, synchronised with the threads of the other
ranks over a separate process group. Megatron uses a forked process instead. Forking a process with CUDA, gloo threads
and engine sockets is unsafe, and the fork of a killed trainer would continue to write.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import save_config
from torch.distributed.checkpoint.storage import WriteResult

from megatron_tempo.checkpoint import manifest
from megatron_tempo.files import partial_of, publish_folder
from megatron_tempo.models.megatron_compat.checkpoint_writer import WritePlan, plan_writes, write_bucket
from megatron_tempo.runtime import progress_marker
from megatron_tempo.runtime.collective_call import raise_on_all_ranks


@dataclass(slots=True)
class ShardWriter:
    """This rank's share of one model: its files' contents in host memory."""

    plan: WritePlan

    @classmethod
    def of(cls, sharded: dict[str, Any], folder: Path) -> ShardWriter:
        """Copy this rank's share of a sharded state to host memory, to be written to `folder`. Collective."""
        return cls(plan_writes(sharded, folder))

    def write(self) -> list[WriteResult]:
        """Write this rank's files to the disk, and free their contents. Raises OSError."""
        results: list[WriteResult] = []
        while self.plan.files:
            results += write_bucket(self.plan.writer, self.plan.files.pop(0))
            progress_marker.mark()
        return results

    def describe(self, results: list[list[WriteResult]], folder: Path) -> None:
        """Write the metadata of all ranks' files. On the first rank."""
        assert self.plan.metadata is not None
        self.plan.writer.finish(self.plan.metadata, results)
        save_config(self.plan.config, str(folder))


class Saving:
    """A checkpoint that is being written to `PATH.partial`, which is renamed to `path` when it is complete.

    All ranks must create it at the same point. The training thread makes no other collective call for it.
    """

    def __init__(
        self,
        path: Path,
        writers: dict[str, ShardWriter],
        state: dict[str, Any],
        group: dist.ProcessGroup,
        done: Callable[[], None],
    ) -> None:
        """`writers`: by model name. `state`: JSON data. `done`: called on the first rank when it is complete."""
        self.path = path
        self.error: Exception | None = None  # once it has ended: why it is not complete, on any rank
        self._partial = partial_of(path)
        self._writers, self._state, self._group, self._done = writers, state, group, done
        self._is_writer = dist.get_rank() == 0
        self._thread = threading.Thread(target=self._run, name=f"saving {path.name}", daemon=True)
        self._thread.start()

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it has succeeded or failed."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._write()
        except Exception as error:  # noqa: BLE001 - reported to the caller that waits
            self.error = error
            if self._is_writer:
                shutil.rmtree(self._partial, ignore_errors=True)  # frees disk space

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
        """Write Megatron's metadata of the files, and the run's state."""
        if not self._is_writer:
            return
        for name, writer in self._writers.items():
            writer.describe([of_rank[name] for of_rank in results], self._partial / name)
        (self._partial / manifest.STATE).write_text(json.dumps(self._state, indent=1) + "\n")

    def _read_back(self) -> manifest.Digests:
        return manifest.digests(self._partial, manifest.files(self._partial)[dist.get_rank() :: dist.get_world_size()])

    def _finish(self, digests: list[manifest.Digests]) -> None:
        if not self._is_writer:
            return
        manifest.write(self._partial, {name: digest for of_rank in digests for name, digest in of_rank.items()})
        publish_folder(self._partial, self.path)
        self._done()
