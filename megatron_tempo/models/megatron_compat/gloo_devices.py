"""One gloo device for all process groups of a process.

torch 2.13 gives each gloo group its own device, with a thread that wakes up a hundred times per second even if nothing
is sent (gloo's `transport/tcp/loop.cc` polls with a timeout of 10 ms). Megatron-Core opens about twenty groups per
layout, so an idle rank has 2,000 wake-ups per second and uses 3% of a CPU core. A device can serve any number of
groups. So here all groups share the devices of the first one, which torch chooses (by GLOO_SOCKET_IFNAME, if set).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from torch.distributed import Store, distributed_c10d


@contextmanager
def shared_gloo_devices() -> Iterator[None]:
    """Let all gloo groups that are opened in this block use the same devices."""
    usual: Any = distributed_c10d.ProcessGroupGloo
    first: list[Any] = []

    class SharedDevices(usual):
        """A gloo group with torch's arguments and the first group's devices."""

        def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
            if first:
                options = usual._Options()
                options._timeout, options._devices, options._threads = timeout, first[0]._devices, first[0]._threads
                super().__init__(store, rank, size, options)
            else:
                super().__init__(store, rank, size, timeout=timeout)
                first.append(self.options)

    distributed_c10d.ProcessGroupGloo = SharedDevices  # type: ignore[misc]
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = usual  # type: ignore[misc]
