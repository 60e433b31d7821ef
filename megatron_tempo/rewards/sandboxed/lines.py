"""Messages between processes: one line of JSON each."""

from __future__ import annotations

import json
import os
import select
import time

TYPE_CHECKING = False  # as in plain.py
if TYPE_CHECKING:
    from typing import Any

CHUNK = 2**16


class Lines:
    """Reads messages from a file descriptor. No line may be longer than `longest` bytes."""

    def __init__(self, place: int, longest: int) -> None:
        self._place = place
        self._longest = longest
        self._read = bytearray()
        self._searched = 0

    def next(self, deadline: float | None = None) -> Any:
        """The next message; None if there is none any more. `deadline`: of `time.monotonic`.

        Raises TimeoutError after it, OverflowError for a line that is too long, ValueError for one that is no JSON.
        """
        while (end := self._read.find(b"\n", self._searched)) < 0:
            self._searched = len(self._read)
            if self._searched > self._longest:
                raise OverflowError("a message is too long")
            if deadline is not None:
                _wait(self._place, select.POLLIN, deadline)
            more = os.read(self._place, CHUNK)
            if not more:
                return None
            self._read += more
        line = bytes(self._read[:end])
        del self._read[: end + 1]
        self._searched = 0
        return json.loads(line)


def send(place: int, message: Any, deadline: float | None = None) -> None:
    """Write a message. It blocks until the other side has read enough of it.

    With a deadline, of `time.monotonic`, `place` must not block; raises TimeoutError after it.
    """
    rest = memoryview(json.dumps(message).encode("ascii") + b"\n")
    while rest:
        if deadline is not None:
            _wait(place, select.POLLOUT, deadline)
        rest = rest[os.write(place, rest) :]


def _wait(place: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(place, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError
