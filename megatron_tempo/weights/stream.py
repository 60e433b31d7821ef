"""Streams the weights of a Megatron model as buckets of (Hugging Face name, tensor), for weight sync and export.

All ranks compute the same plan from the model's shape and the layout, without communication. A bucket holds the tensors
of some mappings of one pipeline stage, as views of one flat tensor. While a bucket is made, a rank holds at most one
more bucket of received shards. So it needs at most two buckets in addition to its own shards. A bucket that the
consumer keeps adds to that; a `for` loop's variable keeps one until the next bucket arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.megatron_compat.torch_private import shareable_memory
from megatron_tempo.models.parallel import Layout
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import Bucket
from megatron_tempo.weights.param_mapping import ParamMapping, Replicated
from megatron_tempo.weights.shared_memory import shared_buffers

# Each mapping's Hugging Face tensors.
Wholes = dict[ParamMapping, list[Tensor]]


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


class WeightStream:
    """The current weights of a Megatron model, by their Hugging Face names, in buckets.

    All methods are collective: every rank must consume the whole stream.
    """

    def __init__(
        self,
        net: PackedGPT,
        layout: Layout,
        mappings: list[ParamMapping],
        bucket_bytes: int,
        dtype: torch.dtype | None = None,
        load: Callable[[], None] = lambda: None,
    ) -> None:
        """`dtype`: the type in which tensors are sent and yielded; None for the model's. `load` loads the model.

        `load` is called before a stream starts, because the model may be offloaded.
        """
        self._parameters = net.weights()
        self._device = next(net.parameters()).device
        self._dtype = dtype or net.config.params_dtype
        self._layout = layout
        self._groups = plan(mappings, bucket_bytes, self._dtype.itemsize)
        self._load_model = load
        with layout.groups.current():
            self._tensor_ranks = parallel_state.get_tensor_model_parallel_group()
            self._stages = parallel_state.get_pipeline_model_parallel_group()
        self._buffers: list[Tensor] = []  # of `from_stages(shared=True)`, created by its first call

    @property
    def sends(self) -> bool:
        """Whether this rank yields its stage's buckets in `from_stages`: tensor rank 0 of the first copy."""
        return self._layout.tensor_rank == 0 and self._layout.is_first_copy

    def everywhere(self) -> Iterator[Bucket]:
        """The whole model on every rank, on the model's device."""
        self._load_model()
        for group in self._groups:
            yield self._gather_on_all(group)

    def from_stages(self, *, shared: bool = False) -> Iterator[Bucket]:
        """Each pipeline stage's own weights, on the one rank of it that `sends`, independently of the other stages.

        The other ranks of the first copy take part and get nothing. Ranks of other copies do nothing.

        `shared` is for engines on the same machine. On a GPU, other processes open the tensors by CUDA handles, which
        the allocator must make possible. On a CPU, the tensors are then in memory that other processes map by its
        file's name. Two buffers are used in turn. When you request a bucket, every earlier one except the last may be
        overwritten; when you start a new stream, all may be. Raises InputError if /dev/shm has too little free space
        for the buffers.
        """
        self._load_model()
        if self._layout.is_first_copy:
            groups = [group for group in self._groups if group[0].stage == self._layout.pipeline_rank]
            mapped = shared and self._device.type == "cpu"
            yield from self._from_shared_memory(groups) if mapped else self._from_messages(groups, shared=shared)

    def _from_messages(self, groups: list[list[ParamMapping]], *, shared: bool) -> Iterator[Bucket]:
        for group in groups:
            if self.sends:
                yield self._gather_on_sender(group, shared=shared)
            else:
                self._send(group)

    def _from_shared_memory(self, groups: list[list[ParamMapping]]) -> Iterator[Bucket]:
        if not self._buffers:
            size = max(_numel(group) for group in groups)
            storages = shared_buffers(2, size * self._dtype.itemsize, self._tensor_ranks)
            self._buffers = [torch.empty(0, dtype=self._dtype).set_(storage) for storage in storages]
        for number, group in enumerate(groups):
            wholes = _wholes(group, self._buffers[number % 2])
            dist.barrier(self._tensor_ranks)  # the consumer is done with what the buffer held
            self._scatter_own(group if self.sends else self._sharded(group), wholes)
            dist.barrier(self._tensor_ranks)  # every rank has written its parts
            if self.sends:
                yield _bucket(wholes)

    @torch.no_grad()
    def _gather_on_all(self, group: list[ParamMapping]) -> Bucket:
        """A bucket on every rank: its stage's tensor ranks exchange their shards, then send it to the other stages."""
        layout, flat = self._layout, self._empty(_numel(group))
        wholes = _wholes(group, flat)
        if layout.pipeline_rank == group[0].stage:
            self._scatter_own(group, wholes)
            if sharded := self._sharded(group):
                for rank in range(layout.tensor):
                    self._exchange(sharded, wholes, rank)
        if layout.pipeline > 1:
            dist.broadcast(flat, group=self._stages, group_src=group[0].stage)
        return _bucket(wholes)

    def _exchange(self, sharded: list[ParamMapping], wholes: Wholes, rank: int) -> None:
        """Broadcast tensor rank `rank`'s shards to the other tensor ranks."""
        mine = rank == self._layout.tensor_rank
        packed = self._pack(sharded) if mine else self._empty(self._packed_size(sharded))
        dist.broadcast(packed, group=self._tensor_ranks, group_src=rank)
        if not mine:
            self._scatter_packed(packed, sharded, wholes, rank)

    @torch.no_grad()
    def _gather_on_sender(self, group: list[ParamMapping], *, shared: bool) -> Bucket:
        """A bucket on the sender: its own shards, and one message from each of the other tensor ranks."""
        with shareable_memory() if shared and self._device.type == "cuda" else nullcontext():
            wholes = _wholes(group, self._empty(_numel(group)))
        sharded = self._sharded(group)
        others = range(1, self._layout.tensor) if sharded else ()
        packed = {rank: self._empty(self._packed_size(sharded)) for rank in others}
        works = _messages(dist.irecv, packed, self._tensor_ranks)
        self._scatter_own(group, wholes)  # while the messages arrive
        _wait(works)
        for rank in others:
            self._scatter_packed(packed[rank], sharded, wholes, rank)
        return _bucket(wholes)

    @torch.no_grad()
    def _send(self, group: list[ParamMapping]) -> None:
        """Send this rank's shards of a bucket to the sender."""
        if sharded := self._sharded(group):
            _wait(_messages(dist.isend, {0: self._pack(sharded)}, self._tensor_ranks))

    def _sharded(self, group: list[ParamMapping]) -> list[ParamMapping]:
        """The mappings that are sharded over the tensor ranks."""
        return [
            mapping for mapping in group if self._layout.tensor > 1 and not isinstance(mapping.sharding, Replicated)
        ]

    @torch.no_grad()
    def _scatter_own(self, mappings: list[ParamMapping], wholes: Wholes) -> None:
        for mapping in mappings:
            shard = self._parameters[mapping.megatron]
            mapping.sharding.scatter(shard, wholes[mapping], self._layout.tensor_rank, self._layout.tensor)

    def _scatter_packed(self, packed: Tensor, mappings: list[ParamMapping], wholes: Wholes, rank: int) -> None:
        for mapping, shard in zip(mappings, self._unpack(packed, mappings), strict=True):
            mapping.sharding.scatter(shard, wholes[mapping], rank, self._layout.tensor)

    def _pack(self, mappings: list[ParamMapping]) -> Tensor:
        """This rank's shards, concatenated: [sum of their sizes]."""
        packed = self._empty(self._packed_size(mappings))
        for mapping, shard in zip(mappings, self._unpack(packed, mappings), strict=True):
            shard.copy_(self._parameters[mapping.megatron])
        return packed

    def _unpack(self, packed: Tensor, mappings: list[ParamMapping]) -> list[Tensor]:
        """Views of the shards in a packed tensor. A mapping's shards have the same shape on every rank."""
        shapes = [self._parameters[mapping.megatron].shape for mapping in mappings]
        parts = packed.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _packed_size(self, mappings: list[ParamMapping]) -> int:
        return sum(self._parameters[mapping.megatron].numel() for mapping in mappings)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self._dtype, device=self._device)


def _numel(group: list[ParamMapping]) -> int:
    return sum(mapping.numel for mapping in group)


def _wholes(group: list[ParamMapping], flat: Tensor) -> Wholes:
    """The tensors of a group as consecutive views of a flat tensor, which is large enough for all of them."""
    progress_marker.mark()
    wholes: Wholes = {}
    at = 0
    for mapping in group:
        wholes[mapping] = []
        for shape in mapping.shapes:
            size = torch.Size(shape).numel()
            wholes[mapping].append(flat[at : at + size].view(shape))
            at += size
    return wholes


def _bucket(wholes: Wholes) -> Bucket:
    return [pair for mapping, tensors in wholes.items() for pair in zip(mapping.names, tensors, strict=True)]


def _messages(kind: Callable[..., Any], tensors: dict[int, Tensor], group: dist.ProcessGroup) -> list[dist.Work]:
    """Start sending (`dist.isend`) or receiving (`dist.irecv`) one tensor for each of these ranks of a group."""
    messages = [dist.P2POp(kind, tensor, group=group, group_peer=rank) for rank, tensor in tensors.items()]
    return dist.batch_isend_irecv(messages) if messages else []


def _wait(messages: list[dist.Work]) -> None:
    for message in messages:
        message.wait()
