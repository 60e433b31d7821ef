"""How rows are shared among data-parallel ranks: each row's work, and the division by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megatron_tempo.config.choices import Published
from megatron_tempo.config.model_shape import shape_or_problem
from megatron_tempo.models.packing import divide, row_work
from megatron_tempo.plan.parameters import Role
from megatron_tempo.plan.shapes import PUBLISHED
from megatron_tempo.plan.times import row_operations
from megatron_tempo.rehearsal.lengths import Lengths
from tests.support.tiny import write_model

BENCHMARKS = Path(__file__).parents[2] / "docs" / "benchmarks.md"
LIMIT, MINI_BATCH, MINI_BATCHES = 16_384, 512, 8  # tokens; 64 prompts x 8 responses; an iteration of 512 prompts
DATA = (8, 16, 64)
EIGHT = PUBLISHED[Published.qwen3_8b]


# The work of a row


@pytest.mark.parametrize("family", ["qwen3", "olmo3", "qwen3_moe"])
def test_a_rows_work_is_what_torch_counts_in_transformers_model(tmp_path: Path, family: str) -> None:
    """torch counts attention's products over all pairs of tokens; a row's work has only the pairs that attend."""
    shape, _ = shape_or_problem(write_model(tmp_path, family=family))
    assert shape is not None
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, **eager)
    for length in (1, 3, 17):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.zeros(1, length, dtype=torch.int64))
        square = torch.ones(length, length, dtype=torch.bool).tril()
        pairs = sum(
            int((square if layer.window is None else square.triu(1 - layer.window)).sum()) for layer in shape.attention
        )
        products = counter.get_total_flops() // 2 - 2 * shape.queries * length**2 * shape.layers
        lengths = torch.tensor([length])
        assert row_work(lengths, shape, lengths).tolist() == [products + 2 * shape.queries * pairs]


@pytest.mark.parametrize("name", Published)
def test_the_planner_counts_the_same_work(name: Published) -> None:
    shape, prompt, response = PUBLISHED[name], 2_000, 14_000
    for role, outputs in ((Role.actor, torch.tensor([response])), (Role.critic, None)):
        planned = sum(row_operations(shape, prompt, response, role))
        work = row_work(torch.tensor([prompt + response]), shape, outputs)
        assert 2 * int(work) == pytest.approx(planned, rel=1e-4)  # which leaves out a token's attention to itself


# The division


@given(st.lists(st.integers(0, 40), max_size=40), st.integers(1, 6))
def test_every_row_has_one_owner_and_swaps_do_not_make_it_worse(work: list[int], data: int) -> None:
    owners = divide(torch.tensor(work, dtype=torch.int64), data)
    assert owners.dtype == torch.int64
    assert len(owners) == len(work)
    assert all(0 <= owner < data for owner in owners.tolist())
    loads = _loads(torch.tensor(work, dtype=torch.int64), owners, data)
    greedy = [0] * data  # largest first, without swaps
    for amount in sorted(work, reverse=True):
        greedy[greedy.index(min(greedy))] += amount
    assert max(loads) <= max(greedy)


def test_the_largest_row_goes_first_and_swaps_even_out_what_is_left() -> None:
    assert divide(torch.tensor([3, 9, 4, 2, 12]), 2).tolist() == [0, 1, 1, 1, 0]
    work = torch.tensor([3, 3, 2, 2, 2])  # largest first gives 3 + 2 + 2 and 3 + 2
    owners = divide(work, 2)
    assert sorted(_loads(work, owners, 2)) == [6, 6]
    assert divide(torch.empty(0, dtype=torch.int64), 3).tolist() == []
    assert divide(torch.tensor([5]), 3).tolist() == [0]


def test_at_the_papers_lengths_the_slowest_rank_has_at_most_three_percent_more_than_the_mean() -> None:
    """At most 0.7, where sharing by tokens has up to 10. docs/benchmarks.md has the table."""
    table = []
    for mean, sigma in ((4000.0, 0.5), (6000.0, 0.8), (10_000.0, 0.8)):
        responses = torch.tensor(Lengths(mean, sigma).draw(MINI_BATCH * MINI_BATCHES, LIMIT, seed=1))
        lengths = responses + torch.tensor(Lengths(200.0).draw(len(responses), 2048, seed=2))
        work = row_work(lengths, EIGHT, responses)
        by_tokens, by_work = ([_slowest(work, by, data) for data in DATA] for by in (lengths, work))
        assert max(by_work) < 1.01
        assert max(by_tokens) > max(by_work)
        truncated = float((responses == LIMIT).double().mean())
        cells = [f"{(tokens - 1):.1%}, {(ours - 1):.1%}" for tokens, ours in zip(by_tokens, by_work, strict=True)]
        table.append(f"| {mean:,.0f}, {sigma} | {truncated:.1%} | {' | '.join(cells)} |")
    missing = [row for row in table if row not in BENCHMARKS.read_text()]
    assert not missing, "docs/benchmarks.md has other rows than:\n" + "\n".join(missing)


def _slowest(work: Tensor, by: Tensor, data: int) -> float:
    """The work of the slowest rank by that of the mean, in the worst mini-batch, if rows are divided `by` a number."""
    worst = 0.0
    for rows in torch.arange(len(work)).split(MINI_BATCH):
        loads = _loads(work[rows], divide(by[rows], data), data)
        worst = max(worst, max(loads) * data / sum(loads))
    return worst


def _loads(work: Tensor, owners: Tensor, data: int) -> list[int]:
    loads: list[int] = torch.zeros(data, dtype=torch.int64).index_add_(0, owners, work).tolist()
    return loads
