"""What each worker of a server needs of a bucket, cut out of it.

The workers say which block of each matrix they hold (`ServerAdapter.places`). A tensor that all need whole, as a norm,
is broadcast to them. Of the others, each worker is sent the bytes of its own blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_tempo.errors import EngineError
from megatron_tempo.types import Bucket, PartName, whole_name

_WORD = 4  # bytes: checksums of blocks count words


class Block(NamedTuple):
    """Rows and columns of a matrix, from the first of each."""

    row: int
    rows: int
    column: int
    columns: int


# Of each worker, the block of each tensor that it holds. It needs all of a tensor that is missing here.
Places = Sequence[Mapping[str, Block]]


@dataclass(frozen=True, slots=True)
class Slices:
    """A bucket as it is sent: `common` tensors to all workers, and to each of them its `own` bytes, uint8.

    `blocks`: of each worker, its block of each of the bucket's tensors, counted within the bucket's rows; None for a
    common tensor. The own bytes are these blocks, one after another, by rows.
    """

    common: list[Tensor]
    own: list[Tensor]
    blocks: list[list[Block | None]]


def sliced(bucket: Bucket, places: Places, device: torch.device) -> Slices | None:
    """The slices of a bucket, own bytes on `device`; None if all its tensors are common.

    Takes as much memory as the bucket's sliced tensors, and the copies that several workers need.

    Raises EngineError if a worker asks for more than a tensor has.
    """
    by_tensor = [_blocks(name, tensor, places) for name, tensor in bucket]
    if not any(by_tensor):
        return None
    blocks = [[of[worker] if of else None for of in by_tensor] for worker in range(len(places))]
    own = [_packed(bucket, mine, device) for mine in blocks]
    return Slices([tensor for (_, tensor), of in zip(bucket, by_tensor, strict=True) if not of], own, blocks)


def _blocks(name: str, tensor: Tensor, places: Places) -> list[Block]:
    """Each worker's block of a tensor or of a part of one; none if the tensor is common."""
    found = [place.get(whole_name(name)) for place in places]
    wanted = [block for block in found if block is not None]
    if tensor.ndim != 2 or len(wanted) < len(places):
        return []
    start, rows = (name.start, name.rows) if isinstance(name, PartName) else (0, len(tensor))
    width, size = tensor.shape[1], tensor.element_size()
    for block in wanted:
        if min(block) < 0 or block.row + block.rows > rows or block.column + block.columns > width:
            raise EngineError(f"asks for {block} of {name}, which has {rows} rows and {width} columns")
        if size > _WORD or any(number * size % _WORD for number in (width, block.column, block.columns)):
            return []
    if all(block == (0, rows, 0, width) for block in wanted):
        return []
    return [_within(block, start, len(tensor)) for block in wanted]


def _within(block: Block, start: int, rows: int) -> Block:
    """The rows of a block that are among the `rows` rows from row `start`, counted from that."""
    first = min(max(block.row - start, 0), rows)
    stop = min(max(block.row + block.rows - start, first), rows)
    return Block(first, stop - first, block.column, block.columns)


def _packed(bucket: Bucket, blocks: Sequence[Block | None], device: torch.device) -> Tensor:
    """The bytes of a worker's blocks. Each is a multiple of four bytes, so all are aligned for their types."""
    pairs = [(tensor, block) for (_, tensor), block in zip(bucket, blocks, strict=True) if block is not None]
    sizes = [block.rows * block.columns * tensor.element_size() for tensor, block in pairs]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    for (tensor, (row, rows, column, columns)), part in zip(pairs, packed.split(sizes), strict=True):
        part.view(tensor.dtype).view(rows, columns).copy_(tensor[row : row + rows, column : column + columns])
    return packed
