"""The machines of a run: which start servers, which GPUs the trainer has there, which copies of the model feed whom.

All ranks say where they are, so that every rank knows the same, whatever a launcher has made of the configuration.
"""

from __future__ import annotations

import os
import socket
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.config.choices import Transport
from megatron_tempo.config.hosts import is_loopback
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import InputError
from megatron_tempo.rollout.addresses import own_address
from megatron_tempo.rollout.placement import own_gpu
from megatron_tempo.rollout.transfer import Fed


@dataclass(frozen=True, slots=True)
class ServerNodes:
    """Where servers are started. The same on every rank, except `trainers`."""

    first: list[int]  # the first rank of each node that servers are started on
    trainers: set[str]  # the GPUs of the ranks on this machine
    fed: list[Fed] | None  # None: any copy of the model can feed any server


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rank is."""

    machine: str
    local: int  # the rank among those of its machine
    address: str
    wrong: str  # why it has no address; "" if it has one
    gpu: str
    copy: int


def server_nodes(
    config: ServersConfig, device: torch.device, group: dist.ProcessGroup, copy: int, *, colocated: bool
) -> ServerNodes:
    """Collective. `copy`: the number of the copy of the model that this rank holds a part of (`Weights.copy`).

    Raises InputError on every rank if some ranks could not reach the servers, or if the weights could not.
    """
    own = socket.gethostname()
    try:
        address, wrong = own_address(config.host), ""
    except InputError as error:
        address, wrong = "", str(error)
    local = int(os.environ.get("LOCAL_RANK", dist.get_rank()))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (own, local, address, wrong, own_gpu(device), copy), group=group)
    places = [_Place(*values) for values in gathered]
    _refuse_unreachable(config, places)
    first = [rank for rank, place in enumerate(places) if place.local == 0] if config.each_node else [0]
    fed = None
    if config.transport is Transport.shared and len({place.machine for place in places}) > 1:
        fed = _fed(config, places, first, colocated=colocated)
    return ServerNodes(first, {place.gpu for place in places if place.machine == own}, fed)


def _refuse_unreachable(config: ServersConfig, places: Sequence[_Place]) -> None:
    if failed := [f"{place.machine}: {place.wrong}" for place in places if place.wrong]:
        raise InputError(failed[0])
    machines = {place.machine for place in places}
    alone = [place for place in places if is_loopback(place.address)]
    if len(machines) > 1 and alone:
        fix = "give an address that the others reach" if config.host == "hostname" else "give hostname"
        raise InputError(
            f"rollout.servers.host={config.host} is {alone[0].address} on {alone[0].machine}, which is reached from "
            f"that machine alone, and this run is on {len(machines)}: {fix}"
        )


def _fed(config: ServersConfig, places: Sequence[_Place], first: Sequence[int], *, colocated: bool) -> list[Fed]:
    """The servers of each machine, and the copies of the model that are whole there, which alone can feed them."""
    other = "rollout.placement=disaggregated and rollout.servers.transport=group" if colocated else "group"
    if config.addresses is not None:
        raise InputError(
            "rollout.servers.transport=shared: the run is on several machines and does not know on which of them "
            "the servers of rollout.servers.addresses are: give group"
        )
    servers: dict[str, list[int]] = defaultdict(list)
    for number, rank in enumerate(first):
        servers[places[rank].machine] += range(number * config.replicas, (number + 1) * config.replicas)
    whole = whole_copies([(place.machine, place.copy) for place in places])
    if lacking := [machine for machine in servers if not whole.get(machine)]:
        ranks = sum(place.machine == lacking[0] for place in places)
        raise InputError(
            f"rollout.servers.transport=shared: {lacking[0]} has servers and {ranks} processes of the trainer, which "
            "hold no whole copy of the model to send from, because copies are spread over machines: set "
            f"parallel.pipeline=1 and a parallel.tensor that divides {ranks}, launch a node's processes with ranks "
            f"that follow each other, or give {other}"
        )
    return [Fed(tuple(numbers), whole[machine]) for machine, numbers in servers.items()]


def whole_copies(ranks: Sequence[tuple[str, int]]) -> dict[str, tuple[int, ...]]:
    """The copies of the model that have all their ranks on one machine, in order, by machine.

    `ranks`: the machine of each rank, and the number of its copy.

    >>> whole_copies([("a", 0), ("a", 0), ("a", 1), ("b", 1), ("b", 2), ("b", 2)])
    {'a': (0,), 'b': (2,)}
    """
    sizes, here = Counter(copy for _, copy in ranks), Counter(ranks)
    whole: dict[str, tuple[int, ...]] = {}
    for machine, copy in sorted(here):
        if here[machine, copy] == sizes[copy]:
            whole[machine] = (*whole.get(machine, ()), copy)
    return whole
