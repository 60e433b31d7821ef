"""Packing against a naive construction: a list of (row, position) for every token of every micro-batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tempo.models.packing import GRID_SLACK, MicroBatch, divide, divide_by_budget, micro_batches, row_owners
from megatron_tempo.models.parallel import Layout
from megatron_tempo.types import Batch
from tests.support.tiny import held_by, one_version

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), min_size=0, max_size=30)


def layout(*, data: int = 1, data_rank: int = 0, tensor: int = 1, sequence: bool = False) -> Layout:
    return Layout(
        rank=data_rank * tensor, world_size=data * tensor, tensor_rank=0, tensor=tensor, pipeline_rank=0, pipeline=1,
        data_rank=data_rank, data=data, context_rank=0, context=1, sequence_parallel=sequence,
    )  # fmt: skip


def batch_of(lengths: list[tuple[int, int]]) -> Batch:
    """Rows of (prompt, response) tokens; every token of the batch is another number, from 1."""
    prompts, responses = torch.tensor(lengths, dtype=torch.int64).view(-1, 2).T
    p, t, n = int(prompts.sum()), int(responses.sum()), len(lengths)
    return Batch(
        prompt_ids=tuple(map(str, range(n))),
        group=torch.arange(n),
        prompt_tokens=torch.arange(1, p + 1, dtype=torch.int32),
        prompt_lengths=prompts,
        response_tokens=torch.arange(p + 1, p + t + 1, dtype=torch.int32),
        response_lengths=responses,
        engine_logprobs=torch.zeros(t),
        stopped=torch.ones(n, dtype=torch.bool),
        versions=one_version(responses),
    )


def every(batch: Batch, rows: torch.Tensor, data: int, budget: int, tensor: int = 1) -> list[list[MicroBatch]]:
    """The micro-batches of each data rank, which holds its own rows; sequence parallel where tensor > 1."""
    owners = row_owners(batch.lengths, [rows], data)
    return [
        micro_batches(
            held_by(batch, (owners == rank).nonzero().flatten()), rows[owners[rows] == rank],
            layout(data=data, data_rank=rank, tensor=tensor, sequence=tensor > 1), budget, CPU
        )
        for rank in range(data)
    ]  # fmt: skip


# Division


@given(LENGTHS, st.integers(1, 5))
def test_the_ranks_share_all_rows_in_balance(lengths: list[int], data: int) -> None:
    flat = torch.tensor(lengths, dtype=torch.int64)
    owners = divide(flat, data).tolist()
    assert set(owners) <= set(range(data))
    loads = [int(flat[torch.tensor(owners, dtype=torch.int64) == rank].sum()) for rank in range(data)]
    assert max(loads) - min(loads) <= max(lengths, default=0)  # what longest-first guarantees


@given(LENGTHS, st.integers(1, 60))
def test_groups_keep_to_the_budget_and_a_longer_row_goes_alone(lengths: list[int], budget: int) -> None:
    groups = [group.tolist() for group in divide_by_budget(torch.tensor(lengths, dtype=torch.int64), budget)]
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert group
        assert len(group) == 1 or sum(lengths[i] for i in group) <= budget
        assert len(group) == 1 or max(lengths[i] for i in group) * len(group) <= GRID_SLACK * budget
    sums = [sum(lengths[i] for i in group) for group in groups]
    # No group is opened while its first row has room in the one before, among its tokens and in its grid.
    for (before, total), after in zip(zip(groups, sums, strict=True), groups[1:], strict=False):
        grid = max(lengths[i] for i in before) * (len(before) + 1)
        assert total + lengths[after[0]] > budget or grid > GRID_SLACK * budget, (before, after)


def test_a_long_row_is_not_packed_with_many_short_ones() -> None:
    groups = divide_by_budget(torch.tensor([9000] + [100] * 94), 18432)
    assert [len(group) for group in groups] == [2, 93]


def test_division_by_hand() -> None:
    lengths = torch.tensor([3, 9, 4, 2, 12])
    assert [group.tolist() for group in divide_by_budget(lengths, 10)] == [[4], [1], [2, 0, 3]]
    # longest first to the lighter rank: 12 | 9 | 4 to the 9 | 3 to the 12 | 2 to the 13
    assert divide(lengths, 2).tolist() == [0, 1, 1, 1, 0]


def test_each_mini_batch_is_divided_and_so_are_the_other_rows() -> None:
    """By hand: 12 | 9, then 9 | 8 | 1 to the 8; the rest, 2 | 1."""
    lengths = torch.tensor([9, 1, 12, 2, 9, 8, 1])
    owners = row_owners(lengths, [torch.tensor([0, 2]), torch.tensor([5, 6, 4])], 2)
    assert owners.tolist() == [1, 1, 0, 0, 0, 1, 1]
    assert row_owners(lengths, [], 1).tolist() == [0] * 7
    assert row_owners(lengths[:0], [torch.zeros(0, dtype=torch.int64)], 3).tolist() == []


# Micro-batches


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), max_size=20),
    st.integers(1, 4),
    st.integers(1, 50),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 2**31),
)
@settings(max_examples=150, deadline=None)
def test_micro_batches_are_those_of_a_naive_construction(
    lengths: list[tuple[int, int]], data: int, budget: int, tensor: int, seed: int
) -> None:
    batch = batch_of(lengths)
    generator = torch.Generator().manual_seed(seed)
    keep = int(torch.randint(0, len(lengths) + 1, (), generator=generator))
    rows = torch.randperm(len(lengths), generator=generator)[:keep]  # a mini-batch: some rows, in any order
    ranks = every(batch, rows, data, budget, tensor)
    micros = [micro for rank in ranks for micro in rank]
    owners = row_owners(batch.lengths, [rows], data)

    assert sorted(row for micro in micros for row in micro.rows.tolist()) == sorted(rows.tolist())
    assert all(rank for rank in ranks)
    for data_rank, own in enumerate(ranks):
        held = (owners == data_rank).nonzero().flatten().tolist()
        for micro in own:
            _check_one(micro, batch, held, budget, tensor)
        if keep == len(lengths):
            tokens = int(batch.response_lengths[held].sum())
            cells = torch.cat([micro.response_cells for micro in own])
            assert sorted(cells.tolist()) == list(range(tokens))
            cells = torch.cat([micro.value_cells for micro in own])
            assert sorted(cells.tolist()) == list(range(tokens + len(held)))


def _check_one(micro: MicroBatch, batch: Batch, held: list[int], budget: int, multiple: int) -> None:
    rows = micro.rows.tolist()
    whole = [row.tolist() for row in batch.rows()]
    places = [(row, at) for row in rows for at in range(len(whole[row]))]
    size = micro.tokens.shape[1]
    assert micro.padding == size - len(places)
    assert size % multiple == 0
    assert 0 <= micro.padding < multiple or (micro.padding == multiple and not rows)
    assert len(places) <= budget or len(rows) == 1

    assert micro.tokens[0].tolist() == [whole[row][at] for row, at in places] + [0] * micro.padding
    assert micro.positions.tolist() == [at for _, at in places] + list(range(micro.padding))

    # The token before a response token predicts it; a value is read at the same places and at the row's last token.
    predicting, targets, valued, response_cells, value_cells = [], [], [], [], []
    flat = [(row, t) for row in held for t in range(int(batch.response_lengths[row]))]
    flat_values = [(row, t) for row in held for t in range(int(batch.response_lengths[row]) + 1)]
    for row in rows:
        prompt, response = int(batch.prompt_lengths[row]), int(batch.response_lengths[row])
        for t in range(response + 1):
            valued.append(places.index((row, prompt + t - 1)))
            value_cells.append(flat_values.index((row, t)))
            if t < response:
                predicting.append(places.index((row, prompt + t - 1)))
                targets.append(whole[row][prompt + t])
                response_cells.append(flat.index((row, t)))
    assert micro.predicting.local.tolist() == predicting
    assert micro.predicting.targets.tolist() == targets
    assert micro.valued.local.tolist() == valued
    assert micro.response_cells.tolist() == response_cells
    assert micro.value_cells.tolist() == value_cells
    assert micro.response_rows.lengths.tolist() == batch.response_lengths[rows].tolist()

    sequences = [len(whole[row]) for row in rows] + ([micro.padding] if micro.padding else [])
    assert micro.packing.max_seqlen_q == micro.packing.max_seqlen_kv == max(sequences)
    assert micro.packing.cu_seqlens_q.tolist() == [sum(sequences[:i]) for i in range(len(sequences) + 1)]
    own = sequences[: len(rows)] or sequences  # padding is a row of the grid only if there is nothing else
    start, grid = 0, []
    for length in own:
        grid.append([*range(start, start + length), *[-1] * (max(own) - length)])
        start += length
    (found,) = micro.packing.grids  # all rows here are short
    assert found.tokens.tolist() == grid
    assert found.tokens.flatten()[found.cells].tolist() == list(range(start))  # padding has no cell
    assert found.tokens.numel() <= max(GRID_SLACK * budget, max(own))


@pytest.mark.parametrize(("lengths", "grid"), [([(1, 16380)], (1, 16381)), ([(2, 8), (2, 3)], (2, 10))])
def test_padding_is_no_row_of_the_grid(lengths: list[tuple[int, int]], grid: tuple[int, int]) -> None:
    """A row of 16,381 tokens under sequence parallelism took a grid of twice its size."""
    batch = batch_of(lengths)
    ((micro,),) = every(batch, torch.arange(len(lengths)), 1, 16384, tensor=2)
    assert micro.padding == 1
    assert [found.tokens.shape for found in micro.packing.grids] == [grid]


def test_without_a_grid_none_is_built() -> None:
    batch = batch_of([(2, 3), (4, 1)])
    for wanted in (True, False):
        (micro,) = micro_batches(batch, torch.arange(2), layout(), 99, CPU, with_grid=wanted)
        assert (micro.packing.grids is not None) == wanted
        assert micro.packing.cu_seqlens_q.tolist() == [0, 5, 10]


@pytest.mark.parametrize(("tensor", "padding"), [(1, 1), (4, 4)])
def test_a_rank_without_rows_gets_one_micro_batch_of_padding_alone(tensor: int, padding: int) -> None:
    batch = batch_of([(2, 3)])
    first, second = every(batch, torch.tensor([0]), 2, 100, tensor)
    assert [micro.rows.tolist() for micro in first] == [[0]]
    (micro,) = second
    assert micro.tokens.tolist() == [[0] * padding]
    assert micro.padding == padding
    for indices in (micro.rows, micro.predicting.local, micro.valued.local, micro.response_cells, micro.value_cells):
        assert indices.tolist() == []
        assert indices.dtype == torch.int64
    assert len(micro.response_rows) == len(micro.value_rows) == 0


def test_padding_is_there_for_sequence_parallelism_alone_and_below_five_percent() -> None:
    """At the quickstart's lengths: prompts of 7 tokens, responses of up to 18."""
    generator = torch.Generator().manual_seed(0)
    responses = torch.randint(3, 19, (512,), generator=generator).tolist()
    batch = batch_of([(7, response) for response in responses])
    for data, tensor, budget in [(1, 1, 300), (4, 1, 300), (1, 2, 300), (2, 2, 300), (1, 8, 300), (2, 4, 60)]:
        micros = [micro for rank in every(batch, torch.arange(512), data, budget, tensor) for micro in rank]
        tokens = sum(micro.tokens.numel() for micro in micros)
        padding = sum(micro.padding for micro in micros)
        assert tokens - padding == int(batch.lengths.sum())
        assert padding / tokens < 0.05, (data, tensor, budget)
        if tensor == 1:
            assert padding == 0
