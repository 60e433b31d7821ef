"""MANIFEST.json: size and CRC-32 of every file of a checkpoint. A folder whose files differ from it is damaged."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

from megatron_tempo.observability.records import write_whole
from megatron_tempo.runtime import progress_marker

MANIFEST = "MANIFEST.json"
STATE = "run.json"  # step, streams, optimizer step counts, config
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
    """The digests of these files. For one that cannot be read, the reason instead."""
    digests = {}
    for name in names:
        try:
            digests[name] = _digest(checkpoint / name)
        except OSError as error:
            digests[name] = f"not readable ({error.strerror})"
    return digests


def write(checkpoint: Path, written: Digests) -> None:
    write_whole(checkpoint / MANIFEST, json.dumps(written, indent=1) + "\n")


def read(checkpoint: Path) -> Digests | str:
    """The manifest, or a string that says what is wrong with it."""
    try:
        manifest: Digests = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(manifest, dict) or not all(isinstance(digest, str) for digest in manifest.values()):
        return f"{MANIFEST} is not a manifest"
    return manifest


def difference(wanted: Digests, now: Digests) -> str | None:
    """The first file that differs from what was written, as a message."""
    for name, digest in wanted.items():
        if name not in now:
            return f"{name} is missing"
        if now[name] != digest:
            return f"{name} is {now[name]}, was written as {digest}"
    return None


def damage(checkpoint: Path, model: str) -> str | None:
    """What is wrong with the files of one model of a checkpoint, or with its state; None if they are as written.

    Reads the files completely, in a single process without process groups.
    """
    manifest = read(checkpoint)
    if isinstance(manifest, str):
        return manifest
    wanted = {file: digest for file, digest in manifest.items() if file == STATE or file.startswith(f"{model}/")}
    return difference(wanted, digests_or_errors(checkpoint, (file for file in wanted if (checkpoint / file).is_file())))


def _digest(path: Path) -> str:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            checksum = zlib.crc32(block, checksum)
            progress_marker.mark()
    return f"{path.stat().st_size}:{checksum:08x}"
