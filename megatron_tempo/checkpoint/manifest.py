"""MANIFEST.json: size and CRC-32 of every file of a checkpoint. A folder whose files differ from it is damaged."""

from __future__ import annotations

import errno
import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_tempo.errors import InputError
from megatron_tempo.files import replace_file
from megatron_tempo.runtime import progress_marker

MANIFEST = "MANIFEST.json"
STATE = "run.json"  # step, streams, optimizer step counts, config
UNREADABLE = "not readable: "
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # any other error says nothing about the file
_READ_BYTES = 1 << 22

# By a file's name below the checkpoint: "SIZE:CRC-32".
Digests = dict[str, str]


def files(checkpoint: Path) -> list[str]:
    """The names of a checkpoint's files, except the manifest."""
    paths = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(str(path.relative_to(checkpoint)) for path in paths)


def digests(checkpoint: Path, names: Iterable[str]) -> Digests:
    """The digests of these files, which are read completely. Raises OSError."""
    return {name: _digest(checkpoint / name) for name in names}


def digests_or_errors(checkpoint: Path, names: Iterable[str]) -> Digests:
    """The digests of those files that exist. For one that cannot be read, `UNREADABLE` and the reason instead."""
    digests = {}
    for name in names:
        try:
            digests[name] = _digest(checkpoint / name)
        except ABSENT:
            continue
        except OSError as error:
            digests[name] = f"{UNREADABLE}{error.strerror or error}"
    return digests


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The run's state. Raises OSError, and ValueError if it is not the state of a checkpoint."""
    state = json.loads(_regular(checkpoint / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict) or not isinstance(state.get("step"), int):
        raise ValueError(f"{STATE} is not the state of a checkpoint")
    if not isinstance(state.get("optimizer_steps"), dict):
        raise ValueError(f"{STATE} has no optimizer_steps")
    return state


def write(checkpoint: Path, written: Digests) -> None:
    replace_file(checkpoint / MANIFEST, json.dumps(written, indent=1) + "\n", fsync=True)


def read(checkpoint: Path) -> Digests | str:
    """The manifest, or a string that says what is wrong with it. Raises OSError if it exists and cannot be read."""
    try:
        manifest: Digests = json.loads(_regular(checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (*ABSENT, ValueError, RecursionError) as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(manifest, dict) or not all(isinstance(digest, str) for digest in manifest.values()):
        return f"{MANIFEST} is not a manifest"
    if not manifest:
        return f"{MANIFEST}: it lists no files"
    return manifest


def difference(wanted: Digests, now: Digests) -> str | None:
    """The first file that differs from what was written, as a message."""
    for name, digest in wanted.items():
        if name not in now:
            return f"{name} is missing"
        if now[name] != digest:
            return f"{name} is {now[name]}, was written as {digest}"
    return None


def first_read_error(now: Digests) -> str | None:
    """The first file that exists and could not be read, as a message. That is a fault of the disk or of permissions,
    and says nothing about the file."""
    faults = [(name, digest) for name, digest in now.items() if digest.startswith(UNREADABLE)]
    return f"{faults[0][0]} cannot be read ({faults[0][1].removeprefix(UNREADABLE)})" if faults else None


def damage(checkpoint: Path, model: str) -> str | None:
    """What is wrong with the files of one model of a checkpoint, or with its state; None if they are unchanged.

    Reads the files completely, in a single process without process groups. Raises InputError if one cannot be read.
    """
    manifest = read(checkpoint)
    if isinstance(manifest, str):
        return manifest
    wanted = {file: digest for file, digest in manifest.items() if file == STATE or file.startswith(f"{model}/")}
    now = digests_or_errors(checkpoint, wanted)
    if fault := first_read_error(now):
        raise InputError(f"{checkpoint}: {fault}; mend the disk or the permissions, then run the same command again")
    return difference(wanted, now)


def sha256(checkpoint: Path) -> str:
    """A hash of all of a checkpoint's files, by their digests. Raises OSError."""
    return hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest()


def _regular(path: Path) -> Path:
    """The path, if it is a regular file, not a pipe or a folder. Raises OSError."""
    if path.exists() and not path.is_file():
        raise IsADirectoryError(errno.EISDIR, "is not a file", str(path))
    return path


def _digest(path: Path) -> str:
    checksum = 0
    with _regular(path).open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
            progress_marker.mark()
    return f"{path.stat().st_size}:{checksum:08x}"
