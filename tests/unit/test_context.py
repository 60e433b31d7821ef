"""How context ranks shard tokens, and the attention of a shard, against an attention over all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_tempo.models.attention import _last_queries
from megatron_tempo.models.context import ContextShard, Outputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_token_has_one_place(ranks: int) -> None:
    total = 12 * ranks
    shards = [ContextShard.of(total, rank, ranks) for rank in range(ranks)]
    assert sorted(t for shard in shards for t in shard.tokens.tolist()) == list(range(total))
    assert len({len(shard.tokens) for shard in shards}) == 1
    owners, places = shards[0].locate(torch.arange(total))
    for token, (owner, place) in enumerate(zip(owners.tolist(), places.tolist(), strict=True)):
        assert shards[owner].tokens[place] == token


def test_the_shares_of_causal_work_are_equal() -> None:
    work = [int((shard.tokens + 1).sum()) for shard in (ContextShard.of(64, rank, 4) for rank in range(4))]
    assert len(set(work)) == 1


@pytest.mark.parametrize("lengths", [[16], [1, 15], [5, 3, 8], [2] * 8, [7, 1, 1, 7]])
def test_pieces_are_a_ranks_tokens_with_all_before_them(lengths: list[int]) -> None:
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for rank in range(2):
        shard = ContextShard.of(16, rank, 2)
        pieces = shard.pieces(lengths)
        assert [i for piece in pieces for i in range(16)[piece.queries]] == list(range(8))
        for piece in pieces:
            tokens = shard.tokens[piece.queries].tolist()
            keys = list(range(16)[piece.keys])
            assert keys[0] in starts
            assert keys[-len(tokens) :] == tokens
            assert not any(start in keys[1:] for start in starts)


def test_outputs_come_back_in_their_order() -> None:
    """Four tokens on two ranks, three of them on one; the ranks' outputs are their tokens."""
    tokens, targets = torch.tensor([0, 1, 5, 14]), torch.tensor([10, 11, 12, 13])
    shards = [ContextShard.of(16, rank, 2) for rank in range(2)]
    outputs = [Outputs.of(shard, tokens, targets, CPU) for shard in shards]
    actual = torch.cat([shard.tokens[one.local] for shard, one in zip(shards, outputs, strict=True)])
    assert all(one.order is not None and actual[one.order].tolist() == tokens.tolist() for one in outputs)
    wanted = torch.cat([one.targets for one in outputs])
    assert wanted[outputs[0].order].tolist() == targets.tolist()


def plain(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Query by query, in float64."""
    n, m = query.shape[2], key.shape[2]
    rows = []
    for i in range(n):
        at = m - n + i
        seen = slice(0 if window is None else max(0, at - window + 1), at + 1)
        scores = (query[:, :, i : i + 1].double() @ key[:, :, seen].double().transpose(2, 3)) * scale
        rows.append(scores.softmax(-1) @ value[:, :, seen].double())
    return torch.cat(rows, dim=2)


@pytest.mark.parametrize("window", [None, 1, 3, 4, 40])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 9), (5, 5), (5, 9), (9, 20)])
def test_queries_that_are_the_last_tokens(queries: int, keys: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, size, 8, generator=generator) for size in (queries, keys, keys))
    actual = _last_queries(query, key, value, 0.3, window)
    assert (actual - plain(query, key, value, 0.3, window)).abs().max() < 1e-6
