"""Context parallelism: how the ranks of a context group share the tokens of a packed micro-batch.

The S tokens are cut into 2c blocks, and rank r of c takes blocks r and 2c - 1 - r: early tokens, which see few others,
and late ones, which see many, so that all ranks have about the same work. A rank has the queries of its tokens and is
given the keys and values of all. What is read of the network's outputs is joined again, and every rank reckons the
whole loss; the gradient of its own outputs then flows into its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sequence that lie side by side on a rank, and the keys that the last of them sees."""

    queries: slice  # among the rank's S / c tokens
    keys: slice  # among all S: from the sequence's first token to the piece's last


@dataclass(frozen=True, slots=True)
class ContextShard:
    """The tokens of one context rank.

    >>> ContextShard.of(total=8, rank=1, ranks=2).tokens
    tensor([2, 3, 4, 5])
    """

    rank: int
    ranks: int
    block: int  # tokens of a block, S / 2c
    tokens: Tensor  # int64 [S / c]: which of all S

    @classmethod
    def of(cls, total: int, rank: int, ranks: int) -> ContextShard:
        """Of `total` tokens, a multiple of 2 * `ranks`; a single rank takes all."""
        if ranks == 1:
            return cls(rank, ranks, total, torch.arange(total))
        block = total // (2 * ranks)
        starts = (rank * block, (2 * ranks - 1 - rank) * block)
        return cls(rank, ranks, block, torch.cat([torch.arange(start, start + block) for start in starts]))

    def places(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of these tokens of all S, int64 [m]: the ranks that have them, and their places among those ranks' own."""
        block, within = tokens // self.block, tokens % self.block
        late = block >= self.ranks
        return torch.where(late, 2 * self.ranks - 1 - block, block), within + late * self.block

    def pieces(self, lengths: list[int]) -> tuple[Piece, ...]:
        """This rank's tokens by sequence; `lengths` are those of the sequences, S in all."""
        pieces, at = [], 0
        for start in (int(self.tokens[0]), int(self.tokens[self.block])):
            first = 0
            for length in lengths:
                begin, end = max(first, start), min(first + length, start + self.block)
                if begin < end:
                    pieces.append(Piece(slice(at, at + end - begin), slice(first, end)))
                    at += end - begin
                first += length
        return tuple(pieces)


@dataclass(frozen=True, slots=True)
class Outputs:
    """The R tokens of a micro-batch at which the network's output is read."""

    mine: Tensor  # int64 [w]: their places among this rank's tokens; w is the largest of a rank, filled up with place 0
    order: Tensor | None  # int64 [R]: where each is among all ranks' w, one rank behind the other; none: a single rank
    targets: Tensor  # int64 [w]: what they are to predict, 0 where there is nothing to

    @classmethod
    def of(cls, shard: ContextShard, tokens: Tensor, targets: Tensor, device: torch.device) -> Outputs:
        """`tokens` are the R among all S, `targets` their targets: int64 [R] both."""
        if shard.ranks == 1:
            return cls(tokens.to(device), None, targets.to(device))
        owners, places = shard.places(tokens)
        own = [(owners == rank).nonzero().flatten() for rank in range(shard.ranks)]
        width = max(len(rows) for rows in own)
        order = torch.empty_like(tokens)
        for rank, rows in enumerate(own):
            order[rows] = rank * width + torch.arange(len(rows))
        rows = own[shard.rank]

        def filled(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x[rows], (0, width - len(rows))).to(device)

        return cls(filled(places), order.to(device), filled(targets))

    def joined(self, outputs: Tensor) -> Tensor:
        """This rank's outputs [w, ...] -> those of all ranks in the tokens' order, [R, ...]."""
        if self.order is None or len(self.mine) == 0:
            return outputs
        group = parallel_state.get_context_parallel_group()
        return gather_from_sequence_parallel_region(outputs, tensor_parallel_output_grad=False, group=group)[self.order]


def of_all_ranks(x: Tensor, order: Tensor) -> Tensor:
    """A tensor by tokens [S / c, ...] -> by all tokens in their order [S, ...]; the gradients of all ranks are summed.

    `order` is int64 [S]: where each token is among the ranks' tokens, one rank behind the other.
    """
    return gather_from_sequence_parallel_region(x, group=parallel_state.get_context_parallel_group())[order]
