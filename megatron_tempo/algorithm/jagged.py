"""Sums and means over the rows of a jagged tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def row_sum(flat: Tensor, lengths: Tensor) -> Tensor:
    """The sum of each row: [T], int64 [n] -> [n]. Rows of length 0 give 0."""
    row = torch.repeat_interleave(torch.arange(len(lengths), device=flat.device), lengths)
    return flat.new_zeros(len(lengths)).index_add(0, row, flat)


def row_mean(flat: Tensor, lengths: Tensor) -> Tensor:
    """The mean of each row: [T], int64 [n] -> [n]. Rows of length 0 give 0."""
    return row_sum(flat, lengths) / lengths.clamp(min=1)
