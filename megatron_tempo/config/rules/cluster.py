"""Rules on the cluster: nodes that only serve, and how a site takes jobs."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megatron_tempo.config.choices import EngineKind, Transport
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config

# What sbatch reads as a limit: minutes, minutes:seconds, hours:minutes:seconds, and the same behind days.
_TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d){0,2}")
_NAME = re.compile(r"[A-Za-z_]\w*")


def rollout_nodes(config: Config) -> Iterator[Problem]:
    """Nodes of `cluster` that only serve."""
    cluster, servers = config.cluster, config.rollout.servers
    if cluster is None or not cluster.rollout_nodes:
        return
    field, away, node = "cluster.rollout_nodes", cluster.rollout_nodes, cluster.gpus_per_node
    if away >= cluster.nodes:
        wrong = f"leaves none of cluster.nodes={cluster.nodes} to train on"
        yield Problem(field, away, wrong, f"cluster.nodes={away + 1} or more")
    if config.rollout.engine is EngineKind.embedded:
        wrong = "the embedded engine generates in the trainer's processes"
        yield Problem(field, away, wrong, f"rollout.engine=sglang or vllm, or {field}=0")
        return
    if servers.addresses is not None:
        fix = f"rollout.servers.addresses=null, or {field}=0"
        yield Problem(field, away, "none is started where addresses are given", fix)
    if servers.replicas * servers.tensor > node:
        wrong = f"{servers.replicas} x {servers.tensor} (replicas x tensor) GPUs are more than a node's {node}"
        yield Problem("rollout.servers.replicas", servers.replicas, wrong, "lower it, or rollout.servers.tensor")
    if servers.each_node:
        fix = "rollout.servers.each_node=false: they are started on each of cluster.rollout_nodes"
        yield Problem("rollout.servers.each_node", True, "the trainer's nodes start none", fix)
    if servers.transport is Transport.shared:
        wrong = "memory is shared within one node, and the servers are on others"
        yield Problem("rollout.servers.transport", "shared", wrong, "rollout.servers.transport=group")
    if servers.host.startswith("127."):
        wrong = "is reached from one machine alone, and the servers are on others"
        yield Problem("rollout.servers.host", servers.host, wrong, "rollout.servers.host=hostname")


def site(config: Config) -> Iterator[Problem]:
    """What a job is written from."""
    if config.cluster is None:
        fix = "cluster=NAME, a file of configs/cluster or of --config-dir; example_site shows what one says"
        yield Problem("cluster", None, "nothing says where to submit to", fix)
        return
    slurm, field = config.cluster.slurm, "cluster.slurm"
    if slurm.time_limit is not None and not _TIME.fullmatch(slurm.time_limit):
        fix = f"{field}.time_limit='\"12:00:00\"', or MINUTES or D-HH:MM:SS"
        yield Problem(f"{field}.time_limit", slurm.time_limit, "is no time that sbatch reads", fix)
    for option in slurm.options:
        if not option.startswith("-") or "\n" in option:
            yield Problem(f"{field}.options", option, "is no option of sbatch", "write it as --NAME=VALUE")
    for name in slurm.environment:
        if not _NAME.fullmatch(name):
            yield Problem(f"{field}.environment", name, "is no name of a variable", "letters, digits and _ only")
    if slurm.mounts and slurm.container is None:
        wrong = "are of a container, and there is none"
        yield Problem(f"{field}.mounts", slurm.mounts, wrong, f"{field}.container=IMAGE, or {field}.mounts=[]")
    for mount in slurm.mounts:
        if not re.fullmatch(r"/[^:,]*:/[^:,]*(:[^:,]+)?", mount):
            yield Problem(f"{field}.mounts", mount, "is no mount", "write it as /HOST/FOLDER:/CONTAINER/FOLDER[:ro]")


def spread(config: Config, processes: int) -> Iterator[Problem]:
    """`processes` of the trainer over the nodes that train."""
    cluster = config.cluster
    if cluster is None or cluster.training_nodes < 1:
        return
    nodes, most = cluster.training_nodes, cluster.gpus_per_node
    field = "parallel.world_size" if config.parallel.world_size is not None else "cluster.nodes"
    value = processes if config.parallel.world_size is not None else cluster.nodes
    if processes % nodes:
        wrong = f"{processes} processes cannot be shared evenly by {nodes} nodes"
        yield Problem(field, value, wrong, f"{field}=a multiple of {nodes}, or change cluster.nodes")
    elif processes // nodes > most:
        wrong = f"is {processes // nodes} processes a node, and a node has {most} GPUs"
        yield Problem(field, value, wrong, f"{field}={nodes * most} or less, or more cluster.nodes")
