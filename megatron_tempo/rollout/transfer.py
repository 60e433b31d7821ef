"""Tensors from the trainer to an engine's processes: a process group of one sender and the engine's workers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _new_process_group_helper, _world

NAME = "megatron_tempo"


class Sender:
    """Rank 0 of a group whose other ranks are in processes that know nothing of the trainer's groups.

    torch has no public way to make a group apart from the default one; this is what vLLM and SGLang do on their side.
    """

    def __init__(self, host: str, workers: int, backend: str, timeout: timedelta) -> None:
        """Opens the meeting point; `join` then waits for the workers, who are told `port`."""
        self.world = 1 + workers
        self.backend = backend
        self._timeout = timeout
        self._store = dist.TCPStore(host, 0, self.world, is_master=True, timeout=timeout, wait_for_workers=False)
        self.port = self._store.port
        self._group: dist.ProcessGroup | None = None

    def join(self) -> None:
        store = dist.PrefixStore(NAME, self._store)
        self._group, _ = _new_process_group_helper(
            self.world, 0, [], dist.Backend(self.backend), store, group_name=GroupName(NAME), timeout=self._timeout
        )
        _world.pg_group_ranks[self._group] = {rank: rank for rank in range(self.world)}

    def send(self, tensors: Sequence[Tensor]) -> None:
        """All tensors as one, by their bytes: uint8 [sum of sizes]."""
        assert self._group is not None, "join comes first"
        dist.broadcast(joined_bytes(tensors), src=0, group=self._group)


def joined_bytes(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
