"""Reads files that a user gives or that may have changed since they were written: JSON, text, or an InputError.

A folder, a named pipe or a device instead of a file is rejected without being opened: a pipe would block the program.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, TypeVar

from megatron_tempo.errors import InputError

_T = TypeVar("_T")
_KINDS = {
    stat.S_IFDIR: "is a folder, not a file",
    stat.S_IFIFO: "is a named pipe, not a file",
    stat.S_IFSOCK: "is a socket, not a file",
    stat.S_IFCHR: "is a device, not a file",
    stat.S_IFBLK: "is a device, not a file",
}
_AGAIN = "write it again, or bring back a whole copy"


def unreadable(path: Path) -> str | None:
    """Why `path` cannot be read as a file, as the end of a sentence about it; None if it can. Reads no data."""
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
        if kind != stat.S_IFREG:
            return _KINDS.get(kind, "is not a file")
        os.close(os.open(path, os.O_RDONLY))
    except FileNotFoundError:
        return "does not exist" if not path.is_symlink() else "is a link to a file that does not exist"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except ValueError as error:  # a null character in the name
        return f"is no name of a file: {error}"
    return None


def readable(path: Path) -> Path:
    """`path`, if it is a file that can be opened. Raises InputError otherwise."""
    if (reason := unreadable(path)) is not None:
        raise InputError(f"{path} {reason}")
    return path


def read_bytes(path: Path) -> bytes:
    """The bytes of a file. Raises InputError if it cannot be read."""
    try:
        return readable(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises InputError if it cannot be read."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start + 1} is no UTF-8; {_AGAIN}") from error


def read_json(path: Path, kind: type[_T]) -> _T:
    """The value in a JSON file, of `kind` (dict, list or str). Raises InputError if it cannot be read as such."""
    text = read_text(path)
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        what = "ends too early" if not text[error.pos :].strip() else f"is not JSON ({error.msg})"
        raise InputError(f"{path} {what}, at line {error.lineno}, column {error.colno}; {_AGAIN}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits; nesting too deep
        raise InputError(f"{path} is not JSON that can be read ({error}); {_AGAIN}") from error
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a JSON {json_type(value)}, not {_ARTICLES[kind]}; {_AGAIN}")
    return value


_ARTICLES: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}


def json_type(value: object) -> str:
    """JSON's name for the type of a value."""
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "array"
    if isinstance(value, str):
        return "string"
    return "null" if value is None else "boolean" if isinstance(value, bool) else "number"
