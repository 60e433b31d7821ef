"""Streams the weights of a Megatron model as buckets of (Hugging Face name, tensor), for weight sync and export.

All ranks compute the same plan from the model's shape and the layout, without communication (`pieces.py`). A bucket
holds the tensors of some mappings of one pipeline stage, as views of one flat tensor. While a bucket is made, a rank
holds at most one more bucket of received shards. So it needs at most two buckets in addition to its own shards. A
tensor that is larger than a bucket arrives in parts if the consumer asks for parts. Otherwise its bucket is as large as
it is, and the received shards are still at most one bucket. A bucket that the consumer keeps adds to that; a `for`
loop's variable keeps one until the next bucket arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
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
        with layout.groups.current():
            self._tensor_ranks = parallel_state.get_tensor_model_parallel_group()
            self._stages = parallel_state.get_pipeline_model_parallel_group()
        # Of `from_stages(shared=True)`, created by its first call, for buckets with parts and without.
        self._buffers: dict[bool, list[Tensor]] = {}

    @property
    def sends(self) -> bool:
        """Whether this rank is the one of its stage and copy that gets buckets in `from_stages`: tensor rank 0."""
        return self._layout.tensor_rank == 0

    @property
    def copies(self) -> int:
        """Groups of ranks that hold the whole model."""
        return self._layout.copies

    @property
    def copy(self) -> int:
        """The number of this rank's copy."""
        return self._layout.copy

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        """The whole model on every rank, on the model's device. `parts`: a large tensor arrives in parts."""
        self._load_model()
        for bucket in self._buckets[parts]:
            yield self._gather_on_all(bucket)

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        """Each pipeline stage's own weights, on the one rank of it that `sends`, independently of the other stages.

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
        share = share or Share(taken=(0,) if self._layout.is_first_copy else ())
        stage = [bucket for bucket in self._buckets[parts] if bucket.stage == self._layout.pipeline_rank]
        numbers = dealt(stage, share.count)
        buckets = [bucket for bucket, number in zip(stage, numbers, strict=True) if number in share.taken]
        if buckets and shared and self._device.type == "cpu":
            self._share_memory(max(bucket.numel for bucket in stage), parts, senders * self._layout.pipeline)
            yield from self._from_shared_memory(buckets, self._buffers[parts])
        else:
            yield from self._from_messages(buckets, shared=shared)

    def _from_messages(self, buckets: list[PlannedBucket], *, shared: bool) -> Iterator[Bucket]:
        for bucket in buckets:
            if self.sends:
                yield self._gather_on_sender(bucket, shared=shared)
            else:
                self._send(bucket)

    def _share_memory(self, size: int, parts: bool, senders: int) -> None:
        """Make the buffers, of `size` elements, if they are not there. `senders`: which make some on this machine."""
        if parts not in self._buffers:
            storages = shared_buffers(2, size * self._dtype.itemsize, self._tensor_ranks, senders)
            self._buffers[parts] = [torch.empty(0, dtype=self._dtype).set_(storage) for storage in storages]

    def _from_shared_memory(self, buckets: list[PlannedBucket], buffers: list[Tensor]) -> Iterator[Bucket]:
        for number, bucket in enumerate(buckets):
            flat = buffers[number % 2]
            dist.barrier(self._tensor_ranks)  # the consumer is done with what the buffer held
            self._place_own(bucket, flat, replicated=self.sends)
            dist.barrier(self._tensor_ranks)  # every rank has written its parts
            if self.sends:
                yield bucket.filled(flat)

    @torch.no_grad()
    def _gather_on_all(self, bucket: PlannedBucket) -> Bucket:
        """A bucket on every rank: its stage's tensor ranks exchange their shards, then send it to the other stages."""
        layout, flat = self._layout, self._empty(bucket.numel)
        if layout.pipeline_rank == bucket.stage:
            self._place_own(bucket, flat, replicated=True)
            for message in self._sharded(bucket, flat):
                for rank in range(layout.tensor):
                    self._exchange(message, rank)
        if layout.pipeline > 1:
            dist.broadcast(flat, group=self._stages, group_src=bucket.stage)
        return bucket.filled(flat)

    def _exchange(self, message: Message, rank: int) -> None:
        """Broadcast what tensor rank `rank` holds of a message's pieces to the other tensor ranks."""
        mine = rank == self._layout.tensor_rank
        if not self._held(message, rank):
            return
        packed = self._pack(message) if mine else self._empty(self._held(message, rank))
        dist.broadcast(packed, group=self._tensor_ranks, group_src=rank)
        if not mine:
            self._unpack(packed, message, rank)

    @torch.no_grad()
    def _gather_on_sender(self, bucket: PlannedBucket, *, shared: bool) -> Bucket:
        """A bucket on the sender: its own shards, and messages from the other tensor ranks."""
        flat = flat_buffer(bucket.numel, self._dtype, self._device, shared=shared)
        messages = list(self._sharded(bucket, flat))
        if not messages:
            self._place_own(bucket, flat, replicated=True)
        for number, message in enumerate(messages):
            self._receive(message, partial(self._place_own, bucket, flat, replicated=True) if number == 0 else None)
        return bucket.filled(flat)

    def _receive(self, message: Message, meanwhile: Callable[[], None] | None) -> None:
        """Receive what the other tensor ranks hold of a message's pieces. `meanwhile` is called before it is here."""
        held = {rank: self._held(message, rank) for rank in range(1, self._layout.tensor)}
        packed = {rank: self._empty(size) for rank, size in held.items() if size}
        works = _messages(dist.irecv, packed, self._tensor_ranks)
        if meanwhile is not None:
            meanwhile()
        _wait(works)
        for rank, received in packed.items():
            self._unpack(received, message, rank)

    @torch.no_grad()
    def _send(self, bucket: PlannedBucket) -> None:
        """Send this rank's shards of a bucket to the sender."""
        for message in self._sharded(bucket, self._empty(0)):
            if self._held(message, self._layout.tensor_rank):
                _wait(_messages(dist.isend, {0: self._pack(message)}, self._tensor_ranks))

    def _sharded(self, bucket: PlannedBucket, flat: Tensor) -> Iterator[Message]:
        """The messages of a bucket: the pieces that are sharded over the tensor ranks, and their places in `flat`."""
        if self._layout.tensor > 1:
            for message in bucket.placed(flat):
                if sharded := [(piece, place) for piece, place in message if is_sharded(piece)]:
                    yield sharded

    @torch.no_grad()
    def _place_own(self, bucket: PlannedBucket, flat: Tensor, *, replicated: bool) -> None:
        """Copy this rank's shards to their places in `flat`, with or without what every tensor rank holds."""
        progress_marker.mark()
        for message in bucket.placed(flat):
            for piece, place in message:
                if replicated or is_sharded(piece):
                    piece.place(self._shard(piece), place, self._layout.tensor_rank, self._layout.tensor)

    def _unpack(self, packed: Tensor, message: Message, rank: int) -> None:
        parts = packed.split([piece.held(self._shard(piece), rank, self._layout.tensor) for piece, _ in message])
        for (piece, place), part in zip(message, parts, strict=True):
            piece.unpack(part, place, self._shard(piece), rank, self._layout.tensor)

    def _pack(self, message: Message) -> Tensor:
        """What this rank holds of a message's pieces, concatenated: [sum of their sizes]."""
        rank, size = self._layout.tensor_rank, self._layout.tensor
        packed = self._empty(self._held(message, rank))
        sizes = [piece.held(self._shard(piece), rank, size) for piece, _ in message]
        for (piece, _), part in zip(message, packed.split(sizes), strict=True):
            piece.pack(self._shard(piece), part, rank, size)
        return packed

    def _held(self, message: Message, rank: int) -> int:
        return sum(piece.held(self._shard(piece), rank, self._layout.tensor) for piece, _ in message)

    def _shard(self, piece: BucketPiece) -> Tensor:
        """This rank's parameter. A mapping's shards have the same shape on every rank."""
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
