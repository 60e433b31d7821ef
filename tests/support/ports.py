"""Reserves ports, so that nothing else takes a port before the test that chose it listens on it."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from pathlib import Path
from typing import IO

# Below the ports that Linux uses for outgoing connections and for binds to port 0 (32768 and up), and below those that
# rollout servers choose from (20000 and up).
PORTS = range(10000, 16000)
_LOCKS = Path(tempfile.gettempdir()) / "megatron-tempo-test-ports"
_held: list[IO[str]] = []
_next = os.getpid() % len(PORTS)


def reserve_port() -> int:
    """A port on which nothing listens. A locked file reserves it, so no other test gets it while this process lives."""
    global _next
    _LOCKS.mkdir(exist_ok=True)
    for _ in PORTS:
        port, _next = PORTS[_next], (_next + 1) % len(PORTS)
        lock = (_LOCKS / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _held.append(lock)
        return port
    raise OSError(f"no free port in {PORTS}")
