"""Atomic writes: data is synced to disk before it gets its final name. safetensors files written piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

TEMPORARY = ".tmp"  # suffix of a file that is being written
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write. It gets its name, or replaces an existing file, if the block ends without an error."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync(folder: Path) -> None:
    """Sync every file and folder below `folder` to disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# A tensor of a safetensors file: name, type, shape.
Entry = tuple[str, torch.dtype, tuple[int, ...]]


def nbytes(entry: Entry) -> int:
    return torch.Size(entry[2]).numel() * entry[1].itemsize


def write_safetensors(file: BinaryIO, entries: list[Entry], pieces: Iterable[Tensor]) -> int:
    """Write a safetensors file with only one piece in memory at a time. Returns its size in bytes.

    `pieces`: the entries' data, in order. A tensor may come in several pieces. safetensors' own `save_file` needs all
    tensors at once. The format: https://github.com/huggingface/safetensors#format.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        start, end = end, end + nbytes((name, dtype, shape))
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    file.write(len(text).to_bytes(8, "little") + text)
    written = 0
    for piece in pieces:
        written += file.write(piece.contiguous().flatten().view(torch.uint8).numpy().data)
        del piece  # before the next one is made
    assert written == end, f"{written} bytes written of {end}"
    return 8 + len(text) + end
