"""How a model's mappings are divided into buckets, and a tensor that is larger than a bucket into parts.

A bucket is a flat tensor. A piece of it is a mapping, with its whole tensors one after another, or some rows of one
tensor. A message between ranks carries what one rank holds of one or more pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from megatron_tempo.types import Bucket, PartName
from megatron_tempo.weights.param_mapping import ParamMapping, Replicated, RowRun

# Rows of a part are a multiple of this if as many rows fit into a bucket.
_ROWS = 128
# And always of this: a part then begins at a multiple of four bytes, as checksums of a tensor's parts need.
EVEN = 2


def plan(mappings: list[ParamMapping], bucket_bytes: int, element_size: int) -> list[list[ParamMapping]]:
    """Divide the mappings, in order, into groups of one stage and at most `bucket_bytes`.

    A mapping that is larger is a group of its own.
    """
    groups: list[list[ParamMapping]] = []
    room = 0
    for mapping in mappings:
        size = mapping.numel * element_size
        if not groups or size > room or groups[-1][-1].stage != mapping.stage:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(mapping)
        room -= size
    return groups


class BucketPiece(Protocol):
    """A piece of a bucket. `flat`: its part of the bucket [numel]. `shard`: this rank's parameter of the mapping."""

    @property
    def mapping(self) -> ParamMapping: ...

    @property
    def numel(self) -> int: ...

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which they lie in the bucket."""
        ...

    def held(self, shard: Tensor, rank: int, size: int) -> int:
        """Elements that a tensor rank holds of it."""
        ...

    def pack(self, shard: Tensor, packed: Tensor, rank: int, size: int) -> None:
        """Copy what this rank holds to `packed` [held]."""
        ...

    def unpack(self, packed: Tensor, flat: Tensor, shard: Tensor, rank: int, size: int) -> None:
        """Copy what rank `rank` has packed to its place."""
        ...

    def place(self, shard: Tensor, flat: Tensor, rank: int, size: int) -> None:
        """Copy what this rank holds to its place."""
        ...


@dataclass(frozen=True, slots=True)
class WholeMapping:
    """A mapping with all its tensors."""

    mapping: ParamMapping

    @property
    def numel(self) -> int:
        return self.mapping.numel

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        return list(zip(self.mapping.names, self.mapping.shapes, strict=True))

    def held(self, shard: Tensor, rank: int, size: int) -> int:
        return shard.numel()

    def pack(self, shard: Tensor, packed: Tensor, rank: int, size: int) -> None:
        packed.view(shard.shape).copy_(shard)

    def unpack(self, packed: Tensor, flat: Tensor, shard: Tensor, rank: int, size: int) -> None:
        self.place(packed.view(shard.shape), flat, rank, size)

    def place(self, shard: Tensor, flat: Tensor, rank: int, size: int) -> None:
        self.mapping.sharding.scatter(shard, views(flat, list(self.mapping.shapes)), rank, size)


@dataclass(frozen=True, slots=True)
class TensorRows:
    """Rows `start` to `stop` of one of a mapping's tensors."""

    mapping: ParamMapping
    tensor: int  # its number among the mapping's tensors
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.mapping.shapes[self.tensor][1:])

    @property
    def numel(self) -> int:
        return prod(self.shape)

    def tensors(self) -> list[tuple[str, tuple[int, ...]]]:
        rows = self.mapping.shapes[self.tensor][0]
        return [(PartName(self.mapping.names[self.tensor], self.start, self.stop, rows), self.shape)]

    def held(self, shard: Tensor, rank: int, size: int) -> int:
        return sum(run.count for run in self._runs(rank, size)) * shard[:1].numel()

    def pack(self, shard: Tensor, packed: Tensor, rank: int, size: int) -> None:
        at = 0
        for run in self._runs(rank, size):
            rows = shard[run.shard_row : run.shard_row + run.count]
            packed[at : at + rows.numel()].view(rows.shape).copy_(rows)
            at += rows.numel()

    def unpack(self, packed: Tensor, flat: Tensor, shard: Tensor, rank: int, size: int) -> None:
        at = 0
        for run in self._runs(rank, size):
            place = self._place(flat, run)
            place.copy_(packed[at : at + place.numel()].view(place.shape))
            at += place.numel()

    def place(self, shard: Tensor, flat: Tensor, rank: int, size: int) -> None:
        for run in self._runs(rank, size):
            self._place(flat, run).copy_(shard[run.shard_row : run.shard_row + run.count])

    def _place(self, flat: Tensor, run: RowRun) -> Tensor:
        rows = flat.view(self.shape)[run.row - self.start : run.row - self.start + run.count]
        return rows if run.columns is None else rows[:, slice(*run.columns)]

    def _runs(self, rank: int, size: int) -> Iterator[RowRun]:
        """What a rank holds of these rows."""
        for run in self.mapping.sharding.runs(self.tensor, self.mapping.shapes[self.tensor][0], rank, size):
            first, last = max(run.row, self.start), min(run.row + run.count, self.stop)
            if first < last:
                yield RowRun(first, run.shard_row + first - run.row, last - first, run.columns)


