"""Streams the weights of a Megatron model as buckets of (Hugging Face name, tensor), for weight sync and export.

All ranks compute the same plan from the model's shape and the layout, without communication (`pieces.py`). A bucket
holds the tensors of some mappings of one pipeline stage, as views of one flat tensor. While a bucket is made, a rank
holds at most one more bucket of received shards. So it needs at most two buckets in addition to its own shards. A
tensor that is larger than a bucket arrives in parts if the consumer asks for parts. Otherwise its bucket is as large as
it is, and the received shards are still at most one bucket. A bucket that the consumer keeps adds to that; a `for`
loop's variable keeps one until the next bucket arrives.

A mixture's experts are on other ranks than the dense weights: the ranks of a stage are laid out a second time for
them. A bucket has either. A copy of a stage is the fewest consecutive ranks that hold all of both, each a whole number
of times. In a copy each expert rank sends its own experts, and ranks that hold the same weights divide the sending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.models.chunks import ModelChunks
from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.parallel import Layout
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import Bucket, Share
from megatron_tempo.weights.param_mapping import ParamMapping
from megatron_tempo.weights.pieces import EVEN, BucketPiece, PlannedBucket, dealt, is_sharded, planned_buckets
from megatron_tempo.weights.shared_memory import flat_buffer, shared_buffers

# Pieces of a bucket, each with its place in the bucket's flat tensor.
Message = list[tuple[BucketPiece, Tensor]]


@dataclass(frozen=True, slots=True)
class Holders:
    """The ranks that together hold the tensors of a bucket, each a part: this rank's place among them, and their group.

    `copies` such groups are in this rank's copy of the stage, which divide the sending; this is number `copy`.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    copies: int
    copy: int


