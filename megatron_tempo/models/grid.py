"""The attention's grids: rows of a micro-batch under each other, and back. A pair without duplicates.

Each token of a row has one cell, so either direction is the other's gradient: both passes copy rows of numbers. An
indexing operation of torch would not know that the cells after a row's end are read by nobody. Its backward pass would
add them to a token one by one, sorted first on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_tempo.types import ranges

# Rows that differ by no more than this share a grid: short rows cost more by their number than by their tokens.
LIKE_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Grid:
    """Some rows of a micro-batch, which are neighbours there, under each other.

    Rows of 3 and 2 tokens:

    >>> Grid(tokens=[[0, 1, 2], [3, 4, -1]], cells=[0, 1, 2, 3, 4])
    """

    tokens: Tensor  # int64 [rows, longest]: which of the rows' tokens is at each position, -1 after a row's end
    cells: Tensor  # int64 [tokens]: each token's index in the flattened grid

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device | None = None) -> Grid:
        """The grid of rows of these `lengths` (int64 [rows], on the CPU), for attention on `device`."""
        total, longest = int(lengths.sum()), int(lengths.max())
        cells = torch.repeat_interleave(torch.arange(len(lengths)), lengths) * longest
        cells += ranges(torch.zeros_like(lengths), lengths)
        tokens = torch.full((len(lengths) * longest,), -1, dtype=torch.int64)
        tokens[cells] = torch.arange(total)
        return cls(tokens.view(len(lengths), longest).to(device), cells.to(device))


def like_lengths(lengths: list[int]) -> list[int]:
    """How many rows each grid gets, of rows with these lengths, which do not increase.

    A grid's rows are shorter than its first by at most a quarter, or by at most `LIKE_TOKENS`. So the attention's work
    is at most 16 / 9 of that of the rows themselves, except where rows are short. One grid for a micro-batch would cost
    rows * longest^2.
    """
    counts: list[int] = []
    longest = 0
    for length in lengths:
        if not counts or length < min(0.75 * longest, longest - LIKE_TOKENS):
            counts.append(0)
            longest = length
        counts[-1] += 1
    return counts


def to_grid(x: Tensor, grid: Tensor, cells: Tensor) -> Tensor:
    """Tokens [S, ...] -> [rows, longest, ...]; `grid` and `cells` are those of a `Grid`.

    After a row's end there is any token: the causal mask hides it. If all rows have one length, nothing is copied,
    except what is a view of something larger, which the backward pass would keep alive.
    """
    tokens = x[: len(cells)]
    if _is_full(grid, cells):
        return tokens.contiguous().unflatten(0, grid.shape)
    filled: Tensor = _ToGrid.apply(tokens, grid, cells)
    return filled


def from_grid(x: Tensor, grid: Tensor, cells: Tensor, size: int) -> Tensor:
    """[rows, longest, ...] -> the `size` tokens [S, ...]. Padding, which comes last, is zero."""
    tokens: Tensor = x.flatten(0, 1) if _is_full(grid, cells) else _FromGrid.apply(x, grid, cells)
    padding = size - len(cells)
    return functional.pad(tokens, [0, 0] * (tokens.dim() - 1) + [0, padding]) if padding else tokens


def _is_full(grid: Tensor, cells: Tensor) -> bool:
    return grid.numel() == len(cells)


def _read(tokens: Tensor, grid: Tensor) -> Tensor:
    """[tokens, ...] -> [rows, longest, ...], with the first token in cells that have none."""
    return tokens.index_select(0, grid.flatten().clamp(min=0)).unflatten(0, grid.shape)


class _ToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, grid: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(cells)
        return _read(tokens, grid)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor, None, None]:
        (cells,) = ctx.saved_tensors
        return back.flatten(0, 1).index_select(0, cells), None, None


class _FromGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor, cells: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        return x.flatten(0, 1).index_select(0, cells)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, back: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        empty = (grid < 0).view(*grid.shape, *[1] * (back.dim() - 1))
        return _read(back, grid).masked_fill_(empty, 0.0), None, None
