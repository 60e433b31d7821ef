"""The attention grid: the rows of a micro-batch under each other, and back. A pair without duplicates.

Each token of a row has one cell, so either direction is the other's gradient: both passes copy rows of numbers. An
indexing operation of torch would not know that the cells after a row's end are read by nobody. Its backward pass would
add them to a token one by one, sorted first on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def to_grid(x: Tensor, grid: Tensor, cells: Tensor) -> Tensor:
    """Tokens [S, ...] -> [rows, longest, ...]; `grid` and `cells` as in `Packing`.

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
