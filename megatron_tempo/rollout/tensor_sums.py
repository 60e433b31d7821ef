"""Checksums and sizes of the tensors of a bucket, in few passes over its bytes, which wait for the GPU once.

This file is also copied into a vLLM server's folder, with `vllm_worker.py`, so it imports nothing of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

# Words of four bytes in a row. Sums over a row, weighted by up to twice that, are exact in float64.
_ROW = 32
# Rows per step: 1 MB of tensors on a CPU, 16 MB on a GPU. This bounds the memory that is needed in addition to them.
_STEP, _GPU_STEP = 1 << 13, 1 << 17


def tensor_sums(tensors: Sequence[Tensor], firsts: Sequence[int]) -> list[tuple[str, float]]:
    """(checksum, root mean square) of each tensor. Those that lie in line, of one type, are read in one pass.

    The checksum is the sum over i of (2i + 1) * w_i modulo 2**64, as 16 hexadecimal digits. w_i are the tensor's bytes
    as little-endian signed 32-bit integers, padded with zero bytes; i counts from `firsts`. So the checksum of a tensor
    is the sum of its parts', each counted from its own place. The root mean square of no elements is 0.
    """
    sums, squares, counted = [], [], iter(firsts)
    for data, dtype, counts in _in_line(tensors):
        owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(data.device)
        starts = [2 * (next(counted) - _ROW * before) for before in accumulate(counts[:-1], initial=0)]
        place = torch.tensor(starts, device=data.device)[owners] + 2 * _ROW * torch.arange(
            len(owners), device=data.device
        )
        by_row, square = _row_sums(data, dtype)
        plain, weighted = by_row.unbind(1)
        sums.append(place.new_zeros(len(counts)).index_add_(0, owners, place * plain + weighted))
        squares.append(square.new_zeros(len(counts)).index_add_(0, owners, square))
    totals = torch.cat(sums).tolist() if sums else []
    sizes = torch.cat(squares).tolist() if squares else []
    return [
        (f"{total % 2**64:016x}", (size / max(tensor.numel(), 1)) ** 0.5)
        for tensor, total, size in zip(tensors, totals, sizes, strict=True)
    ]


def _in_line(tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, torch.dtype, list[int]]]:
    """The bytes of tensors that lie in line, uint8 [rows, 4 * _ROW], their type, and the rows of each of them.

    A tensor whose bytes are no whole rows, or not aligned, is copied and padded with zeros, which add nothing.
    """
    end, line, dtype, counts = None, torch.empty(0), torch.uint8, list[int]()
    for tensor in tensors:
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        if len(data) % (4 * _ROW) or data.storage_offset() % 8:
            data = torch.nn.functional.pad(data, (0, -len(data) % (4 * _ROW)))
        storage, start = data.untyped_storage(), data.storage_offset()
        if counts and tensor.dtype == dtype and (storage.data_ptr(), start) == end:
            counts.append(len(data) // (4 * _ROW))
            line = line.set_(storage, line.storage_offset(), (len(line) + len(data),), (1,))
        else:
            if counts:
                yield line.view(-1, 4 * _ROW), dtype, counts
            line, dtype, counts = data, tensor.dtype, [len(data) // (4 * _ROW)]
        end = storage.data_ptr(), start + len(data)
    if counts:
        yield line.view(-1, 4 * _ROW), dtype, counts


def _row_sums(data: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of each row, the sums of its words w_k and of (2k + 1) * w_k: int64 [rows, 2], and of squares: float64 [rows]."""
    weights = torch.ones(_ROW, 2, dtype=torch.float64, device=data.device)
    weights[:, 1] = torch.arange(1, 2 * _ROW, 2, device=data.device)
    sums = torch.empty(len(data), 2, dtype=torch.int64, device=data.device)
    squares = torch.empty(len(data), dtype=torch.float64, device=data.device)
    count = _GPU_STEP if data.is_cuda else _STEP
    for start in range(0, len(data), count):
        rows = data[start : start + count]
        sums[start : start + count] = rows.view(torch.int32).double() @ weights
        squares[start : start + count] = rows.view(dtype).float().square().sum(1)
    return sums, squares
