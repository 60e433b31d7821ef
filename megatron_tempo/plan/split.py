"""Which GPUs of the cluster train and which generate, and whether a configuration can be planned at all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules import cluster, experts, extensions, layout, numbers, precision, rollout, stages
from megatron_tempo.config.schema import Config
from megatron_tempo.plan.shapes import shape_of

# Properties of the machines that the planner needs; 0 if not set.
_FACTS = ("memory_gb", "bf16_tflops", "memory_tbs", "nvlink_gbs", "network_gbs")
# Fields whose rules look for files that only the training machines have.
_ELSEWHERE = ("rollout.servers.python", "rollout.servers.key_file", "rollout.servers.addresses", "data")


@dataclass(frozen=True, slots=True)
class Split:
    """The trainer's processes, and the servers (0 if the engine is embedded or configured by addresses).

    >>> Split(trainers=4, servers=4, serving=4, shared=0)  # disaggregated on a node: four GPUs train, four serve
    """

    trainers: int
    servers: int
    serving: int  # GPUs that serve
    shared: int  # servers on the GPU that has most of them and a trainer process too


def split_of(config: Config) -> Split:
    """Divide the GPUs as docs/engines.md describes.

    Servers take their `devices` of each node that they are started on, the trainer the node's other GPUs, from the
    first on. If `parallel.world_size` is set, its processes take each node's first GPUs. Without `devices` servers take
    the GPUs after the trainer's. `cluster.rollout_nodes` do not train. Colocated servers are on the trainer's GPUs.
    """
    machines, servers = config.cluster, config.rollout.servers
    assert machines is not None
    world, node = config.parallel.world_size, machines.gpus_per_node
    if not config.rollout.is_served or servers.addresses is not None:
        return Split(world or machines.gpus, 0, 0, 0)
    if away := machines.rollout_nodes:
        count = servers.replicas * away
        return Split(world or machines.training_nodes * node, count, count * servers.tensor, 0)
    nodes = machines.nodes if servers.each_node else 1
    if config.rollout.is_colocated:
        count = servers.replicas * nodes
        return Split(world or machines.gpus, count, count * servers.tensor, 1)
    taken, trainers = cluster.servers_on_node(servers), cluster.trainers_on_node(config, world) or node
    first = trainers if servers.devices is None else min(servers.devices, default=trainers)
    free = first >= trainers and (servers.devices is not None or trainers + taken <= node)
    return Split(world or trainers * machines.nodes, servers.replicas * nodes, taken * nodes, 0 if free else 1)


def takes_turns(config: Config) -> bool:
    """Whether only one model at a time is on the GPU: by `parallel.offload`, and always where servers are colocated."""
    return config.parallel.offload or config.rollout.is_colocated


def problems(config: Config) -> list[Problem]:
    """Why a configuration cannot be planned. Data sets and this machine's programs are not checked."""
    if not numbers.are_usable(config):
        return list(numbers.check(config))
    shape, wrong = shape_of(config)
    wrong += [*numbers.check(config), *_cluster(config), *extensions.check_methods(config)]
    wrong += extensions.check_engine(config)
    if wrong or shape is None:
        return wrong
    return [*laid_out(config, shape), *(p for p in stages.check(config) if not p.field.startswith(_ELSEWHERE))]


def laid_out(config: Config, shape: ModelShape) -> list[Problem]:
    """The problems of a layout, for the number of trainer processes that `split_of` returns."""
    world = split_of(config).trainers
    fields = ["model.path"] + (["model.critic_path"] if config.model.critic_path is not None else [])
    shapes = dict.fromkeys(fields, shape)
    problems = [*layout.check(config, shapes, world), *precision.check(config, shapes), *_devices(config)]
    problems += experts.check(config, shapes, world)
    problems += [problem for problem in rollout.check(config, world) if not problem.field.startswith(_ELSEWHERE)]
    return problems + list(stages.check_data_parallel(config, world))


def _cluster(config: Config) -> Iterator[Problem]:
    if config.cluster is None:
        yield Problem(
            "cluster",
            None,
            "it is not set, so the machines to plan for are unknown",
            "cluster=h100x8, or cluster.FIELD=...",
        )
        return
    for name in _FACTS:
        if not getattr(config.cluster, name):
            fix = f"set the machines' value, or a cluster preset that has it; for example cluster.{name}=1"
            yield Problem(f"cluster.{name}", getattr(config.cluster, name), "must be above 0", fix)
    yield from cluster.rollout_nodes(config)


def _devices(config: Config) -> Iterator[Problem]:
    machines, devices = config.cluster, config.rollout.servers.devices
    assert machines is not None
    node = machines.gpus_per_node
    if devices is not None and (any(d not in range(node) for d in devices) or len(set(devices)) < len(devices)):
        wrong = f"must be different numbers below cluster.gpus_per_node={node}"
        fix = f"rollout.servers.devices=[{','.join(map(str, range(node)[-len(devices) :]))}]"
        yield Problem("rollout.servers.devices", devices, wrong, fix)
    world = config.parallel.world_size
    if world is not None and world > machines.gpus:
        fix = f"parallel.world_size={machines.gpus} or less, or more nodes"
        yield Problem("parallel.world_size", world, f"the cluster has {machines.gpus} GPUs", fix)
