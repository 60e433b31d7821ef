"""Checksums that show that a tensor arrived as it was sent. `vllm_worker.py` has copies of these functions, since it
cannot import this package."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements per step. This bounds the memory that is needed in addition to the tensor.
_CHUNK = 1 << 19


def checksum(tensor: Tensor) -> str:
    """The sum over i of (2i + 1) * w_i modulo 2**64, as 16 hexadecimal digits.

    w_i are the tensor's bytes as little-endian signed 32-bit integers, padded with zero bytes.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    odd = torch.arange(1, 2 * _CHUNK, 2, device=data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, len(data), 4 * _CHUNK):
        part = data[start : start + 4 * _CHUNK]
        words = torch.nn.functional.pad(part, (0, -len(part) % 4)).view(torch.int32).long()
        total += (odd[: len(words)] * words).sum() + start // 2 * words.sum()
    return f"{int(total) % 2**64:016x}"


def root_mean_square(tensor: Tensor) -> float:
    """0 for a tensor without elements."""
    total = torch.zeros((), dtype=torch.float64, device=tensor.device)
    for part in tensor.detach().flatten().split(_CHUNK):
        total += part.float().square().sum()
    return (float(total) / max(tensor.numel(), 1)) ** 0.5
