"""Rules on the cluster: nodes that only serve, and the site's SLURM settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.choices import Transport
from megatron_tempo.config.hosts import is_loopback
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config, ServersConfig
from megatron_tempo.config.tree import MISSING

# sbatch's time limits: minutes, minutes:seconds, hours:minutes:seconds, each optionally after days.
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_OPTION = re.compile(r"--[A-Za-z][\w-]*(=.*)?|-[A-Za-z]\S*", re.ASCII)


def rollout_nodes(config: Config) -> Iterator[Problem]:
    """Nodes of `cluster` that only serve."""
    cluster, servers = config.cluster, config.rollout.servers
    if cluster is None or not cluster.rollout_nodes:
        return
    field, away, node = "cluster.rollout_nodes", cluster.rollout_nodes, cluster.gpus_per_node
    if away >= cluster.nodes:
        wrong = f"leaves none of cluster.nodes={cluster.nodes} to train on"
        yield Problem(field, away, wrong, f"cluster.nodes={away + 1} or more")
    if not config.rollout.is_served:
        wrong = f"the engine {config.rollout.engine.name} generates in the trainer's processes"
        yield Problem(field, away, wrong, f"rollout.engine=sglang or vllm, or {field}=0")
        return
    if servers.addresses is not None:
        fix = f"rollout.servers.addresses=null, or {field}=0"
        yield Problem(field, away, "none is started where addresses are given", fix)
    if servers.replicas * servers.tensor > node:
        wrong = f"{servers.replicas} x {servers.tensor} (replicas x tensor) GPUs are more than a node's {node}"
        fewer = f"rollout.servers.replicas={max(1, node // servers.tensor)}"
        fix = fewer if servers.tensor <= node else f"{fewer} and rollout.servers.tensor={node}"
        yield Problem("rollout.servers.replicas", servers.replicas, wrong, fix)
    if servers.each_node:
        fix = "rollout.servers.each_node=false (they are started on each of cluster.rollout_nodes)"
        yield Problem("rollout.servers.each_node", True, "the trainer's nodes start none", fix)
    if servers.transport is Transport.shared and not config.rollout.is_colocated:  # reported in `rollout`
        wrong = "memory is shared within one node, and the servers are on others"
        yield Problem("rollout.servers.transport", "shared", wrong, "rollout.servers.transport=group")
    if is_loopback(servers.host):
        wrong = "is reached from one machine alone, and the servers are on others"
        yield Problem("rollout.servers.host", servers.host, wrong, "rollout.servers.host=hostname")


def trainers_on_node(config: Config, world: int | None) -> int | None:
    """The processes of the trainer on a node, which use its first GPUs. `world`: all of them; None: one for each GPU
    that no server takes. The result is None if nothing says how many nodes there are."""
    cluster, servers = config.cluster, config.rollout.servers
    if cluster is None or cluster.training_nodes < 1:
        return None
    if world is not None:
        return -(-world // cluster.training_nodes)
    node, starts = cluster.gpus_per_node, config.rollout.is_served and servers.addresses is None
    starts = starts and not config.rollout.is_colocated
    taken = servers_on_node(servers) if starts and not cluster.rollout_nodes else 0
    return node - taken if taken < node else node


def servers_on_node(servers: ServersConfig) -> int:
    """The GPUs that servers take of each node that they are started on."""
    return servers.replicas * servers.tensor if servers.devices is None else len(set(servers.devices))


def site(config: Config) -> Iterator[Problem]:
    """The settings that a job script is written from."""
    if config.cluster is None:
        fix = "cluster=NAME, a file of configs/cluster or of --config-dir; example_site shows what one says"
        yield Problem("cluster", None, "nothing says where to submit to", fix)
        return
    slurm, field = config.cluster.slurm, "cluster.slurm"
    if slurm.time_limit is not None and not _TIME.fullmatch(slurm.time_limit):
        fix = f"{field}.time_limit='\"12:00:00\"'; the forms are MINUTES, HH:MM:SS and D-HH:MM:SS"
        yield Problem(f"{field}.time_limit", slurm.time_limit, "is no time that sbatch reads", fix)
    for option in slurm.options:
        if not _OPTION.fullmatch(option):
            yield Problem(f"{field}.options", option, "is no option of sbatch", "write it as --NAME=VALUE")
    for name in slurm.environment:
        if not _NAME.fullmatch(name):
            yield Problem(f"{field}.environment", name, "is no name of a variable", "letters, digits and _ only")
    if slurm.mounts and slurm.container is None:
        wrong = "are of a container, and there is none"
        yield Problem(f"{field}.mounts", slurm.mounts, wrong, f"{field}.container=IMAGE, or {field}.mounts=[]")
    yield from _folders(config)
    for mount in slurm.mounts:
        if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[^:,]+)?", mount):
            yield Problem(f"{field}.mounts", mount, "is no mount", "write it as /HOST/FOLDER:/CONTAINER/FOLDER[:ro]")


def _folders(config: Config) -> Iterator[Problem]:
    """A job finds its code by PYTHONPATH, and a container its folders by a list: neither allows every name."""
    assert config.cluster is not None
    parts = ":," if config.cluster.slurm.container is not None else ":"
    names = {"run.dir": Path(config.run.dir).absolute()} if config.run.dir != MISSING else {}
    if config.cluster.slurm.container is not None:
        names["cluster.slurm.container"] = Path.cwd()
    for field, folder in names.items():
        if any(part in str(folder) for part in parts):
            wrong = f"{folder} has a {' or '.join(parts)} in its name, which separates folders in a job"
            fix = "give a run.dir without it" if field == "run.dir" else "submit from a folder without it"
            value = config.run.dir if field == "run.dir" else config.cluster.slurm.container
            yield Problem(field, value, wrong, fix)


def spread(config: Config, processes: int) -> Iterator[Problem]:
    """Divide `processes` of the trainer over the nodes that train: one per GPU, unless parallel.world_size is set."""
    cluster, field = config.cluster, "parallel.world_size"
    if cluster is None or cluster.training_nodes < 1 or config.parallel.world_size is None:
        return
    nodes, most = cluster.training_nodes, cluster.gpus_per_node
    if processes % nodes:
        wrong = f"{processes} processes cannot be shared evenly by {nodes} nodes"
        yield Problem(field, processes, wrong, f"{field}={nodes * max(1, processes // nodes)}, a multiple of {nodes}")
    elif processes // nodes > most:
        wrong = f"is {processes // nodes} processes a node, and a node has {most} GPUs"
        yield Problem(field, processes, wrong, f"{field}={nodes * most} or less, or more cluster.nodes")
