"""Checksums that show that a tensor arrived as it was sent. `vllm_worker.py` has copies of these functions, since it
cannot import this package."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tempo.types import Bucket, PartName

# Elements per step. This bounds the memory that is needed in addition to the tensor.
_CHUNK = 1 << 19


def checksum(tensor: Tensor, first: int = 0) -> str:
    """The sum over i of (2i + 1) * w_i modulo 2**64, as 16 hexadecimal digits.

    w_i are the tensor's bytes as little-endian signed 32-bit integers, padded with zero bytes; i counts from `first`.
    So the checksum of a tensor is the sum of its parts', each counted from its own place.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    odd = torch.arange(1, 2 * _CHUNK, 2, device=data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(data), 4 * _CHUNK):
        part = data[start : start + 4 * _CHUNK]
        words = torch.nn.functional.pad(part, (0, -len(part) % 4)).view(torch.int32).long()
        total += (odd[: len(words)] * words).sum() + (2 * first + start // 2) * words.sum()
    return f"{int(total) % 2**64:016x}"


def root_mean_square(tensor: Tensor) -> float:
    """0 for a tensor without elements."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for part in tensor.detach().flatten().split(_CHUNK):
        total += part.float().square().sum()
    return (float(total) / max(tensor.numel(), 1)) ** 0.5


def checksums_of(bucket: Bucket) -> dict[str, tuple[str, float]]:
    """(checksum, root mean square) of each tensor. That of a part counts from the part's place (`whole_checksums`)."""
    found = {}
    for name, tensor in bucket:
        before = name.start * tensor[0].nbytes if isinstance(name, PartName) else 0
        assert before % 4 == 0, f"{name} does not begin at a multiple of four bytes"
        found[name] = checksum(tensor, before // 4), root_mean_square(tensor)
    return found


def whole_checksums(found: dict[str, tuple[str, float]]) -> dict[str, tuple[str, float]]:
    """The same with those of a tensor's parts joined under the tensor's name."""
    joined: dict[str, tuple[str, float]] = {}
    for name, (total, size) in found.items():
        if not isinstance(name, PartName):
            joined[name] = total, size
            continue
        before, square = joined.get(name.whole, ("0", 0.0))
        share = (name.stop - name.start) / name.rows
        joined[name.whole] = f"{(int(before, 16) + int(total, 16)) % 2**64:016x}", square + share * size**2
    parts = {name.whole for name in found if isinstance(name, PartName)}
    return {name: (total, size**0.5 if name in parts else size) for name, (total, size) in joined.items()}
