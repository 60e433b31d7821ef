"""A cache on disk for verdicts that are expensive to get."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from pathlib import Path

from megatron_tempo.errors import InputError
from megatron_tempo.files import read_bytes

log = logging.getLogger(__name__)


class VerdictCache:
    """Verdicts by key, in JSONL files of a folder, which any number of processes may use at the same time.

    Each process writes its own file, one line at a time, and reads the existing files at its start. Incomplete lines
    are ignored. Verdicts that another process adds later are not seen. Threads may share it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: int | None = None
        self._warned = False
        self._lock = threading.Lock()
        self._verdicts: dict[bytes, bool] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in _lines(path):
                try:
                    record = json.loads(line)
                    self._verdicts[bytes.fromhex(record["key"])] = bool(record["right"])
                except (ValueError, LookupError, TypeError, RecursionError):
                    continue

    def get(self, key: str) -> bool | None:
        """The verdict of a key, which is hexadecimal."""
        return self._verdicts.get(bytes.fromhex(key))

    def put(self, key: str, right: bool) -> None:
        """Store a verdict. If it cannot be written, warn once and keep it only in memory."""
        with self._lock:
            self._verdicts[bytes.fromhex(key)] = right
            try:
                if self._file is None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    path = self._folder / f"{uuid.uuid4().hex}.jsonl"
                    self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
                os.write(self._file, json.dumps({"key": key, "right": right}).encode() + b"\n")
            except OSError as error:
                if not self._warned:
                    log.warning("verdicts cannot be kept in %s (%s): they will be asked for again", self._folder, error)
                self._warned = True

    def close(self) -> None:
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None


def _lines(path: Path) -> list[bytes]:
    """The complete lines of a file of verdicts. If it cannot be read, warn and return none."""
    try:
        return read_bytes(path).split(b"\n")[:-1]
    except InputError as error:
        log.warning("%s: its verdicts will be asked for again", error)
        return []
