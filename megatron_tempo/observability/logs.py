"""The log of the package: what happens while a command runs, as opposed to the result that it prints.

Every module logs with `logging.getLogger(__name__)`. `configure` is the one place that decides what is shown and where.
To send the log elsewhere too, add a handler to `logging.getLogger(PACKAGE)`; a format may use %(rank)s and %(run)s.

Code that ends the process with os._exit (`runtime.watchdog`, `runtime.stop_request`, `runtime.folder_lock`) writes to
file descriptor 2 instead. The thread that it interrupts may hold the lock of a handler or of a stream for ever.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress

from megatron_tempo.errors import printable
from megatron_tempo.observability.terminal import show

PACKAGE = "megatron_tempo"
ALERT = 35  # level of an alert on the training (`observability.alerts`), between warning and error
logging.addLevelName(ALERT, "ALERT")


def configure(*, rank: int, run: str | None = None, level: int = logging.INFO) -> None:
    """Send the package's log to the console: on rank 0 to standard output, on others to standard error.

    `run`: the run's name, if the command has one. `level`: the least severe messages that rank 0 shows; other ranks
    show warnings and what is worse, because most messages are the same on all ranks. A later call replaces an earlier
    one. The loggers of other packages are left alone.
    """
    logger = logging.getLogger(PACKAGE)
    for earlier in [handler for handler in logger.handlers if isinstance(handler, _Console)]:
        logger.removeHandler(earlier)
    console = _Console(level if rank == 0 else max(level, logging.WARNING))
    console.setFormatter(_Formatter())
    logger.addHandler(console)
    logger.setLevel(min(level, logging.INFO))
    logger.propagate = False  # a library may have given the root logger a handler
    factory = logging.getLogRecordFactory()
    make = factory.make if isinstance(factory, _RunRecords) else factory
    logging.setLogRecordFactory(_RunRecords(make, rank, run))


def rank_of(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank, as its launcher gives it. 0 without one, or if it is not valid, which is reported later."""
    text = environment.get("RANK", "0")
    return int(text) if text.isdecimal() and len(text) < 10 else 0


class _RunRecords:
    """Makes log records with the attributes `rank` and `run`."""

    def __init__(self, make: Callable[..., logging.LogRecord], rank: int, run: str | None) -> None:
        self.make, self._rank, self._run = make, rank, run

    def __call__(self, *args: object, **kwargs: object) -> logging.LogRecord:
        record = self.make(*args, **kwargs)
        record.rank, record.run = self._rank, self._run
        return record


class _Formatter(logging.Formatter):
    """The message, after its level if that is above info, and after rank and run on other ranks than the first."""

    def format(self, record: logging.LogRecord) -> str:
        rank, run = getattr(record, "rank", 0), getattr(record, "run", None)
        level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        speaker = f"rank {rank}{'' if run is None else f' of {run}'}: " if rank else ""
        return printable(level + speaker + super().format(record))  # it may quote a response, a path or a server


class _Console(logging.Handler):
    """Writes each message at once to the streams that sys.stdout and sys.stderr are then."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if getattr(record, "rank", 0) == 0:
            show(text)
        else:
            with suppress(OSError):
                print(text, file=sys.stderr, flush=True)
