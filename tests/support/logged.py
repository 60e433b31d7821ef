"""What the package logs while a test runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tempo.observability.logs import PACKAGE


class _Collector(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


@contextmanager
def logged(level: int = logging.INFO, messages: list[str] | None = None) -> Iterator[list[str]]:
    """The messages of at least `level` that are logged inside, in any thread, without level and rank.

    `messages`: a list to add them to.
    """
    messages = [] if messages is None else messages
    logger, collector = logging.getLogger(PACKAGE), _Collector(messages)
    collector.setLevel(level)
    before = logger.level
    logger.setLevel(level)
    logger.addHandler(collector)
    try:
        yield messages
    finally:
        logger.removeHandler(collector)
        logger.setLevel(before)
