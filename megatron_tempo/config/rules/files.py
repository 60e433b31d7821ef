"""Checks of a folder or a key file that a field names. They raise no exception for any path."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megatron_tempo.files import why_unreadable


def wrong_with_folder(path: Path) -> str | None:
    """Why `path` is not a folder; None if it is one."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return "does not exist"
    except (OSError, ValueError) as error:  # too long a name, a loop of links; ValueError: a NUL in the path
        return f"cannot be reached: {getattr(error, 'strerror', None) or error}"
    if not is_folder:
        return "is not a folder"
    return None if os.access(path, os.R_OK | os.X_OK) else "cannot be read: Permission denied"


def wrong_with_key(path: Path) -> str | None:
    """Why a file has no key; None if it has one. A key is a line of visible ASCII, as an HTTP header requires."""
    if wrong := why_unreadable(path):
        return wrong
    try:
        key = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return "is not one line of ASCII"
    if not key:
        return "is empty"
    return None if key.isprintable() and " " not in key else "is not one line of ASCII without blanks"
