"""heartbeat.json in the run's folder: what the first rank is doing and since when.

A phase may take hours and write nothing, so a thread writes the file every few seconds. It shows that the process
exists, not that it makes progress: `status` compares the time in a phase with what the phase usually takes.

    {"time": 1764.0, "host": "node7", "pid": 4242, "started": 1700.0, "phase": "generate", "since": 1750.0,
     "ended": null, "engines": [{"name": "vllm server 0", "state": "serving", "requests": 12, "restarts": 0,
     "address": "http://10.0.0.7:30000"}]}
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json, replace_file

if TYPE_CHECKING:
    from megatron_tempo.types import EngineHealth

log = logging.getLogger(__name__)

HEARTBEAT = "heartbeat.json"
BEAT = 15.0  # seconds between two heartbeats
SILENT = 120.0  # seconds without a heartbeat after which a run looks dead; clocks of two machines may differ a little
DONE = "done"


class Heartbeat:
    """Writes the file at each change of phase and every `BEAT` seconds. Warns once if the disk is full.

    `started` and `since` are `time` less seconds of a monotonic clock. So if the system clock is set, all three are
    right again at the next heartbeat.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / HEARTBEAT
        self._engines: Callable[[], list[EngineHealth]] = list
        self._warned = False
        self._started = self._since = time.monotonic()
        self._record: dict[str, Any] = {
            "time": 0.0,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": 0.0,
            "phase": "",
            "since": 0.0,
            "ended": None,
            "engines": [],
        }
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def watch(self, engines: Callable[[], list[EngineHealth]]) -> None:
        """Include these engines. `engines` is called from any thread."""
        self._engines = engines

    def phase(self, name: str) -> None:
        """Set the phase that begins now; empty between phases."""
        self._since = time.monotonic()
        self._write(phase=name)

    def end(self, why: str) -> None:
        """Write the last heartbeat. `why`: `DONE`, or the error that ended the run."""
        if not self._closed.is_set():
            self._closed.set()
            self._thread.join()
            self._engines = list  # their servers are closing or gone
            self._since = time.monotonic()
            self._write(phase="", ended=why)

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self._write()

    def _write(self, **changes: Any) -> None:
        with self._lock:
            now, steady = time.time(), time.monotonic()
            self._record |= changes
            self._record |= {
                "time": now,
                "started": now - (steady - self._started),
                "since": now - (steady - self._since),
                "engines": [asdict(engine) for engine in self._engines()],
            }
            try:
                replace_file(self._path, json.dumps(self._record), fsync=False)
            except OSError as error:
                if not self._warned:
                    log.warning("%s cannot be written (%s): status will show this run as dead", self._path, error)
                self._warned = True


def write_final_heartbeat(folder: Path, why: str, host: str, pid: int) -> None:
    """Write into the last heartbeat why the run has ended, if it is of this process. Any may call it. Raises OSError.

    The heartbeat of an earlier start, or of another job in the same folder, stays as it is.
    """
    record = read_heartbeat(folder)
    if record is not None and (record["host"], record["pid"]) == (host, pid):
        now = time.time()
        record |= {"time": now, "phase": "", "since": now, "ended": why}
        replace_file(folder / HEARTBEAT, json.dumps(record), fsync=False)


def read_heartbeat(folder: Path) -> dict[str, Any] | None:
    """The last heartbeat; None if there is none yet or the file is not a heartbeat."""
    try:
        record = read_json(folder / HEARTBEAT, dict)
    except InputError:
        return None
    return record if all(isinstance(record.get(name), kind) for name, kind in _FIELDS.items()) else None


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "host": str,
    "pid": int,
    "phase": str,
    "engines": list,
    "ended": (str, type(None)),
    **dict.fromkeys(("time", "started", "since"), (int, float)),
}
