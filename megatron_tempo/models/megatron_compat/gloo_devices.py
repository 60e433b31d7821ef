"""One gloo device for all process groups of a process, and one worker thread for each.

torch 2.13 gives each gloo group its own device, with a thread that wakes up a hundred times per second even if nothing
is sent (gloo's `transport/tcp/loop.cc` polls with a timeout of 10 ms). Megatron-Core opens about twenty groups per
layout, so an idle rank has 2,000 wake-ups per second and uses 3% of a CPU core. A device can serve any number of
groups. So here all groups share the devices that torch chooses for the first one (by GLOO_SOCKET_IFNAME, if set).

torch 2.13 gives each group two workers for each device. After a collective, a worker writes its name to a string that
both share, without a lock (csrc/distributed/c10d/ProcessGroupGloo.cpp, `runLoop`: `pgStatus_->lastCompletedWorkName`).
A name of more than 15 letters is in memory of its own: that of Megatron-Core's gathers of weights is,
ALLGATHER_COALESCED. If two workers write at the same time, they free the same memory twice. Then two objects get it,
and overwrite each other: the process ends ("malloc(): unaligned tcache chunk detected"), or computes wrong numbers. A
single worker has nobody to race with. It takes a group's collectives in the order in which they were called, which is
the same on all ranks, so none waits for a later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import HashStore, Store, distributed_c10d

_WORKERS = 1


@contextmanager
def shared_gloo_devices() -> Iterator[None]:
    """Let all gloo groups that are opened in this block use the same devices, and one worker each."""
    usual: Any = distributed_c10d.ProcessGroupGloo
    devices: list[Any] = []

    class SharedDevices(usual):
        """A gloo group with torch's arguments and the first group's devices."""

        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
            if not devices:  # torch chooses devices only for a group that gets no options: one of this process alone
                devices.extend(usual(HashStore(), 0, 1, timeout=timeout).options._devices)
            options = usual._Options()
            options._timeout, options._devices, options._threads = timeout, devices, _WORKERS
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = SharedDevices  # type: ignore[misc]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = usual  # type: ignore[misc]
