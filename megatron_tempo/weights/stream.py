"""Weights out of a Megatron model: a stream of buckets of (Hugging Face name, tensor).

The plan is made from the model's shape and the layout alone, so it is the same on every rank without a word. A bucket
holds slots of one pipeline stage: that stage gathers it over tensor parallelism and sends it to the other stages.
No rank holds more than two buckets beyond its own shards.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_tempo.models.gpt import PackedGPT
from megatron_tempo.models.parallel import Layout
from megatron_tempo.weights.slots import Slot, Whole

Bucket = list[tuple[str, Tensor]]


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


def export(net: PackedGPT, layout: Layout, slots: list[Slot], bucket_bytes: int) -> Iterator[Bucket]:
    """The whole model, bucket by bucket, on every rank, on the model's device and in its type. Collective."""
    parameters = dict(net.named_parameters())
    dtype = net.config.params_dtype
    device = next(net.parameters()).device
    for group in plan(slots, bucket_bytes, dtype.itemsize):
        with torch.no_grad():
            whole = torch.empty(sum(slot.numel for slot in group), dtype=dtype, device=device)
            if layout.pipeline_rank == group[0].stage:
                _gather(parameters, group, layout, whole)
            if layout.pipeline > 1:
                stages = parallel_state.get_pipeline_model_parallel_group()
                dist.broadcast(whole, group=stages, group_src=group[0].stage)
        yield _named(whole, group)


def _gather(parameters: dict[str, torch.nn.Parameter], group: list[Slot], layout: Layout, whole: Tensor) -> None:
    """Fill `whole` with the Hugging Face tensors of the group, gathered over tensor parallelism."""
    at = 0
    for slot in group:
        shard = parameters[slot.megatron].detach()
        shards = [shard]
        if layout.tensor > 1 and not isinstance(slot.cut, Whole):
            shards = [torch.empty_like(shard) for _ in range(layout.tensor)]
            dist.all_gather(shards, shard.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
        for tensor in slot.cut.join(shards):
            whole[at : at + tensor.numel()] = tensor.flatten()
            at += tensor.numel()


def _named(whole: Tensor, group: list[Slot]) -> Bucket:
    shapes = [(name, shape) for slot in group for name, shape in zip(slot.names, slot.shapes, strict=True)]
    parts = whole.split([torch.Size(shape).numel() for _, shape in shapes])
    return [(name, part.view(shape)) for (name, shape), part in zip(shapes, parts, strict=True)]