class WeightStream:
    """The current weights of a Megatron model, by their Hugging Face names, in buckets.

    All methods are collective: every rank must consume the whole stream.
    """

    def __init__(
        self,
        net: PackedGPT | ModelChunks,
        layout: Layout,
        mappings: list[ParamMapping],
        bucket_bytes: int,
        dtype: torch.dtype | None = None,
        load: Callable[[], None] = lambda: None,
        multiple: int = EVEN,
    ) -> None:
        """`dtype`: the type in which tensors are sent and yielded; None for the model's. `load` loads the model.

        `load` is called before a stream starts, because the model may be offloaded. `multiple`: the rows of a part of a
        tensor are a multiple of it.
        """
        self._parameters = net.weights()
        self._device = next(net.parameters()).device
        self._dtype = dtype or net.config.params_dtype
        self._layout = layout
        self._buckets = {
            parts: planned_buckets(mappings, bucket_bytes, self._dtype.itemsize, parts=parts, multiple=multiple)
            for parts in (False, True)
        }
        self._load_model = load
        self._has_experts = any(mapping.expert_rank is not None for mapping in mappings)
        of_experts = layout.expert_tensor * layout.expert if self._has_experts else 1
        self._ranks_of_copy = math.lcm(layout.tensor, of_experts)
        place = layout.rank_in_stage % self._ranks_of_copy
        groups, copies = layout.groups, self._ranks_of_copy // layout.tensor
        self._dense = Holders(layout.tensor_rank, layout.tensor, groups.tp, copies, place // layout.tensor)
        if self._has_experts:
            copies = self._ranks_of_copy // of_experts
            own = layout.expert_tensor_rank, layout.expert_tensor
            self._experts = Holders(*own, groups.expt_tp, copies, place // of_experts)
        # Of `from_stages(shared=True)`, created by its first call: by whether with parts, and whether of experts.
        self._buffers: dict[tuple[bool, bool], list[Tensor]] = {}

    @property
    def sends(self) -> bool:
        """Whether this rank gets buckets in `from_stages`: tensor rank 0, and of experts expert tensor rank 0."""
        return self._dense.rank == 0 or (self._has_experts and self._experts.rank == 0)

    @property
    def copies(self) -> int:
        """Groups of ranks that hold the whole model."""
        return self._layout.copies * self._layout.tensor // self._ranks_of_copy

    @property
    def copy(self) -> int:
        """The number of this rank's copy."""
        return self._layout.rank_in_stage // self._ranks_of_copy

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        """The whole model on every rank, on the model's device. `parts`: a large tensor arrives in parts."""
        self._load_model()
        for bucket in self._buckets[parts]:
            yield self._gather_on_all(bucket)

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        """Each pipeline stage's own weights, each on one of its ranks that `sends`, independently of the other stages.

        `share`: what this copy sends; it gathers no more, and independently of the other copies. Its ranks all give the
        same. None: the first copy sends everything, and the others nothing. The copy's other ranks take part and get
        nothing. `parts`: a tensor that is larger than a bucket arrives in parts.

        `shared` is for engines on the same machine. On a GPU, other processes open the tensors by CUDA handles, which
        the allocator must make possible. On a CPU, the tensors are then in memory that other processes map by its
        file's name. Two buffers are used in turn. When you request a bucket, every earlier one except the last may be
        overwritten; when you start a new stream, all may be. Raises InputError if /dev/shm has too little free space
        for the buffers.
        """
        self._load_model()
        senders = 1 if share is None else share.senders or self.copies
        share = share or Share(taken=(0,) if self.copy == 0 else ())
        stage = [bucket for bucket in self._buckets[parts] if bucket.stage == self._layout.pipeline_rank]
        numbers = dealt(stage, share.count)
        taken = [bucket for bucket, number in zip(stage, numbers, strict=True) if number in share.taken]
        # First the dense weights on all ranks, then the experts: no rank waits for one that waits for it.
        for of_experts in (False, True) if self._has_experts else (False,):
            buckets = self._own(taken, of_experts=of_experts)
            if buckets and shared and self._device.type == "cpu":
                size = max(bucket.numel for bucket in stage if (bucket.expert_rank is not None) == of_experts)
                buffers = self._shared_memory(size, parts, senders * self._layout.pipeline, of_experts=of_experts)
                yield from self._from_shared_memory(buckets, buffers)
            else:
                yield from self._from_messages(buckets, shared=shared)

    def _own(self, buckets: list[PlannedBucket], *, of_experts: bool) -> list[PlannedBucket]:
        """Those of a copy's buckets, dense or of experts, whose sending this rank has a part in."""
        of_kind = [bucket for bucket in buckets if (bucket.expert_rank is not None) == of_experts]
        if not of_kind:
            return []
        holders, numbers = self._holders(of_kind[0]), dealt(of_kind, self._holders(of_kind[0]).copies)
        mine = [bucket for bucket, number in zip(of_kind, numbers, strict=True) if number == holders.copy]
        return [bucket for bucket in mine if bucket.expert_rank in (None, self._layout.expert_rank)]

    def _holders(self, bucket: PlannedBucket) -> Holders:
        """The holders of a bucket's tensors that this rank is among, if it has a part of them."""
        return self._dense if bucket.expert_rank is None else self._experts

    def _from_messages(self, buckets: list[PlannedBucket], *, shared: bool) -> Iterator[Bucket]:
        for bucket in buckets:
            if self._holders(bucket).rank == 0:
                yield self._gather_on_sender(bucket, shared=shared)
            else:
                self._send(bucket)

    def _shared_memory(self, size: int, parts: bool, copies: int, *, of_experts: bool) -> list[Tensor]:
        """The buffers, of `size` elements. `copies`: of stages that send from this machine."""
        key = parts, of_experts
        if key not in self._buffers:
            holders = self._experts if of_experts else self._dense
            senders = copies * self._ranks_of_copy // holders.size
            storages = shared_buffers(2, size * self._dtype.itemsize, holders.group, senders)
            self._buffers[key] = [torch.empty(0, dtype=self._dtype).set_(storage) for storage in storages]
        return self._buffers[key]

    def _from_shared_memory(self, buckets: list[PlannedBucket], buffers: list[Tensor]) -> Iterator[Bucket]:
        for number, bucket in enumerate(buckets):
            flat, holders = buffers[number % 2], self._holders(bucket)
            dist.barrier(holders.group)  # the consumer is done with what the buffer held
            self._place_own(bucket, flat, replicated=holders.rank == 0)
            dist.barrier(holders.group)  # every rank has written its parts
            if holders.rank == 0:
                yield bucket.filled(flat)

    @torch.no_grad()
    def _gather_on_all(self, bucket: PlannedBucket) -> Bucket:
        """A bucket on every rank: the ranks of its stage exchange what they hold, then send it to the other stages."""
        layout, flat = self._layout, self._empty(bucket.numel)
        if layout.pipeline_rank == bucket.stage:
            holders, group, first = self._holders(bucket), self._dense.group, 0
            if bucket.expert_rank is not None:
                group, first = layout.groups.tp_ep, bucket.expert_rank * layout.expert_tensor
            if bucket.expert_rank in (None, layout.expert_rank):
                self._place_own(bucket, flat, replicated=True)
            if group.size() > 1:
                for message in self._sharded(bucket, flat):
                    for rank in range(holders.size):
                        self._exchange(message, rank, holders.size, group, first + rank)
        if layout.pipeline > 1:
            dist.broadcast(flat, group=layout.groups.pp, group_src=bucket.stage)
        return bucket.filled(flat)

    def _exchange(self, message: Message, rank: int, size: int, group: dist.ProcessGroup, source: int) -> None:
        """Broadcast what holder `rank` of `size` has of a message's pieces. `source`: its number in the group."""
        mine = dist.get_rank(group) == source
        if not (held := self._held(message, rank, size)):
            return
        packed = self._pack(message, rank, size) if mine else self._empty(held)
        dist.broadcast(packed, group=group, group_src=source)
        if not mine:
            self._unpack(packed, message, rank, size)

    @torch.no_grad()
    def _gather_on_sender(self, bucket: PlannedBucket, *, shared: bool) -> Bucket:
        """A bucket on the sender: its own shards, and messages from the other holders."""
        flat = flat_buffer(bucket.numel, self._dtype, self._device, shared=shared)
        holders = self._holders(bucket)
        messages = list(self._sharded(bucket, flat)) if holders.size > 1 else []
        if not messages:
            self._place_own(bucket, flat, replicated=True)
        for number, message in enumerate(messages):
            own = partial(self._place_own, bucket, flat, replicated=True) if number == 0 else None
            self._receive(message, holders, own)
        return bucket.filled(flat)

    def _receive(self, message: Message, holders: Holders, meanwhile: Callable[[], None] | None) -> None:
        """Receive what the other holders have of a message's pieces. `meanwhile` is called before it is here."""
        held = {rank: self._held(message, rank, holders.size) for rank in range(1, holders.size)}
        packed = {rank: self._empty(size) for rank, size in held.items() if size}
        works = _messages(dist.irecv, packed, holders.group)
        if meanwhile is not None:
            meanwhile()
        _wait(works)
        for rank, received in packed.items():
            self._unpack(received, message, rank, holders.size)

    @torch.no_grad()
    def _send(self, bucket: PlannedBucket) -> None:
        """Send this rank's shards of a bucket to the sender."""
        holders = self._holders(bucket)
        for message in self._sharded(bucket, self._empty(0)):
            if self._held(message, holders.rank, holders.size):
                packed = self._pack(message, holders.rank, holders.size)
                _wait(_messages(dist.isend, {0: packed}, holders.group))

    def _sharded(self, bucket: PlannedBucket, flat: Tensor) -> Iterator[Message]:
        """The messages of a bucket: the pieces of which its holders have different parts, and their places."""
        for message in bucket.placed(flat):
            if sharded := [(piece, place) for piece, place in message if is_sharded(piece)]:
                yield sharded

    @torch.no_grad()
    def _place_own(self, bucket: PlannedBucket, flat: Tensor, *, replicated: bool) -> None:
        """Copy this rank's shards to their places in `flat`, with or without what every tensor rank holds."""
        progress_marker.mark()
        holders = self._holders(bucket)
        for message in bucket.placed(flat):
            for piece, place in message:
                if replicated or is_sharded(piece):
                    piece.place(self._shard(piece), place, holders.rank, holders.size)

    def _unpack(self, packed: Tensor, message: Message, rank: int, size: int) -> None:
        parts = packed.split([piece.held(self._shard(piece), rank, size) for piece, _ in message])
        for (piece, place), part in zip(message, parts, strict=True):
            piece.unpack(part, place, self._shard(piece), rank, size)

    def _pack(self, message: Message, rank: int, size: int) -> Tensor:
        """What this rank, holder `rank` of `size`, has of a message's pieces, concatenated: [sum of their sizes]."""
        packed = self._empty(self._held(message, rank, size))
        sizes = [piece.held(self._shard(piece), rank, size) for piece, _ in message]
        for (piece, _), part in zip(message, packed.split(sizes), strict=True):
            piece.pack(self._shard(piece), part, rank, size)
        return packed

    def _held(self, message: Message, rank: int, size: int) -> int:
        return sum(piece.held(self._shard(piece), rank, size) for piece, _ in message)

    def _shard(self, piece: BucketPiece) -> Tensor:
        """This rank's parameter. A mapping's shards have the same shape on every rank, as have all experts."""
        return self._parameters[piece.mapping.megatron]

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self._dtype, device=self._device)


def _messages(kind: Callable[..., Any], tensors: dict[int, Tensor], group: dist.ProcessGroup) -> list[dist.Work]:
    """Start sending (`dist.isend`) or receiving (`dist.irecv`) one tensor for each of these ranks of a group."""
    messages = [dist.P2POp(kind, tensor, group=group, group_peer=rank) for rank, tensor in tensors.items()]
    return dist.batch_isend_irecv(messages) if messages else []


def _wait(messages: list[dist.Work]) -> None:
    for message in messages:
        message.wait()
