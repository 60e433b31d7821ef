"""Reads and writes files.

Reading: files that a user gives, or that may have changed since they were written. JSON, text, or an InputError. A
folder, a named pipe or a device instead of a file is rejected without being opened: a pipe would block the program.

Writing: a file or folder gets its name when it is complete (`atomic_write`, `atomic_folder`).

    .NAME.RANDOM.tmp    a file or folder NAME that is being written, in the same folder
    NAME.partial        a folder NAME that several ranks write, or that the next start continues
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

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
_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{8}\.tmp", re.DOTALL)
_ABANDONED_SECONDS = 86400.0  # since the last write to a temporary file; clocks of a file server may differ a little


# Reading


def why_unreadable(path: Path) -> str | None:
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
    if (reason := why_unreadable(path)) is not None:
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


def repeated_name(pairs: Sequence[tuple[str, object]]) -> str | None:
    """The first name that a JSON object has twice; None if there is none. For `object_pairs_hook`."""
    names = [name for name, _ in pairs]
    if len(set(names)) == len(names):
        return None
    return next(name for name in names if names.count(name) > 1)


def json_type(value: object) -> str:
    """JSON's name for the type of a value."""
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        return "array"
    if isinstance(value, str):
        return "string"
    return "null" if value is None else "boolean" if isinstance(value, bool) else "number"


# Writing


@contextmanager
def atomic_write(path: Path, *, fsync: bool) -> Iterator[BinaryIO]:
    """Open a file to write. It gets its name, and replaces an existing file, if the block ends without an error.

    See `atomic_paths` for the details.
    """
    with atomic_paths([path], fsync=fsync) as (temporary,), temporary.open("wb") as file:
        yield file


def replace_file(path: Path, content: str | bytes, *, fsync: bool) -> None:
    """Write a whole file as `atomic_write` does. Text is encoded as UTF-8."""
    with atomic_write(path, fsync=fsync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_paths(paths: Sequence[Path], *, fsync: bool) -> Iterator[list[Path]]:
    """Yield the names of empty files to write to, which become `paths` if the block ends without an error.

    After an error, or if the process is killed, earlier files at `paths` are as they were. No file is renamed before
    all are complete. A temporary file is removed after an error. One that a killed process left behind is hidden, is
    not read, and is removed by the first write to its path that comes a day later. Several processes may write to
    one path at once: each has its own temporary file, and the last to finish wins.

    A file keeps the permissions of the one that it replaces; a new one has those of the umask. If a path is a symbolic
    link, the link is replaced, and the file that it leads to stays as it is.

    `fsync`: Wait until contents and names are on the disk. For what a crash of the machine must not lose or leave
    empty: state, checkpoints and results. Not for what is written again every few seconds.

    Raises OSError if a file cannot be written. It names one of `paths`, not a temporary file.
    """
    temporaries: dict[Path, Path] = {}
    try:
        for path in paths:
            temporary = _temporary(path)
            # Until it has the permissions of the file that it replaces, only its owner may read it.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL, 0o666 if _mode(path) is None else 0o600))
            temporaries[path] = temporary
        yield list(temporaries.values())
        for path, temporary in temporaries.items():
            if fsync:
                _sync_file(temporary)
            if (mode := _mode(path)) is not None:
                temporary.chmod(mode)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
        if fsync:
            for folder in {path.parent for path in paths}:
                sync_folder(folder)
    except OSError as error:
        _name_path(error, paths)
        raise
    finally:
        for temporary in temporaries.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A new name next to `path`. Removes what killed processes have left behind at such names."""
    with suppress(OSError):
        for abandoned in temporaries_in(path.parent):
            if _named_by(abandoned) == path.name and time.time() - abandoned.lstat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(abandoned) if abandoned.is_dir() else abandoned.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def temporaries_in(folder: Path) -> list[Path]:
    """The temporary files in a folder: those that are being written, and those that killed processes left behind."""
    return [path for path in folder.iterdir() if _named_by(path) is not None]


def _named_by(temporary: str | Path) -> str | None:
    """The name that a temporary file becomes; None if the file is not one of `atomic_paths`."""
    match = _TEMPORARY.fullmatch(os.path.basename(temporary))
    return None if match is None else match[1]


def _mode(path: Path) -> int | None:
    """The permissions of a regular file; None if there is none at `path`."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return None
    return stat.S_IMODE(mode) if stat.S_ISREG(mode) else None


def _name_path(error: OSError, paths: Sequence[Path]) -> None:
    """Replace the name of a temporary file in an error by the name that the caller knows."""
    for path in paths:
        if isinstance(error.filename, str | Path) and _named_by(error.filename) == path.name:
            error.filename = str(path)
            del error.filename2  # of a rename; None would be shown


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the block, which writes `path`, name the file.

    A write to an open file does not name it. And after one that failed, torch's writer raises another error, about the
    incomplete file.
    """
    try:
        yield
    except Exception as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, cause.filename or str(path)) from error


def partial_of(folder: Path) -> Path:
    """Where a folder is written until it is complete. Several ranks, or the next start, must find it by its name."""
    return folder.with_name(folder.name + ".partial")


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder to write to, which becomes `folder` if the block ends without an error.

    It is synced to the disk, and removed after an error. Several processes may write to one path at once. Raises
    FileExistsError for all but the first to finish.
    """
    temporary = _temporary(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if folder.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))
        publish_folder(temporary, folder)
    except OSError as error:
        _name_path(error, [folder])
        if error.errno == errno.ENOTEMPTY:  # another process was faster
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish_folder(partial: Path, folder: Path) -> None:
    """Give a complete folder its name, after all of it is on the disk. Raises OSError if a file or folder has it."""
    sync(partial)
    os.replace(partial, folder)
    sync_folder(folder.absolute().parent)


def sync(folder: Path) -> None:
    """Sync every file and folder below `folder` to disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            _sync_file(path)
    sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
