"""Verdicts that cost something to come by, kept on disk."""

from __future__ import annotations

import json
import logging
import os
import threading
import uuid
from pathlib import Path

from megatron_tempo.errors import InputError
from megatron_tempo.input_files import read_bytes

log = logging.getLogger(__name__)


class VerdictCache:
    """Verdicts by key, in JSONL files of a folder, which any number of processes may use at the same time.

    Each process writes a file of its own, a line at once, and has read those that were there when it began; a line that
    was cut short counts as absent. What another process finds meanwhile is not seen. Threads may share it.
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
        """The verdict under a key, in hexadecimal."""
        return self._verdicts.get(bytes.fromhex(key))

    def put(self, key: str, right: bool) -> None:
        """Keep a verdict. Where it cannot be written, which is warned of once, only as long as this process lives."""
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
    """The whole lines of a file of verdicts; of one that cannot be read none, which is warned of."""
    try:
        return read_bytes(path).split(b"\n")[:-1]
    except InputError as error:
        log.warning("%s: its verdicts will be asked for again", error)
        return []
