"""Packs the rows of a batch into micro-batches of bounded length, with almost no padding."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heapreplace

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.sizes import GRID_SLACK
from megatron_tempo.kernels.rows import Rows
from megatron_tempo.models.context import ContextShard, Outputs, Piece
from megatron_tempo.models.grid import Grid, like_lengths
from megatron_tempo.models.parallel import Layout
from megatron_tempo.models.routing import RoutedTokens
from megatron_tempo.types import UNKNOWN_EXPERT, Batch, ranges

BALANCED = 0.005  # `divide` stops to swap rows once no rank has more than this share above the mean


@dataclass(kw_only=True)
class Packing(PackedSeqParams):
    """The sequences of a micro-batch, for the attention.

    Megatron passes this object through to the core attention. Its `qkv_format` is "sbhd": one row of all tokens. The
    rotary embedding gets each token's position, so only the attention needs the boundaries of sequences.

    `cu_seqlens_q`, `cu_seqlens_kv`: int32 [sequences + 1], the start of each sequence and the end of the last one.
    `grids`: the rows in the order of their tokens, those of like length in one. Under context parallelism there are
    instead `pieces`, of this rank's tokens, and `order`: int64 [S], each token's index in the concatenation of the
    ranks' tokens. Transformer Engine's attention needs neither. `routed`: of this rank's tokens.

    `experts`: uint8 or int16 [tokens of this rank, layers of a chunk, k]: the experts that the engine chose, for the
    routers of a mixture of experts; None if they choose by themselves (see `router_replay`).
    """

    grids: tuple[Grid, ...] | None = None
    pieces: tuple[Piece, ...] | None = None
    order: Tensor | None = None
    routed: RoutedTokens = field(default_factory=RoutedTokens.none)  # for the routers of a mixture of experts
    experts: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RecordedChoices:
    """The experts that the engine chose for the tokens of a micro-batch that pass this rank's routers."""

    experts: Tensor  # uint8 or int16 [P + T, layers, k]: `Batch.experts`
    cells: Tensor  # int64 [t]: the place of each token there, -1 of padding

    def of_layers(self, layers: Sequence[int]) -> Tensor:
        """Of these layers: [t, layers, k], unknown for padding."""
        shape = (len(self.cells), len(layers), self.experts.shape[2])
        chosen = self.experts.new_full(shape, UNKNOWN_EXPERT[self.experts.itemsize])
        of_rows = self.cells >= 0
        chosen[of_rows] = self.experts[self.cells[of_rows]][:, layers]
        return chosen


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rows of a batch, packed: S tokens, the last `padding` of which belong to no row. A context rank has S / c.

    Rows of lengths 3 and 2, with one token of padding, S = 6:

    >>> MicroBatch(rows=[4, 7], tokens=[5, 6, 9, 7, 8, 0], positions=[0, 1, 2, 0, 1, 0], packing=..., padding=1, ...)
    """

    rows: Tensor  # int64 [m]: indices of the rows in the batch
    tokens: Tensor  # int64 [1, S / c]
    positions: Tensor  # int64 [S / c]: position of each token in its row
    packing: Packing
    padding: int
    response_rows: Rows  # the m rows' response tokens, R in total
    value_rows: Rows  # the m rows' values: one more than response tokens per row
    predicting: Outputs  # R: the tokens whose outputs predict the response tokens, row after row
    valued: Outputs  # R + m: the tokens where a critic's values are read: `predicting`, and each row's last token
    # Where they are in the flat tensors of the rows that the rank holds: response tokens in [T], values in [T + held]
    response_cells: Tensor  # int64 [R]
    value_cells: Tensor  # int64 [R + m]
    choices: RecordedChoices | None = None  # of the routers of a mixture of experts, where they are replayed


def row_work(lengths: Tensor, shape: ModelShape, outputs: Tensor | None = None) -> Tensor:
    """Multiply-adds of a forward pass over each row: int64 [n]. A backward pass costs twice that, so shares are equal.

    A token costs one for each number of the matrices that it passes in all layers (`ModelShape.token_matrices`). A pair
    of tokens that attend costs two products of the queries' width: a layer has about n^2 / 2 pairs, or n w - w^2 / 2
    with a window of w.

    `lengths`: int64 [n], tokens of each row. `outputs`: int64 [n], how many of them pass the output layer; None for a
    critic, which has none.
    """
    work = lengths * (shape.layers * shape.token_matrices)
    for window, layers in Counter(layer.window for layer in shape.attention).items():
        seen = lengths if window is None else lengths.clamp(max=window)
        work += layers * 2 * shape.queries * (lengths * seen - seen * (seen - 1) // 2)
    return work if outputs is None else work + outputs * (shape.hidden * shape.vocab)


def divide(work: Tensor, data: int) -> Tensor:
    """The data-parallel rank that computes each row, so that all ranks have about the same work: int64 [n].

    `work`: int64 [n]. Every rank computes the same division: rows go from the largest to the smallest, each to the rank
    with the least work so far. Then the ranks with the most and the least work swap rows while this helps.
    """
    loads = [(0, rank) for rank in range(data)]  # a heap
    ranks: list[list[int]] = [[] for _ in range(data)]
    amounts = work.tolist()
    for row in torch.argsort(work, descending=True, stable=True).tolist():
        load, rank = loads[0]
        ranks[rank].append(row)
        heapreplace(loads, (load + amounts[row], rank))
    mean = sum(amounts) / data
    for _ in range(data):
        (least, lightest), (most, heaviest) = min(loads), max(loads)
        if most <= (1 + BALANCED) * mean or not _swapped(ranks[heaviest], ranks[lightest], most - least, amounts):
            break
        changed = {rank: sum(amounts[row] for row in ranks[rank]) for rank in (lightest, heaviest)}
        loads = [(changed.get(rank, load), rank) for load, rank in loads]
    owners = torch.zeros(len(work), dtype=torch.int64)
    for rank, rows in enumerate(ranks):
        owners[rows] = rank
    return owners


def _swapped(heavy: list[int], light: list[int], gap: int, amounts: list[int]) -> bool:
    """Swap the two rows that leave the two ranks most alike, in place. False if no swap brings them closer."""
    pairs = itertools.product(range(len(heavy)), range(len(light)))
    apart = [(abs(gap - 2 * (amounts[heavy[i]] - amounts[light[j]])), i, j) for i, j in pairs]
    left, i, j = min(apart, default=(gap, 0, 0))
    if left >= gap:
        return False
    heavy[i], light[j] = light[j], heavy[i]
    return True


def row_owners(work: Tensor, order: Sequence[Tensor], data: int) -> Tensor:
    """The data-parallel rank of each row: int64 [n]. Each mini-batch is divided by work, and so are the other rows.

    `work`: int64 [n]. `order`: rows of each mini-batch, int64 each. If a row is in several, the last one counts.
    """
    owners = torch.full((len(work),), -1)
    for rows in order:
        owners[rows] = divide(work[rows], data)
    rest = (owners < 0).nonzero().flatten()
    owners[rest] = divide(work[rest], data)
    return owners


def divide_by_budget(lengths: Tensor, budget: int) -> list[Tensor]:
    """Indices 0..n-1 in groups of at most `budget` tokens, longest first. A row that is longer is a group of its own.

    Rows of similar length share a group. The attention's grids of a group, rows * longest row, have at most GRID_SLACK
    times the budget of cells.
    """
    groups: list[list[int]] = []
    tokens = longest = 0
    order = torch.argsort(lengths, descending=True, stable=True)
    for i, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        grid = longest * (len(groups[-1]) + 1) if groups else 0
        if not groups or tokens + length > budget or grid > GRID_SLACK * budget:
            groups.append([])
            tokens, longest = 0, length
        groups[-1].append(i)
        tokens += length
    return [torch.tensor(group, dtype=torch.int64) for group in groups]


def micro_batches(
    batch: Batch,
    rows: Tensor,
    layout: Layout,
    budget: int,
    device: torch.device,
    token_multiple: int = 1,
    *,
    with_grid: bool = True,
    at_least: int = 1,
    has_routers: bool = False,
    with_choices: bool = False,
) -> list[MicroBatch]:
    """The given rows of `batch`, which this rank holds, packed. Returns at least `at_least` micro-batches, if only of
    padding.

    The tokens of each rank, also under sequence parallelism, are padded to a multiple of `token_multiple`.
    `with_grid`: whether the attention works on the grids of `Packing`. `has_routers`: whether the model has mixtures of
    experts. `with_choices`: whether the recorded experts of the batch, if it has some, belong to it.
    """
    groups = divide_by_budget(batch.lengths[rows], budget)
    groups += [torch.zeros(0, dtype=torch.int64)] * (at_least - len(groups))
    multiple = token_multiple * (layout.tensor if layout.sequence_parallel else 1)
    multiple *= 2 * layout.context if layout.context > 1 else 1
    packed = [_pack(batch, rows[group], layout, multiple, device, with_grid=with_grid) for group in groups]
    for part in packed if has_routers else ():
        part.packing.routed = _routed_tokens(batch, part, layout)
    if not with_choices or batch.experts is None:
        return packed
    return [replace(part, choices=_choices(batch, part, layout)) for part in packed]


def _pack(
    batch: Batch,
    rows: Tensor,
    layout: Layout,
    multiple: int,
    device: torch.device,
    *,
    with_grid: bool,
) -> MicroBatch:
    lengths = batch.lengths[rows]
    prompts, responses = batch.prompt_lengths[rows], batch.response_lengths[rows]
    total = int(lengths.sum())
    padding = max(-total % multiple, multiple if total == 0 else 0)
    assert bool((batch.places[rows] >= 0).all()), "a rank packs rows that it holds"
    starts = lengths.cumsum(0) - lengths
    first = starts + prompts - 1
    predicting, valued = ranges(first, responses), ranges(first, responses + 1)
    response_cells = _cells(batch, rows, batch.response_lengths, 0)
    targets = batch.response_tokens[response_cells].long()
    tokens = torch.zeros(total + padding, dtype=torch.int64)
    tokens[ranges(starts, prompts)] = batch.prompt_tokens[_cells(batch, rows, batch.prompt_lengths, 0)].long()
    tokens[predicting + 1] = targets

    sequences = torch.cat([lengths, torch.full((1,), padding)]) if padding else lengths
    positions = ranges(torch.zeros_like(sequences), sequences)
    shard = ContextShard.of(total + padding, layout.context_rank, layout.context)
    if layout.context > 1:
        packing = _context_packing(sequences, shard, device)
    else:
        packing = _packing(sequences, device)
        if with_grid:
            packing.grids = _grids(lengths, padding, device)
    return MicroBatch(
        rows=rows,
        tokens=tokens[None, shard.tokens].to(device),
        positions=positions[shard.tokens].to(device),
        packing=packing,
        padding=padding,
        response_rows=Rows.of(responses, device),
        value_rows=Rows.of(responses + 1, device),
        predicting=Outputs.of(shard, predicting, targets, device),
        valued=Outputs.of(shard, valued, torch.zeros_like(valued), device),
        response_cells=response_cells,
        value_cells=value_cells(batch, rows),
    )


def _routed_tokens(batch: Batch, part: MicroBatch, layout: Layout) -> RoutedTokens:
    """The tokens of a micro-batch that pass this rank's routers."""
    total = int(batch.lengths[part.rows].sum())
    real = torch.arange(total + part.padding) < total
    return RoutedTokens(_routed(real, layout).to(part.tokens.device), total)


