"""The rows of a packed tensor: which entries belong to which row. Used by the plain functions and by the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Number of entries that one program of a kernel works on. Each row starts a new block, so no block has two rows.
BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Rows:
    """n rows, one after another in a flat tensor of `total` entries. Made once per micro-batch, for all kernels.

    Rows of 3, 0 and 1500 entries:

    >>> Rows(lengths=[3, 0, 1500], total=1503, starts=[0, 3, 3, 1503], block_rows=[0, 1, 2, 2],
    ...      first_blocks=[0, 1, 2, 4], tickets=[0, 0, 0, 0])

    An empty row has a block too, which writes its results.
    """

    lengths: Tensor  # int64 [n]
    total: int
    starts: Tensor  # int32 [n + 1]: where each row starts, and the end (cu_seqlens)
    block_rows: Tensor  # int32 [blocks]: the row that each block belongs to
    first_blocks: Tensor  # int32 [n + 1]: each row's first block, and the number of blocks
    # int32 [n + 1]: the number of blocks that have finished, of each row and in total. The last block resets it to
    # zero, so the kernels that share it must run one after another, as they do on one stream.
    tickets: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | None = None) -> Rows:
        """The rows of these `lengths` (int64 [n], on the CPU) for kernels on `device`."""
        blocks = (lengths + BLOCK - 1).div(BLOCK, rounding_mode="floor").clamp(min=1)
        ends = torch.stack([lengths.cumsum(0), blocks.cumsum(0)])
        bounds = torch.cat([ends.new_zeros(2, 1), ends], dim=1).int()
        return cls(
            lengths=lengths.to(device),
            total=int(lengths.sum()),
            starts=bounds[0].to(device),
            block_rows=torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), blocks).to(device),
            first_blocks=bounds[1].to(device),
            tickets=torch.zeros(len(lengths) + 1, dtype=torch.int32, device=device),
        )

    def spread(self, of_row: Tensor) -> Tensor:
        """Repeat each row's number for all of its entries: [n] -> [total]."""
        return torch.repeat_interleave(of_row, self.lengths, output_size=self.total)

    def sum(self, flat: Tensor) -> Tensor:
        """The sum of each row: [total] -> [n]. Empty rows give 0."""
        row = self.spread(torch.arange(len(self), device=flat.device))
        return flat.new_zeros(len(self)).index_add(0, row, flat)

    def mean(self, flat: Tensor) -> Tensor:
        """The mean of each row: [total] -> [n]. Empty rows give 0."""
        return self.sum(flat) / self.lengths.clamp(min=1)

    def extremes(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest entry of each row: [total] -> [n], [n]. Empty rows give inf and -inf."""
        row = self.spread(torch.arange(len(self), device=flat.device))
        least = flat.new_full((len(self),), torch.inf).scatter_reduce(0, row, flat, "amin")
        return least, flat.new_full((len(self),), -torch.inf).scatter_reduce(0, row, flat, "amax")
