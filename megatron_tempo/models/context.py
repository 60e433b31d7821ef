"""Context parallelism: how the ranks of a context group share the tokens of a packed micro-batch.

The S tokens are divided into 2c blocks. Rank r of c takes blocks r and 2c - 1 - r. Early tokens attend to few others,
late tokens to many, so all ranks have about the same work. A rank computes the queries of its own tokens and gathers
the keys and values of all tokens. The outputs that the loss reads are gathered too, so every rank computes the whole
loss. The gradient of a rank's own outputs flows into its own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive tokens of one sequence on a rank, and the keys that the last of them attends to."""

    queries: slice  # indices in the rank's S / c tokens
    keys: slice  # indices in all S tokens: from the first token of the sequence to the last of the piece


@dataclass(frozen=True, slots=True)
class ContextShard:
    """The tokens of one context rank.

    >>> ContextShard.of(total=8, rank=1, ranks=2).tokens
    tensor([2, 3, 4, 5])
    """

    rank: int
    ranks: int
    block: int  # tokens of a block, S / 2c
    tokens: Tensor  # int64 [S / c]: their indices in all S tokens

    @classmethod
    def of(cls, total: int, rank: int, ranks: int) -> ContextShard:
        """The shard of `total` tokens, a multiple of 2 * `ranks`. A single rank takes all tokens."""
        if ranks == 1:
            return cls(rank, ranks, total, torch.arange(total))
        block = total // (2 * ranks)
        starts = (rank * block, (2 * ranks - 1 - rank) * block)
        return cls(rank, ranks, block, torch.cat([torch.arange(start, start + block) for start in starts]))

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The rank that has each of these tokens (int64 [m], indices in all S), and its index on that rank."""
        block, within = tokens // self.block, tokens % self.block
        late = block >= self.ranks
        return torch.where(late, 2 * self.ranks - 1 - block, block), within + late * self.block

    def pieces(self, lengths: list[int]) -> tuple[Piece, ...]:
        """This rank's tokens by sequence. `lengths`: of all sequences, S in total."""
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
    """The R tokens of a micro-batch whose outputs are read."""

    local: Tensor  # int64 [w]: their indices in this rank's tokens; w is the maximum over ranks, padded with 0
    order: Tensor | None  # int64 [R]: index of each in the ranks' concatenated w tokens. None if there is one rank
    targets: Tensor  # int64 [w]: the tokens that they predict, 0 if none

    @classmethod
    def of(cls, shard: ContextShard, tokens: Tensor, targets: Tensor, device: torch.device) -> Outputs:
        """`tokens`: the R indices in all S tokens. `targets`: their targets. Both int64 [R]."""
        if shard.ranks == 1:
            return cls(tokens.to(device), None, targets.to(device))
        owners, indices = shard.locate(tokens)
        own = [(owners == rank).nonzero().flatten() for rank in range(shard.ranks)]
        width = max(len(rows) for rows in own)
        order = torch.empty_like(tokens)
        for rank, rows in enumerate(own):
            order[rows] = rank * width + torch.arange(len(rows))
        rows = own[shard.rank]

        def filled(x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x[rows], (0, width - len(rows))).to(device)

        return cls(filled(indices), order.to(device), filled(targets))

    def gather(self, outputs: Tensor, group: dist.ProcessGroup) -> Tensor:
        """This rank's outputs [w, ...] -> the outputs of all context ranks, in the order of the tokens: [R, ...]."""
        if self.order is None or len(self.local) == 0:
            return outputs
        return gather_from_sequence_parallel_region(outputs, tensor_parallel_output_grad=False, group=group)[self.order]


def gather_tokens(x: Tensor, order: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Gather this rank's tokens [S / c, ...] -> all tokens in order [S, ...]. Gradients of all ranks are summed.

    `order`: int64 [S], the index of each token in the concatenation of the ranks' tokens. `group`: the context ranks.
    """
    return gather_from_sequence_parallel_region(x, group=group)[order]
