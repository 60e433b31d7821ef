"""Megatron-Core's distributed optimizer: its state is gathered for a checkpoint in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_tempo.config.sizes import GATHERED_BYTES
from megatron_tempo.models.megatron_compat.optimizer import optimizer_parts

STATES = ("param", "exp_avg", "exp_avg_sq")


@contextmanager
def gathered_in_pieces(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Inside the block, Megatron gathers the state over the data-parallel ranks in pieces of GATHERED_BYTES.

    Megatron-Core 0.16.1 (optimizer/distrib_optimizer.py, `get_parameter_state_dp_zero`) gathers each of the three
    states as a whole on every rank's GPU, 4 bytes per parameter, and NCCL's gather into a list of tensors holds as much
    again. Without this, a layout that trains runs out of memory at its first checkpoint.
    """
    parts = optimizer_parts(optimizer)
    for part in parts:
        part.get_parameter_state_dp_zero = partial(_gathered, part)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def _gathered(part: Any, *, use_gloo_comm: bool, empty_data: bool, return_on_all_ranks: bool) -> dict[Any, Any]:
    """What Megatron's method returns: fp32 [numbers in a buffer, without padding] in host memory, by buffer and state.
    Collective. `empty_data`: zeros, to be filled by a checkpoint."""
    assert return_on_all_ranks
    assert not use_gloo_comm
    found: dict[Any, Any] = {"buckets_coalesced": True}
    for index, ranges in enumerate(part.gbuf_ranges):
        buffer = part.buffers[index]
        ((dtype, range_maps),) = ranges.items()
        world: dict[str, Any] = {name: torch.zeros(buffer.numel_unpadded, device="cpu") for name in STATES}
        start = 0
        for bucket, range_map in zip(buffer.buckets, range_maps, strict=True):
            end = start + bucket.numel_unpadded
            for name in () if empty_data else STATES:
                shards = _own_shards(part, range_map, name)
                _gather(world[name][start:end], bucket.grad_data, shards, part.data_parallel_group)
            start = end
        found[index] = {dtype: {**world, "numel_unpadded": buffer.numel_unpadded}}
    return found


def _own_shards(part: Any, range_map: Any, name: str) -> list[tuple[int, Tensor]]:
    """This rank's parts of a bucket's parameters, flat, with their offsets in its share of the bucket."""
    return [
        (ranges["gbuf_local"].start, part._get_main_param_and_optimizer_states(parameter)[name].detach().flatten())
        for parameter, ranges in range_map["param_map"].items()
    ]


def _gather(out: Tensor, bucket: Tensor, shards: list[tuple[int, Tensor]], group: dist.ProcessGroup) -> None:
    """Gather a bucket to `out`, fp32 in host memory. Each rank has an equal share of the bucket, which ends with
    padding; `out` has none. `bucket`: a tensor of its size and device."""
    size = group.size()
    share = bucket.numel() // size
    step = max(1, GATHERED_BYTES // (4 * size))
    for begin in range(0, share, step):
        own = torch.zeros(min(step, share - begin), dtype=torch.float32, device=bucket.device)
        _fill(own, begin, shards)
        _gather_piece([out[rank * share + begin :] for rank in range(size)], own, group)
        del own  # before the next one is made


def _fill(own: Tensor, begin: int, shards: list[tuple[int, Tensor]]) -> None:
    """Fill a piece of this rank's share, which begins at `begin`, from what it has of the parameters."""
    end = begin + len(own)
    for offset, shard in shards:
        low, high = max(offset, begin), min(offset + len(shard), end)
        if low < high:
            own[low - begin : high - begin].copy_(shard[low - offset : high - offset])


def _gather_piece(places: list[Tensor], own: Tensor, group: dist.ProcessGroup) -> None:
    """Gather each rank's piece to the beginning of its place in host memory, as far as the place goes. Collective."""
    whole = torch.empty(len(places) * len(own), dtype=torch.float32, device=own.device)
    dist.all_gather_into_tensor(whole, own, group=group)
    for place, piece in zip(places, whole.split(len(own)), strict=True):
        count = min(len(place), len(piece))
        place[:count].copy_(piece[:count])
