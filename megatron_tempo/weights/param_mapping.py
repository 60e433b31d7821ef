"""Maps Megatron parameters to Hugging Face tensors, with one class for each kind of tensor-parallel sharding.

`shard` cuts a tensor-parallel rank's shard out of whole Hugging Face tensors, or out of slices of a file, of which it
reads only the part that it needs. `scatter` writes a rank's shard into whole Hugging Face tensors. They are complete
when the shards of all tensor ranks are scattered. `runs` says the same row by row, for a part of a tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tempo.config.sizes import padded_vocab
from megatron_tempo.models.parallel import Layout


@dataclass(frozen=True, slots=True)
class RowRun:
    """Consecutive rows of a whole tensor that are consecutive rows of a rank's shard.

    >>> RowRun(row=1024, shard_row=0, count=512)  # all columns
    """

    row: int  # the first one in the whole tensor
    shard_row: int  # and in the shard
    count: int
    columns: tuple[int, int] | None = None  # of the whole tensor, if the shard has only these


class TPSharding(Protocol):
    """A kind of tensor-parallel sharding. `sources`: whole tensors, or file slices that are indexed like tensors.

    The tensors that `scatter` writes to may have another type and device than the shard.
    """

    def shard(self, sources: Sequence[Any], rank: int, size: int) -> Tensor: ...

    def scatter(self, shard: Tensor, wholes: Sequence[Tensor], rank: int, size: int) -> None: ...

    def runs(self, tensor: int, rows: int, rank: int, size: int) -> list[RowRun]:
        """What a rank holds of the mapping's tensor number `tensor`, which has `rows` rows."""
        ...


