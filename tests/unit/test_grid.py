"""The attention grid against plain indexing: values, gradients, and the operations of the backward pass."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from megatron_tempo.config.sizes import GRID_SLACK
from megatron_tempo.models.attention import PackedAttention
from megatron_tempo.models.grid import LIKE_TOKENS, Grid, from_grid, like_lengths, to_grid
from megatron_tempo.models.packing import Packing, divide_by_budget

HEADS, GROUPS, DIM = 6, 2, 4
LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def grid_of(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The grid and its cells, one token at a time."""
    longest, token, cells = max(lengths), 0, []
    grid = torch.full((len(lengths), longest), -1)
    for row, length in enumerate(lengths):
        for at in range(length):
            grid[row, at] = token
            cells.append(row * longest + at)
            token += 1
    return grid, torch.tensor(cells)


def attention(window: int | None = None) -> PackedAttention:
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS)
    return PackedAttention(config, window=window)


def inputs(size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, 1, heads, DIM) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@given(LENGTHS, st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_tokens_come_back_and_padding_is_zero(lengths: list[int], padding: int) -> None:
    grid, cells = grid_of(lengths)
    size = sum(lengths) + padding
    x = torch.randn(size, 2, 3, dtype=torch.float64, requires_grad=True)
    there = to_grid(x, grid, cells)
    assert torch.equal(there[grid >= 0], x[: len(cells)])
    back = from_grid(there, grid, cells, size)
    assert torch.equal(back, torch.cat([x[: len(cells)], torch.zeros(padding, 2, 3, dtype=x.dtype)]))
    weights = torch.randn_like(back)
    (found,) = torch.autograd.grad((back * weights).sum(), x)
    assert torch.equal(found, torch.cat([weights[: len(cells)], torch.zeros(padding, 2, 3, dtype=x.dtype)]))


def _read_outputs(module: PackedAttention, packing: Packing, *qkv: Tensor) -> Tensor:
    assert packing.grids is not None
    outputs: Tensor = module(*qkv, None, packed_seq_params=packing)[: sum(len(grid.cells) for grid in packing.grids)]
    return outputs


@pytest.mark.parametrize("lengths", [[3, 1, 2], [2, 2], [4]])
def test_the_gradients_are_those_of_small_differences(lengths: list[int]) -> None:
    """Of the attention, so the cells after a row's end have the gradients that the attention gives them: none."""
    grid, cells = grid_of(lengths)
    packing = Packing(grids=(Grid(grid, cells),))
    for window in (None, 2):
        qkv = inputs(sum(lengths) + 1, torch.float64)
        assert torch.autograd.gradcheck(partial(_read_outputs, attention(window), packing), qkv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[9, 4, 4, 1], [5, 5, 5], [7]])
def test_no_bit_differs_from_plain_indexing(lengths: list[int], dtype: torch.dtype) -> None:
    """Each token is read by index, and keys and values are repeated for the heads of a group."""
    grid, cells = grid_of(lengths)
    found = []
    for plain in (False, True):
        qkv = inputs(len(cells) + 2, dtype)
        if plain:
            parts = [x[grid.clamp(min=0), 0] for x in qkv]
            parts = [x.repeat_interleave(HEADS // x.shape[2], dim=2).transpose(1, 2) for x in parts]
            out = functional.scaled_dot_product_attention(*parts, is_causal=True)
            out = out.transpose(1, 2).flatten(2).flatten(0, 1)[cells, None]
        else:
            out = attention()(*qkv, None, packed_seq_params=Packing(grids=(Grid(grid, cells),)))
            with torch.no_grad():
                read = attention()(*qkv, None, packed_seq_params=Packing(grids=(Grid(grid, cells),)))
            assert torch.equal(read, out)  # by the kernel for grouped queries
        out[: len(cells)].backward(torch.linspace(-1, 1, len(cells) * HEADS * DIM).to(dtype).view(-1, 1, HEADS * DIM))
        found.append([out[: len(cells)], *(x.grad for x in qkv)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("window", [None, 3])
def test_the_backward_pass_adds_to_no_index(window: int | None) -> None:
    grid, cells = grid_of([8, 3, 1])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        qkv = inputs(len(cells), torch.float32)
        attention(window)(*qkv, None, packed_seq_params=Packing(grids=(Grid(grid, cells),))).sum().backward()
    names = {event.key for event in profiled.key_averages()}
    assert any("attention" in name and "backward" in name for name in names)
    assert [name for name in names if "index_put" in name or "index_add" in name or "scatter" in name] == []


def test_grouped_queries_are_not_repeated_where_torch_takes_them() -> None:
    grid, cells = grid_of([8, 3, 1])
    for grouped in (False, True):
        with torch.set_grad_enabled(not grouped), profile(activities=[ProfilerActivity.CPU]) as profiled:
            attention()(*inputs(len(cells), torch.float32), None, packed_seq_params=Packing(grids=(Grid(grid, cells),)))
        assert ("aten::repeat_interleave" in {event.key for event in profiled.key_averages()}) == (not grouped)


@given(st.lists(st.integers(1, 16381), min_size=1, max_size=300), st.sampled_from([4096, 16384, 18432]))
@settings(max_examples=100, deadline=None)
def test_a_grid_is_at_most_a_quarter_over_the_budget(lengths: list[int], budget: int) -> None:
    """Or it is one row, which is longer. With the padding of sequence parallelism: it is not in the grid."""
    for group in divide_by_budget(torch.tensor(lengths), budget):
        longest = max(lengths[i] for i in group.tolist())
        assert longest * len(group) <= max(GRID_SLACK * budget, longest)


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_rows_of_a_grid_are_of_like_length(lengths: list[int]) -> None:
    lengths.sort(reverse=True)
    counts = like_lengths(lengths)
    assert sum(counts) == len(lengths)
    assert min(counts) > 0
    starts = [sum(counts[:i]) for i in range(len(counts))]
    for start, count in zip(starts, counts, strict=True):
        longest, last = lengths[start], lengths[start + count - 1]
        assert last >= 0.75 * longest or last >= longest - LIKE_TOKENS
        if start:  # the row would not have fitted into the grid before it
            before = lengths[start - counts[starts.index(start) - 1]]
            assert longest < 0.75 * before
            assert longest < before - LIKE_TOKENS


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("padding", [0, 3])
def test_several_grids_are_as_one(window: int | None, padding: int) -> None:
    """Outputs and gradients, in double precision, against one grid for all rows."""
    lengths = [130, 120, 60, 59, 20, 1]
    counts = like_lengths(lengths)
    assert counts == [2, 2, 2]
    parts = torch.tensor(lengths).split(counts)
    found = []
    for grids in (tuple(Grid.of(part) for part in parts), (Grid(*grid_of(lengths)),)):
        qkv = inputs(sum(lengths) + padding, torch.float64)
        out = attention(window)(*qkv, None, packed_seq_params=Packing(grids=grids))
        assert out.shape == (sum(lengths) + padding, 1, HEADS * DIM)
        out[: sum(lengths)].backward(
            torch.randn(sum(lengths), 1, HEADS * DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        )
        found.append([out[: sum(lengths)], *(x.grad for x in qkv)])
    for several, one in zip(*found, strict=True):
        torch.testing.assert_close(several, one, rtol=1e-12, atol=1e-12)
