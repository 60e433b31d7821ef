"""safetensors files written piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import BinaryIO

import torch
from torch import Tensor

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

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