@dataclass(frozen=True, slots=True)
class PlannedBucket:
    """A bucket of one stage and, if of experts, of one layer and expert rank: its pieces, by the message that carries
    them. A message is at most a bucket's bound."""

    messages: tuple[tuple[BucketPiece, ...], ...]
    wholes: tuple[ParamMapping, ...]  # the mappings whose tensors it has; none if it has a part of a tensor

    @property
    def stage(self) -> int:
        return self.messages[0][0].mapping.stage

    @property
    def expert_rank(self) -> int | None:
        """The rank whose experts' tensors it has; None if it has other tensors."""
        return self.messages[0][0].mapping.expert_rank

    @property
    def numel(self) -> int:
        return sum(piece.numel for message in self.messages for piece in message)

    def filled(self, flat: Tensor) -> Bucket:
        """The bucket's tensors as views of `flat` [at least numel]."""
        named = [pair for mapping in self.wholes for pair in WholeMapping(mapping).tensors()]
        named = named or [pair for message in self.messages for piece in message for pair in piece.tensors()]
        return list(zip((name for name, _ in named), views(flat, [shape for _, shape in named]), strict=True))

    def placed(self, flat: Tensor) -> Iterator[list[tuple[BucketPiece, Tensor]]]:
        """For each message, its pieces and their parts of `flat`."""
        at = 0
        for message in self.messages:
            pieces = []
            for piece in message:
                pieces.append((piece, flat[at : at + piece.numel]))
                at += piece.numel
            yield pieces


def planned_buckets(
    mappings: list[ParamMapping], bucket_bytes: int, element_size: int, *, parts: bool, multiple: int = EVEN
) -> list[PlannedBucket]:
    """The buckets of some mappings, each of one stage. Those of experts come last, each of one layer and expert rank.

    A mapping that is larger than `bucket_bytes` is divided into parts. With `parts`, each of them is a bucket. Without,
    the mapping is one bucket, and only the messages that fill it are bounded. `multiple`: the rows of a
    part are a multiple of it, and at least that.
    """
    planned = []
    for group in _groups(mappings, bucket_bytes, element_size):
        if sum(mapping.numel for mapping in group) * element_size <= bucket_bytes:
            planned.append(PlannedBucket((tuple(map(WholeMapping, group)),), tuple(group)))
            continue
        (mapping,) = group
        messages = tuple((piece,) for piece in _divided(mapping, bucket_bytes // element_size, multiple))
        planned += [PlannedBucket((one,), ()) for one in messages] if parts else [PlannedBucket(messages, (mapping,))]
    return planned


def _groups(mappings: list[ParamMapping], bucket_bytes: int, element_size: int) -> list[list[ParamMapping]]:
    """`plan` of the dense mappings, and of each layer's experts on each expert rank."""
    apart: dict[tuple[int, int, int], list[ParamMapping]] = {}
    for mapping in mappings:
        if mapping.expert_rank is not None:
            apart.setdefault((mapping.stage, _layer(mapping), mapping.expert_rank), []).append(mapping)
    dense = [mapping for mapping in mappings if mapping.expert_rank is None]
    return [group for of in (dense, *apart.values()) for group in plan(of, bucket_bytes, element_size)]


def _layer(mapping: ParamMapping) -> int:
    """The layer of an expert's mapping, as its stage counts."""
    return int(mapping.megatron.split(".")[2])


def dealt(buckets: Sequence[PlannedBucket], count: int) -> list[int]:
    """The share, 0 to `count` - 1, that each bucket belongs to. Shares are of about equal size.

    The parts of a mapping are in one share: a consumer gets them in order. So are the experts of a layer: vLLM keeps
    those that have arrived twice until all have. So one share can be larger than another by the largest bucket, divided
    mapping, or layer of experts.
    """
    units: dict[str, list[int]] = {}
    for number, bucket in enumerate(buckets):
        mapping = bucket.messages[0][0].mapping
        unit = mapping.megatron if mapping.expert_rank is None else f"experts of layer {_layer(mapping)}"
        units.setdefault(unit, []).append(number)
    sizes = {unit: sum(buckets[number].numel for number in numbers) for unit, numbers in units.items()}
    loads, shares = [0] * count, [0] * len(buckets)
    for unit in sorted(units, key=lambda unit: -sizes[unit]):
        least = loads.index(min(loads))
        loads[least] += sizes[unit]
        for number in units[unit]:
            shares[number] = least
    return shares


def _divided(mapping: ParamMapping, numel: int, multiple: int) -> Iterator[TensorRows]:
    """A mapping's tensors by rows, in parts of at most `numel` elements."""
    for tensor, (rows, *columns) in enumerate(mapping.shapes):
        count = numel // prod(columns)
        unit = _ROWS if count >= _ROWS else multiple
        step = max(multiple, count - count % unit)
        for start in range(0, rows, step):
            yield TensorRows(mapping, tensor, start, min(start + step, rows))


class JoinedParts:
    """Joins the parts of tensors that arrive in buckets."""

    def __init__(self, device: torch.device) -> None:
        """`device`: on which tensors are joined."""
        self._device = device
        self._begun: dict[str, Tensor] = {}

    def add(self, bucket: Bucket) -> Bucket:
        """The bucket's whole tensors, and those that are whole with its parts. Parts arrive in order."""
        whole: Bucket = []
        for name, tensor in bucket:
            if not isinstance(name, PartName):
                whole.append((name, tensor))
                continue
            if name.start == 0:
                shape = (name.rows, *tensor.shape[1:])
                self._begun[name.whole] = torch.empty(shape, dtype=tensor.dtype, device=self._device)
            self._begun[name.whole][name.start : name.stop].copy_(tensor)
            if name.stop == name.rows:
                whole.append((name.whole, self._begun.pop(name.whole)))
        return whole


def is_sharded(piece: BucketPiece) -> bool:
    """Whether tensor ranks hold different parts of it."""
    return not isinstance(piece.mapping.sharding, Replicated)


def views(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Consecutive views of a flat tensor, which is large enough for all of them."""
    ends = accumulate(map(prod, shapes), initial=0)
    return [flat[start:end].view(shape) for (start, end), shape in zip(pairwise(ends), shapes, strict=True)]
