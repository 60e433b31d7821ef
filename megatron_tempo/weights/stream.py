"""Weights out of a Megatron model: streams of buckets of (Hugging Face name, tensor).

The plan is made from the model's shape and the layout alone, so it is the same on every rank without a word. A bucket
holds slots of one pipeline stage, and its tensors are views of one flat tensor. While it is made, a rank holds at most
as much again in parts on their way: no more than two buckets beyond its own shards. A bucket that the consumer keeps
comes on top, and the variable of a `for` keeps one until the next is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.parallel import Layout
from megatron_tempo.runtime import progress_marker
from megatron_tempo.types import Bucket
from megatron_tempo.weights.param_mapping import Slot, Whole
from megatron_tempo.weights.shared_memory import shared_buffers

# Each slot's Hugging Face tensors.
Wholes = dict[Slot, list[Tensor]]


def plan(slots: list[Slot], bucket_bytes: int, element_size: int) -> list[list[Slot]]:
    """Slots in order, in groups of one stage and at most `bucket_bytes`; a larger slot is a group alone."""
    groups: list[list[Slot]] = []
    room = 0
    for slot in slots:
        size = slot.numel * element_size
        if not groups or size > room or groups[-1][-1].stage != slot.stage:
            groups.append([])
            room = bucket_bytes
        groups[-1].append(slot)
        room -= size
    return groups


class WeightStream:
    """The weights of a Megatron model as they are now, by their Hugging Face names, in buckets.

    All methods are collective: every rank goes through the whole stream.
    """

    def __init__(
        self,
        net: PackedGPT,
        layout: Layout,
        slots: list[Slot],
        bucket_bytes: int,
        dtype: torch.dtype | None = None,
        bring: Callable[[], None] = lambda: None,
    ) -> None:
        """`dtype`: what the tensors travel and arrive in; none: the model's. `bring` has the model on its device."""
        self._parameters = net.weights()
        self._device = next(net.parameters()).device
        self._dtype = dtype or net.config.params_dtype
        self._layout = layout
        self._groups = plan(slots, bucket_bytes, self._dtype.itemsize)
        self._bring = bring
        with layout.groups.current():
            self._tensor_ranks = parallel_state.get_tensor_model_parallel_group()
            self._stages = parallel_state.get_pipeline_model_parallel_group()
        self._buffers: list[Tensor] = []  # of `from_stages(shared=True)`, from its first call on

    @property
    def sends(self) -> bool:
        """Whether this rank gives its stage's buckets in `from_stages`: tensor rank 0 of the first copy."""
        return self._layout.tensor_rank == 0 and self._layout.is_first_copy

    def everywhere(self) -> Iterator[Bucket]:
        """The whole model on every rank, on the model's device."""
        self._bring()
        for group in self._groups:
            yield self._everywhere(group)

    def from_stages(self, *, shared: bool = False) -> Iterator[Bucket]:
        """Each pipeline stage's own weights, on the one rank of it that `sends`, independently of the other stages.

        The other ranks of the first copy take part and get nothing; those of other copies have nothing to do.

        `shared` is for engines on the same machine. On a GPU it changes nothing: others open its memory by CUDA's
        handles. On a CPU the tensors then lie in memory that others map by its file's name. There are two buffers, used
        in turn: when you ask for the next bucket, all but the last one you got may be overwritten, and when you start
        again, all. Raises InputError if /dev/shm has too little room for them.
        """
        self._bring()
        if self._layout.is_first_copy:
            groups = [group for group in self._groups if group[0].stage == self._layout.pipeline_rank]
            mapped = shared and self._device.type == "cpu"
            yield from self._from_shared_memory(groups) if mapped else self._from_messages(groups)

    def _from_messages(self, groups: list[list[Slot]]) -> Iterator[Bucket]:
        for group in groups:
            if self.sends:
                yield self._gathered(group)
            else:
                self._send(group)

    def _from_shared_memory(self, groups: list[list[Slot]]) -> Iterator[Bucket]:
        if not self._buffers:
            size = max(_numel(group) for group in groups)
            storages = shared_buffers(2, size * self._dtype.itemsize, self._tensor_ranks)
            self._buffers = [torch.empty(0, dtype=self._dtype).set_(storage) for storage in storages]
        for number, group in enumerate(groups):
            wholes = _wholes(group, self._buffers[number % 2])
            dist.barrier(self._tensor_ranks)  # the consumer is done with what the buffer held
            self._place_own(group if self.sends else self._divided(group), wholes)
            dist.barrier(self._tensor_ranks)  # every rank's parts are there
            if self.sends:
                yield _bucket(wholes)

    @torch.no_grad()
    def _everywhere(self, group: list[Slot]) -> Bucket:
        """A bucket on every rank: exchanged by its stage's tensor ranks, then sent to the other stages."""
        layout, flat = self._layout, self._empty(_numel(group))
        wholes = _wholes(group, flat)
        if layout.pipeline_rank == group[0].stage:
            self._place_own(group, wholes)
            if divided := self._divided(group):
                for rank in range(layout.tensor):
                    self._exchange(divided, wholes, rank)
        if layout.pipeline > 1:
            dist.broadcast(flat, group=self._stages, group_src=group[0].stage)
        return _bucket(wholes)

    def _exchange(self, divided: list[Slot], wholes: Wholes, rank: int) -> None:
        """Give tensor rank `rank`'s shards to the other tensor ranks."""
        mine = rank == self._layout.tensor_rank
        packed = self._packed(divided) if mine else self._empty(self._packed_size(divided))
        dist.broadcast(packed, group=self._tensor_ranks, group_src=rank)
        if not mine:
            self._place_packed(packed, divided, wholes, rank)

    @torch.no_grad()
    def _gathered(self, group: list[Slot]) -> Bucket:
        """A bucket on the sender: its own shards, and a message from each of the other tensor ranks."""
        wholes = _wholes(group, self._empty(_numel(group)))
        divided = self._divided(group)
        others = range(1, self._layout.tensor) if divided else ()
        packed = {rank: self._empty(self._packed_size(divided)) for rank in others}
        works = _messages(dist.irecv, packed, self._tensor_ranks)
        self._place_own(group, wholes)  # while they come
        _wait(works)
        for rank in others:
            self._place_packed(packed[rank], divided, wholes, rank)
        return _bucket(wholes)

    @torch.no_grad()
    def _send(self, group: list[Slot]) -> None:
        """This rank's shards of a bucket, to the sender."""
        if divided := self._divided(group):
            _wait(_messages(dist.isend, {0: self._packed(divided)}, self._tensor_ranks))

    def _divided(self, group: list[Slot]) -> list[Slot]:
        """The slots of which other tensor ranks hold other parts."""
        return [slot for slot in group if self._layout.tensor > 1 and not isinstance(slot.cut, Whole)]

    @torch.no_grad()
    def _place_own(self, slots: list[Slot], wholes: Wholes) -> None:
        for slot in slots:
            shard = self._parameters[slot.megatron]
            slot.cut.place(shard, wholes[slot], self._layout.tensor_rank, self._layout.tensor)

    def _place_packed(self, packed: Tensor, slots: list[Slot], wholes: Wholes, rank: int) -> None:
        for slot, shard in zip(slots, self._unpacked(packed, slots), strict=True):
            slot.cut.place(shard, wholes[slot], rank, self._layout.tensor)

    def _packed(self, slots: list[Slot]) -> Tensor:
        """This rank's shards, one behind the other: [sum of their sizes]."""
        packed = self._empty(self._packed_size(slots))
        for slot, shard in zip(slots, self._unpacked(packed, slots), strict=True):
            shard.copy_(self._parameters[slot.megatron])
        return packed

    def _unpacked(self, packed: Tensor, slots: list[Slot]) -> list[Tensor]:
        """The shards in such a tensor; a slot's shards have the same shape on every rank."""
        shapes = [self._parameters[slot.megatron].shape for slot in slots]
        parts = packed.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _packed_size(self, slots: list[Slot]) -> int:
        return sum(self._parameters[slot.megatron].numel() for slot in slots)

    def _empty(self, size: int) -> Tensor:
        return torch.empty(size, dtype=self._dtype, device=self._device)


def _numel(group: list[Slot]) -> int:
    return sum(slot.numel for slot in group)


def _wholes(group: list[Slot], flat: Tensor) -> Wholes:
    """The tensors of a group as views of a flat tensor that has room for them, one behind the other."""
    progress_marker.beat()
    wholes: Wholes = {}
    at = 0
    for slot in group:
        wholes[slot] = []
        for shape in slot.shapes:
            size = torch.Size(shape).numel()
            wholes[slot].append(flat[at : at + size].view(shape))
            at += size
    return wholes


def _bucket(wholes: Wholes) -> Bucket:
    return [pair for slot, tensors in wholes.items() for pair in zip(slot.names, tensors, strict=True)]


def _messages(kind: Callable[..., Any], tensors: dict[int, Tensor], group: dist.ProcessGroup) -> list[dist.Work]:
    """Start to send (`dist.isend`) or receive (`dist.irecv`) one tensor to or from each of these ranks of a group."""
    messages = [dist.P2POp(kind, tensor, group=group, group_peer=rank) for rank, tensor in tensors.items()]
    return dist.batch_isend_irecv(messages) if messages else []


def _wait(messages: list[dist.Work]) -> None:
    for message in messages:
        message.wait()