@dataclass(frozen=True, slots=True)
class Replicated:
    """The same on every tensor rank: norms, the value head."""

    def shard(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        return sources[0][:]

    def scatter(self, shard: Tensor, wholes: Sequence[Tensor], rank: int, size: int) -> None:
        wholes[0].copy_(shard)

    def runs(self, tensor: int, rows: int, rank: int, size: int) -> list[RowRun]:
        return [RowRun(0, 0, rows)]


@dataclass(frozen=True, slots=True)
class ShardedDim0:
    """Sharded by the first dimension: a norm over all heads."""

    height: int

    def shard(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        part = self.height // size
        return sources[0][rank * part : (rank + 1) * part]

    def scatter(self, shard: Tensor, wholes: Sequence[Tensor], rank: int, size: int) -> None:
        part = self.height // size
        wholes[0][rank * part : (rank + 1) * part].copy_(shard)

    def runs(self, tensor: int, rows: int, rank: int, size: int) -> list[RowRun]:
        part = self.height // size
        return [RowRun(rank * part, 0, part)]


@dataclass(frozen=True, slots=True)
class ShardedDim1:
    """Sharded by the second dimension: the inputs of row-parallel layers."""

    width: int

    def shard(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        part = self.width // size
        return sources[0][:, rank * part : (rank + 1) * part]

    def scatter(self, shard: Tensor, wholes: Sequence[Tensor], rank: int, size: int) -> None:
        part = self.width // size
        wholes[0][:, rank * part : (rank + 1) * part].copy_(shard)

    def runs(self, tensor: int, rows: int, rank: int, size: int) -> list[RowRun]:
        part = self.width // size
        return [RowRun(0, 0, rows, (rank * part, (rank + 1) * part))]


@dataclass(frozen=True, slots=True)
class ShardedVocab:
    """Sharded by rows. Zero rows after the vocabulary give every rank the same number of rows."""

    vocab: int

    def shard(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        part = padded_vocab(self.vocab, size) // size
        rows = sources[0][min(rank * part, self.vocab) : min((rank + 1) * part, self.vocab)]
        return torch.cat([rows, rows.new_zeros(part - rows.shape[0], *rows.shape[1:])])

    def scatter(self, shard: Tensor, wholes: Sequence[Tensor], rank: int, size: int) -> None:
        part = padded_vocab(self.vocab, size) // size
        rows = wholes[0][rank * part : (rank + 1) * part]
        rows.copy_(shard[: len(rows)])

    def runs(self, tensor: int, rows: int, rank: int, size: int) -> list[RowRun]:
        part = padded_vocab(self.vocab, size) // size
        return [RowRun(rank * part, 0, max(0, min(part, self.vocab - rank * part)))]


@dataclass(frozen=True, slots=True)
class ShardedGateUp:
    """Gate and up projection; each rank holds its rows of the gate, then its rows of the up projection."""

    ffn: int

    def shard(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        part = self.ffn // size
        return torch.cat([source[rank * part : (rank + 1) * part] for source in sources])

    def scatter(self, shard: Tensor, wholes: Sequence[Tensor], rank: int, size: int) -> None:
        part = self.ffn // size
        for whole, half in zip(wholes, shard.chunk(2), strict=True):
            whole[rank * part : (rank + 1) * part].copy_(half)

    def runs(self, tensor: int, rows: int, rank: int, size: int) -> list[RowRun]:
        part = self.ffn // size
        return [RowRun(rank * part, tensor * part, part)]


@dataclass(frozen=True, slots=True)
class ShardedQKV:
    """Query, key and value projection, interleaved by group: the group's query heads, its key head, its value head."""

    heads: int
    groups: int
    head_dim: int

    def shard(self, sources: Sequence[Any], rank: int, size: int) -> Tensor:
        return torch.cat(self._by_group(sources, rank, size), dim=1).flatten(0, 1)

    def scatter(self, shard: Tensor, wholes: Sequence[Tensor], rank: int, size: int) -> None:
        targets = self._by_group(wholes, rank, size)
        parts = shard.unflatten(0, (self.groups // size, -1)).split([target.shape[1] for target in targets], dim=1)
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part)

    def _by_group(self, sources: Sequence[Any], rank: int, size: int) -> list[Tensor]:
        """This rank's rows of query, key and value, each [groups of the rank, rows of a group, hidden]."""
        part = self.groups // size
        parts = []
        for source, heads_per_group in zip(sources, (self.heads // self.groups, 1, 1), strict=True):
            span = part * heads_per_group * self.head_dim
            parts.append(source[rank * span : (rank + 1) * span].unflatten(0, (part, -1)))
        return parts

    def runs(self, tensor: int, rows: int, rank: int, size: int) -> list[RowRun]:
        counts = [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]  # rows of a group
        part, before = self.groups // size, sum(counts[:tensor])
        return [
            RowRun((rank * part + group) * counts[tensor], group * sum(counts) + before, counts[tensor])
            for group in range(part)
        ]


@dataclass(frozen=True, slots=True)
class ParamMapping:
    """A Megatron parameter, its Hugging Face tensors with their shapes, and the ranks that have it.

    A dense parameter is on all ranks of its pipeline stage, cut over the tensor ranks. An expert's is on the ranks of
    its stage with `expert_rank`, cut over the expert tensor ranks.

    >>> ParamMapping("decoder.layers.0.mlp.linear_fc2.weight", ("model.layers.18.mlp.down_proj.weight",),
    ...      ((4096, 12288),), ShardedDim1(12288), stage=1)
    """

    # The name on its pipeline stage, which counts the layers of all its chunks from 0. An expert rank counts its own
    # experts from 0 too: decoder.layers.0.mlp.experts.3.linear_fc1.weight
    megatron: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    sharding: TPSharding
    stage: int
    expert_rank: int | None = None  # None: no expert's parameter

    @property
    def numel(self) -> int:
        """Elements of the whole tensors."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)


def is_of_expert(megatron: str) -> bool:
    """Whether a Megatron parameter of this name, or a checkpoint's key, is of a mixture's experts."""
    return ".mlp.experts." in megatron


def is_held(mapping: ParamMapping, layout: Layout) -> bool:
    """Whether this rank holds a part of a mapping's tensors."""
    return mapping.stage == layout.pipeline_rank and mapping.expert_rank in (None, layout.expert_rank)


def tensor_part(mapping: ParamMapping, layout: Layout) -> tuple[int, int]:
    """Which of how many parts of a mapping's tensors this rank holds, if it holds any."""
    if mapping.expert_rank is None:
        return layout.tensor_rank, layout.tensor
    return layout.expert_tensor_rank, layout.expert_tensor


@dataclass(frozen=True, slots=True)
class Norm:
    """A norm of a layer, by its names in the layer.

    >>> Norm("pre_mlp_layernorm", "post_attention_layernorm", 4096, Replicated())
    """

    megatron: str
    name: str
    size: int
    sharding: TPSharding
