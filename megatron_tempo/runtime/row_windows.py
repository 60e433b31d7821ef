"""Moves rows of numbers between ranks in windows of bounded size: every rank sees each row, and keeps what it needs.

Neither the memory nor the number of collective calls depends on the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.runtime import progress_marker

WINDOW = 1 << 22  # numbers of 4 bytes in each column: 32 MB for tokens and log-probabilities


def row_windows(
    lengths: Tensor,
    fill: Callable[[int], Sequence[Tensor] | None],
    columns: int = 1,
    sources: Tensor | None = None,
    size: int = WINDOW,
) -> Iterator[tuple[range, Tensor]]:
    """Yield (rows, their numbers: int32 [columns, numbers], one row after another) for all rows, in order. Collective.

    A window has at most `size` numbers in each column, or one row that is longer. Its tensor is overwritten by the next
    window. Numbers of another type of 4 bytes pass as they are: see them by `.view(torch.float32)`. Every rank must
    read the iterator to its end.

    Args:
        lengths: int64 [n], numbers of each row; the same on every rank.
        fill: returns row i's `columns` tensors of `lengths[i]` numbers on the one rank that has the row, else None.
        columns: tensors of each row.
        sources: int64 [n], the rank that has each row, the same on every rank; None: not known. A window whose rows
            come from one rank is broadcast. Others are summed, where all ranks but one have zeros.
        size: see above.
    """
    sizes = lengths.tolist()
    buffer = torch.empty(0, dtype=torch.int32)
    alone = dist.get_world_size() == 1
    for rows in _divided(sizes, size):
        numbers = sum(sizes[rows.start : rows.stop])
        if buffer.numel() < columns * numbers:
            buffer = torch.empty(columns * numbers, dtype=torch.int32)
        window = buffer[: columns * numbers].view(columns, numbers)
        source = _only(sources, rows)
        if source is None:
            window.zero_()
        at = 0
        for row in rows:
            if (parts := fill(row)) is not None:
                for column, part in zip(window, parts, strict=True):
                    column[at : at + sizes[row]] = part.view(torch.int32)
            at += sizes[row]
        if source is not None and not alone:
            dist.broadcast(window, source)
        elif not alone:
            dist.all_reduce(window)
        progress_marker.mark()
        yield rows, window


def _divided(sizes: Sequence[int], size: int) -> Iterator[range]:
    """Consecutive rows of at most `size` numbers in total, or one row that is longer."""
    start = total = 0
    for row, numbers in enumerate(sizes):
        if row > start and total + numbers > size:
            yield range(start, row)
            start, total = row, 0
        total += numbers
    if start < len(sizes):
        yield range(start, len(sizes))


def _only(sources: Tensor | None, rows: range) -> int | None:
    """The rank that all these rows come from; None if there is no such rank, or it is not known."""
    if sources is None:
        return None
    of_rows = sources[rows.start : rows.stop]
    first = int(of_rows[0])
    return first if bool((of_rows == first).all()) else None
