"""Which GPUs of a node its servers run on. A GPU has one name for all processes: its UUID."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from megatron_tempo.config.choices import Transport
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import InputError


def visible_gpus() -> list[str]:
    """The UUIDs of the GPUs that this process sees, in the order in which CUDA counts them."""
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]


def own_gpu(device: torch.device) -> str:
    """The UUID of this rank's GPU; "" on a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def placed(
    servers: ServersConfig, visible: Sequence[str], trainers: Collection[str], *, colocated: bool = False
) -> list[int]:
    """The GPUs of the servers that this node starts, `tensor` for each, as positions in `visible`.

    `visible`: the UUIDs of the GPUs that the starting process sees. `trainers`: those of the trainer's ranks on this
    node. Without `rollout.servers.devices` the servers get the first GPUs that no rank of the trainer has, or, if
    `colocated`, the first ones that some rank has.

    Raises InputError if there are too few GPUs, or if trainer and server would share one with `transport=group`: NCCL
    refuses two members of a group on one GPU (init.cc, "Duplicate GPU detected").
    """
    wanted = servers.replicas * servers.tensor
    if colocated:
        return _shared(servers, visible, trainers, wanted)
    if servers.devices is None:
        free = [number for number, gpu in enumerate(visible) if gpu not in trainers]
        if len(free) < wanted:
            raise InputError(
                f"rollout.servers.devices=null: {servers.replicas} x {servers.tensor} (replicas x tensor) needs "
                f"{wanted} GPUs that the trainer does not use, and {len(free)} of the {len(visible)} that the starting "
                "process sees are free: start fewer trainer processes or servers, or make more GPUs visible to it; "
                "with rollout.servers.transport=shared, rollout.servers.devices may also name GPUs of the trainer"
            )
        return free[:wanted]
    _refuse_absent(servers.devices, len(visible))
    both = [number for number in servers.devices if visible[number] in trainers]
    if both and servers.transport is not Transport.shared:
        raise InputError(
            f"rollout.servers.devices={servers.devices}: the trainer uses GPU {both[0]} too, and NCCL has no group "
            "with two members on one GPU: give GPUs that the trainer does not use, start fewer trainer processes, or "
            "set rollout.servers.transport=shared"
        )
    return list(servers.devices)


def _shared(servers: ServersConfig, visible: Sequence[str], trainers: Collection[str], wanted: int) -> list[int]:
    """The GPUs of servers that take turns with the trainer."""
    own = [number for number, gpu in enumerate(visible) if gpu in trainers]
    if servers.devices is None:
        if len(own) < wanted:
            raise InputError(
                f"rollout.placement=colocated: {servers.replicas} x {servers.tensor} (replicas x tensor) needs "
                f"{wanted} GPUs of the trainer, which has {len(own)} of the {len(visible)} that the starting process "
                "sees: start fewer servers or more trainer processes, or make more GPUs visible to it"
            )
        return own[:wanted]
    _refuse_absent(servers.devices, len(visible))
    if away := [number for number in servers.devices if number not in own]:
        raise InputError(
            f"rollout.servers.devices={servers.devices}: no process of the trainer has GPU {away[0]}, and with "
            "rollout.placement=colocated servers are on the trainer's GPUs: give rollout.servers.devices=null, or set "
            "rollout.placement=disaggregated"
        )
    return list(servers.devices)


def _refuse_absent(devices: Sequence[int], visible: int) -> None:
    if absent := [number for number in devices if number >= visible]:
        raise InputError(
            f"rollout.servers.devices={list(devices)}: there is no GPU {absent[0]}: the process that starts the "
            f"servers sees {visible}, counted from 0; give numbers below {visible}, or make more GPUs "
            "visible to it (CUDA_VISIBLE_DEVICES)"
        )
