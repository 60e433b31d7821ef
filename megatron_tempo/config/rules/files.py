"""What is wrong with a file or a folder that a field names, without an exception for any path."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path


def wrong_with_file(path: Path) -> str | None:
    """Why `path` is no file that can be read; None if it is one. A name that is too long, a loop of links, a folder
    that nobody may enter: each is told as the system tells it."""
    wrong = _wrong(path, stat.S_ISREG, "a file")
    return wrong if wrong is not None or os.access(path, os.R_OK) else "cannot be read: Permission denied"


def wrong_with_folder(path: Path) -> str | None:
    """Why `path` is no folder; None if it is one."""
    wrong = _wrong(path, stat.S_ISDIR, "a folder")
    return wrong if wrong is not None or os.access(path, os.R_OK | os.X_OK) else "cannot be read: Permission denied"


def wrong_with_key(path: Path) -> str | None:
    """Why a file holds no key: a line of visible ASCII, as an HTTP header takes it."""
    if wrong := wrong_with_file(path):
        return wrong
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return "is not one line of ASCII"
    if not key:
        return "is empty"
    return None if key.isprintable() and " " not in key else "is not one line of ASCII without blanks"


def _wrong(path: Path, is_kind: Callable[[int], bool], kind: str) -> str | None:
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        return f"cannot be reached: {getattr(error, 'strerror', None) or error}"
    return None if is_kind(mode) else f"is not {kind}"