def _routed(of_tokens: Tensor, layout: Layout) -> Tensor:
    """Of numbers of a micro-batch's tokens, those of the tokens that pass this rank's routers: S / c of them or, in
    sequence parallelism, the tensor rank's consecutive share of these."""
    own = of_tokens[ContextShard.of(len(of_tokens), layout.context_rank, layout.context).tokens]
    return own.chunk(layout.tensor)[layout.tensor_rank] if layout.sequence_parallel else own


def _choices(batch: Batch, part: MicroBatch, layout: Layout) -> RecordedChoices:
    """The recorded experts of the tokens of a micro-batch that pass this rank's routers."""
    assert batch.experts is not None
    of_rows = _cells(batch, part.rows, batch.lengths, 0)
    cells = torch.cat([of_rows, torch.full((part.padding,), -1)])
    return RecordedChoices(batch.experts, _routed(cells, layout))


def value_cells(batch: Batch, rows: Tensor) -> Tensor:
    """The indices of the given rows' values in the flat tensor of the held rows' values: int64 [m] -> int64 [R + m]."""
    return _cells(batch, rows, batch.response_lengths, 1)


def _cells(batch: Batch, rows: Tensor, lengths: Tensor, more: int) -> Tensor:
    """Indices of the given rows' numbers in a flat tensor of the held rows: int64 [sum over the rows].

    `lengths`: int64 [n], of the rows of the batch. A row has as many numbers, and `more`.
    """
    counts = lengths[batch.held] + more
    starts = (counts.cumsum(0) - counts)[batch.places[rows]]
    return ranges(starts, lengths[rows] + more)


def _packing(sequences: Tensor, device: torch.device) -> Packing:
    longest = int(sequences.max())
    ends = torch.nn.functional.pad(sequences.cumsum(0), (1, 0)).to(device, torch.int32)
    return Packing(
        qkv_format="sbhd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def _grids(lengths: Tensor, padding: int, device: torch.device) -> tuple[Grid, ...]:
    """The grids of `Packing` for rows of these lengths, longest first, followed by `padding` tokens.

    Padding is not a row of a grid: nothing reads its output. Only if there are no rows is the padding the one row.
    """
    if len(lengths) == 0:
        lengths = torch.tensor([padding])
    return tuple(Grid.of(part, device) for part in lengths.split(like_lengths(lengths.tolist())))


def _context_packing(sequences: Tensor, shard: ContextShard, device: torch.device) -> Packing:
    longest = int(sequences.max())
    ranks, indices = shard.locate(torch.arange(int(sequences.sum())))
    return Packing(
        qkv_format="sbhd",
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        pieces=shard.pieces(sequences.tolist()),
        order=(ranks * len(shard.tokens) + indices).to(device),
    )
