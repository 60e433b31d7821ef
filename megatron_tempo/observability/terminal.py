"""Standard output and error: their width, a closed reader, an encoding that lacks a character."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megatron_tempo.errors import printable

IN_A_FILE = 100  # columns of a run's lines in a log file
GONE = 141  # exit status if nobody reads the output any more: what a shell reports for SIGPIPE
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PLAIN = {"±": "+-", "→": "->", "…": "...", "–": "-", "—": "-", "×": "x", "·": "|", "−": "-"}


def width(without: int = 80) -> int:
    """Columns of the terminal, or of $COLUMNS; `without` if there is neither."""
    return shutil.get_terminal_size((without, 24)).columns


def say(text: str) -> None:
    """Print a line at once. If it cannot be written, because the reader has gone or a disk is full, continue."""
    with suppress(OSError):
        print(text, flush=True)


def show(text: str) -> None:
    """Print text at once, with invisible characters made visible and, on a terminal, wrapped to its width.

    If it cannot be written, continue.
    """
    text = printable(text)
    say(wrapped(text, width()) if sys.stdout.isatty() else text)


def wrapped(text: str, width: int) -> str:
    """The text with its long lines broken between words; paths stay whole."""
    lines = [
        line
        if len(line) <= width
        else textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in text.split("\n")
    ]
    return "\n".join(lines)


@contextmanager
def standard_streams() -> Iterator[None]:
    """Print characters that the streams' encoding lacks as others, and end without a message if the reader has gone.

    `megatron-tempo plan ... | head` then ends with SystemExit(GONE) instead of BrokenPipeError. A command that
    continues without its reader keeps its own exit status.
    """
    codecs.register_error("tempo.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="tempo.plain")
    try:
        yield
    except BrokenPipeError:
        if not _reader_has_gone():
            raise  # of an engine or a worker
        raise SystemExit(GONE) from None
    except OSError as error:
        if error.filename is not None or error.errno not in _FULL:
            raise  # of another kind; a file's has its name
        _discard()
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        if _reader_has_gone():  # else the interpreter reports at its end that it cannot flush
            _discard()


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that nobody reads."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no such stream, a closed one, or one without a file descriptor
        return False


def _discard() -> None:
    """Discard everything that is and will be written to standard output."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_PLAIN.get(character, "?") for character in text), error.end
