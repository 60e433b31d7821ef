"""How a Megatron parameter is made of Hugging Face tensors: one class a way of cutting, each with both directions.

`cut` takes what this tensor-parallel rank holds from whole Hugging Face tensors (or slices of a file: only the needed
part is read); `join` makes the Hugging Face tensors from the shards of all tensor ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tempo.models.parallel import padded_vocab


class Cut(Protocol):
    """A way of cutting. `sources` are whole tensors or file slices that index like them."""

    def cut(self, sources: Sequence[Any], rank: int, size: int) -> Tensor: ...

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]: ...


@dataclass(frozen=True, slots=True)
class Whole:
    """The same on every tensor rank: norms, the value head."""

    def cut(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        return sources[0][:]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True, slots=True)
class Columns:
    """Cut by the second dimension: the inputs of row-parallel layers."""

    width: int

    def cut(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        part = self.width // size
        return sources[0][:, rank * part : (rank + 1) * part]

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards), dim=1)]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Cut by rows, with zero rows behind the vocabulary so that every rank has as many."""

    vocab: int

    def cut(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        part = padded_vocab(self.vocab, size) // size
        rows = sources[0][min(rank * part, self.vocab) : min((rank + 1) * part, self.vocab)]
        return torch.cat([rows, rows.new_zeros(part - rows.shape[0], *rows.shape[1:])])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat(list(shards))[: self.vocab]]


@dataclass(frozen=True, slots=True)
class GateUp:
    """Gate and up projection; each rank holds its rows of the gate, then its rows of the up projection."""

    ffn: int

    def cut(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        part = self.ffn // size
        return torch.cat([source[rank * part : (rank + 1) * part] for source in sources])

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in (0, 1)]


@dataclass(frozen=True, slots=True)
class QueryKeyValue:
    """Query, key and value projection, interleaved by group: the group's query heads, its key head, its value head."""

    heads: int
    groups: int
    head_dim: int

    def cut(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        part = self.groups // size

        def rows(source: Any, heads_per_group: int) -> Tensor:
            span = part * heads_per_group * self.head_dim
            return source[rank * span : (rank + 1) * span].unflatten(0, (part, heads_per_group * self.head_dim))

        query, key, value = sources
        return torch.cat([rows(query, self.heads // self.groups), rows(key, 1), rows(value, 1)], dim=1).flatten(0, 1)

    def join(self, shards: Sequence[Tensor]) -> list[Tensor]:
        sizes = [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]
        parts = [shard.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1) for shard in shards]
        return [torch.cat([part[i].flatten(0, 1) for part in parts]) for i in range(3)]


@dataclass(frozen=True, slots=True)
class Slot:
    """One Megatron parameter, the Hugging Face tensors it is made of with their shapes, and the stage that has it.

    >>> Slot("decoder.layers.0.mlp.linear_fc2.weight", ("model.layers.18.mlp.down_proj.weight",), ((4096, 12288),),
    ...      Columns(12288), stage=1)
    """

    megatron: str  # the name on its pipeline stage, where layers count from 0
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    cut: Cut
    stage: int

    @property
    def numel(self) -> int:
        """Elements of the whole tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)
