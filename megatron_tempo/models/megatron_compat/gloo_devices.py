"""One gloo device for all process groups of a process.

torch 2.13 gives each gloo group a device of its own, with a thread that wakes a hundred times a second whether or not
anything is sent (gloo's `transport/tcp/loop.cc` polls with a timeout of 10 ms). Megatron-Core opens about twenty groups
for a layout: an idle rank then has 2,000 wake-ups a second and uses 3% of a CPU core. A device can serve any number of
groups, so here the groups share those of the first one, which torch chooses (GLOO_SOCKET_IFNAME included).
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
        """What torch makes of a gloo group's arguments, with the first group's devices."""

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
