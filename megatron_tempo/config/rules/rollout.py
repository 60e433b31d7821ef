"""Rules on the rollout engine."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.choices import Device, EnginePrecision, StaleGroups, Transport
from megatron_tempo.config.extensions import Extension, ExtensionError, load_engine
from megatron_tempo.config.hosts import host_of, ip_of, is_loopback
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules.cluster import servers_on_node, trainers_on_node
from megatron_tempo.config.rules.files import wrong_with_key
from megatron_tempo.config.rules.numbers import DEVICES
from megatron_tempo.config.schema import Config, ParallelConfig, ServersConfig

_ADDRESS = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[^/\s:@\[\]]+):\d+")


def check(config: Config, world_size: int | None = None) -> Iterator[Problem]:
    """`world_size`: number of launched processes; None: `parallel.world_size`."""
    rollout = config.rollout
    if rollout.max_staleness:
        yield from _ahead(config)
    elif rollout.partial_rollouts:
        field, wrong = "rollout.partial_rollouts", "a response that continues in the next iteration has older tokens"
        yield Problem(field, True, wrong, f"rollout.max_staleness=1 or more, or {field}=false")
    if not rollout.max_staleness and rollout.stale_groups is not StaleGroups.wait:
        field, wrong = "rollout.stale_groups", "no prompt group gets too old with rollout.max_staleness=0"
        yield Problem(field, rollout.stale_groups.name, wrong, f"{field}=wait, or rollout.max_staleness=1 or more")
    if rollout.is_colocated:
        yield from _turns(config)
    if not rollout.is_served:
        return
    servers = rollout.servers
    yield from _host(servers)
    yield from _started(config, world_size) if servers.addresses is None else _found(servers)
    if servers.transport is Transport.shared:
        yield from _shared(config, world_size)


def check_serve(config: Config) -> Iterator[Problem]:
    """The rules for `serve`, which starts servers."""
    if not config.rollout.is_served:
        field, engine = "rollout.engine", config.rollout.engine
        yield Problem(field, engine.name, "has no servers to start", f"{field}=sglang or vllm")
    if config.rollout.is_colocated:
        wrong = "such servers are started by the trainer whose GPUs they have"
        yield Problem("rollout.placement", "colocated", wrong, "rollout.placement=disaggregated")
    yield from check(config)


def generates_in_background(engine: Extension) -> bool:
    """Whether a user's engine generates while others work. True if it cannot be loaded: reported elsewhere."""
    try:
        return load_engine(engine).background
    except ExtensionError:
        return True


def _ahead(config: Config) -> Iterator[Problem]:
    field, engine, value = "rollout.max_staleness", config.rollout.engine, config.rollout.max_staleness
    if isinstance(engine, Extension) and not generates_in_background(engine):
        wrong = f"{engine} does not say that it generates while the trainer trains"
        fix = "background = True in the engine's class if it does, or rollout.max_staleness=0"
        yield Problem(field, value, wrong, fix)
    if isinstance(engine, Extension) and config.rollout.partial_rollouts:
        partial, wrong = "rollout.partial_rollouts", f"{engine} cannot take up a response where it left it"
        yield Problem(partial, True, wrong, f"{partial}=false, or rollout.engine=embedded, sglang or vllm")
    if config.rollout.replay is not None:
        yield Problem(field, value, "a replay generates nothing", "rollout.max_staleness=0")


def _host(servers: ServersConfig) -> Iterator[Problem]:
    field, host = "rollout.servers.host", servers.host
    address = ip_of(host)
    if address is not None and address.version == 6:
        wrong = "is an IPv6 address, which the engines' stores do not use"
        yield Problem(field, host, wrong, f"{field}={'127.0.0.1' if address.is_loopback else 'hostname'}")
    elif address is not None and address.is_unspecified:
        yield Problem(field, host, "means every address of a machine, not one", f"{field}=hostname")
    elif address is None and not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,252}", host, re.ASCII):
        yield Problem(field, host, "is no host", f"{field}=hostname, or an IPv4 address")


def _started(config: Config, launched: int | None) -> Iterator[Problem]:
    engine, servers = config.rollout.engine.name, config.rollout.servers
    if shutil.which(servers.python) is None:
        fix = f"give rollout.servers.python=ENVIRONMENT/bin/python, of the environment that has {engine}"
        yield Problem("rollout.servers.python", servers.python, "is no program that can be run", fix)
    wanted = servers.replicas * servers.tensor
    if servers.devices is not None and len(servers.devices) != wanted:
        first = min(_trainers(config, launched), max(0, DEVICES - wanted))
        some = ",".join(map(str, range(first, first + min(wanted, DEVICES))))
        fix = f"give {wanted} of them: rollout.servers.devices=[{some}]"
        if config.rollout.is_colocated:
            fix = "rollout.servers.devices=null, for GPUs of the trainer"
        wrong = f"are {len(servers.devices)} devices for {servers.replicas} x {servers.tensor} (replicas x tensor)"
        yield Problem("rollout.servers.devices", servers.devices, wrong, fix)
    elif config.rollout.is_colocated:
        yield from _on_trainers(config, launched)
    elif config.run.device is not Device.cpu:
        yield from _disaggregated(config, launched)
    if servers.key_file is not None:
        fix = "rollout.servers.key_file=null, or give rollout.servers.addresses"
        yield Problem("rollout.servers.key_file", servers.key_file, "servers that we start get a key of ours", fix)


def _found(servers: ServersConfig) -> Iterator[Problem]:
    assert servers.addresses is not None
    for address in servers.addresses:
        if not _ADDRESS.fullmatch(address) or host_of(address) is None:
            yield Problem("rollout.servers.addresses", address, "is no address", "give it as http://HOST:PORT")
    if len(set(servers.addresses)) < len(servers.addresses) or not servers.addresses:
        wrong = "is empty" if not servers.addresses else "names a server twice"
        yield Problem("rollout.servers.addresses", servers.addresses, wrong, "give each server's address once")
    away = [address for address in servers.addresses if not is_loopback(host_of(address) or "localhost")]
    if away and is_loopback(servers.host):
        wrong = f"cannot be reached from another machine, and {away[0]} fetches weights from it"
        yield Problem("rollout.servers.host", servers.host, wrong, "rollout.servers.host=hostname")
    if servers.key_file is None:
        fix = "give the file that the servers have their key from"
        yield Problem("rollout.servers.key_file", None, "servers without a key are not used", fix)
    elif wrong_key := wrong_with_key(Path(servers.key_file)):
        fix = "write the servers' key into it, or give the file with the key"
        yield Problem("rollout.servers.key_file", servers.key_file, wrong_key, fix)
    if servers.each_node:
        fix = "rollout.servers.each_node=false: all servers are found by their addresses"
        yield Problem("rollout.servers.each_node", True, "none is started where addresses are given", fix)


def _shared(config: Config, launched: int | None) -> Iterator[Problem]:
    servers, colocated = config.rollout.servers, config.rollout.is_colocated  # which has no other transport
    fix = "rollout.servers.transport=group"
    yield from _whole_copies(config, launched, f"rollout.placement=disaggregated and {fix}" if colocated else fix)
    if servers.precision is EnginePrecision.fp8:
        wrong = "matrices are made FP8 where they are whole, which is not so in shared memory"
        other = "rollout.servers.precision=bf16" if colocated else fix
        yield Problem("rollout.servers.transport", "shared", wrong, other)


def _whole_copies(config: Config, launched: int | None, otherwise: str) -> Iterator[Problem]:
    """Each node that servers are started on must hold a whole copy of the model, which alone can feed them.

    Nodes hold consecutive ranks. Megatron's ranks of a pipeline stage follow each other, copy after copy, so a copy of
    several stages is on several nodes.
    """
    cluster, servers, parallel = config.cluster, config.rollout.servers, config.parallel
    if cluster is None or cluster.training_nodes < 2 or cluster.rollout_nodes or servers.addresses is not None:
        return
    trainers = trainers_on_node(config, parallel.world_size if launched is None else launched) or 1
    every = "each node has servers" if servers.each_node else "the first node has servers"
    every += ", which get their weights from a copy of the model in the memory of their node (transport=shared)"
    if parallel.pipeline > 1:
        wrong = f"the stages of a copy are on several nodes, and {every}"
        yield Problem("parallel.pipeline", parallel.pipeline, wrong, f"{_unpiped(parallel)}, or {otherwise}")
        return
    tensor = parallel.tensor
    nodes = cluster.training_nodes if servers.each_node else 1
    if all(-(-node * trainers // tensor) * tensor + tensor <= (node + 1) * trainers for node in range(nodes)):
        return
    fits = math.gcd(tensor, trainers)
    fix = f"parallel.tensor={fits}" + (" and parallel.sequence=false" if fits == 1 and parallel.sequence else "")
    wrong = f"a node has {trainers} processes of the trainer, so some node holds no whole copy, and {every}"
    yield Problem("parallel.tensor", tensor, wrong, f"{fix}, or {otherwise}")


def _unpiped(parallel: ParallelConfig) -> str:
    """What makes a layout one without pipeline stages."""
    words = ["parallel.pipeline=1"]
    if parallel.virtual_pipeline > 1:
        words.append("parallel.virtual_pipeline=1")
    for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        if getattr(parallel, name) is not None:
            words.append(f"parallel.{name}=null")
    return " and ".join(words)


def _turns(config: Config) -> Iterator[Problem]:
    """Servers that take turns with the trainer on its GPUs."""
    rollout, cluster, field = config.rollout, config.cluster, "rollout.placement"
    away = f"{field}=disaggregated"
    if not rollout.is_served:
        wrong = f"the engine {rollout.engine.name} has no servers that sleep"
        yield Problem(field, "colocated", wrong, f"{away}, or rollout.engine=sglang or vllm")
        return
    if rollout.servers.addresses is not None:
        wrong = "servers that somebody else starts do not sleep"
        yield Problem(field, "colocated", wrong, f"rollout.servers.addresses=null, or {away}")
    if rollout.servers.transport is Transport.group:
        wrong = "NCCL has no group with two members on one GPU, which colocated servers would need"
        yield Problem("rollout.servers.transport", "group", wrong, "rollout.servers.transport=shared")
    if cluster is not None and cluster.rollout_nodes:
        wrong = f"such servers are on the trainer's GPUs, and cluster.rollout_nodes={cluster.rollout_nodes} have none"
        yield Problem(field, "colocated", wrong, f"{away}, or cluster.rollout_nodes=0")


def _on_trainers(config: Config, launched: int | None) -> Iterator[Problem]:
    """The GPUs of servers that take turns with the trainer, if the configuration tells how many processes it has."""
    servers, trainers = config.rollout.servers, trainers_on_node(config, launched or config.parallel.world_size)
    if trainers is None or config.run.device is Device.cpu:
        return
    wanted, field = servers.replicas * servers.tensor, "rollout.servers.devices"
    if servers.devices is None and wanted > trainers:
        wrong = f"{servers.replicas} x {servers.tensor} (replicas x tensor) GPUs are more than the {trainers} of the "
        fewer = f"rollout.servers.replicas={max(1, trainers // servers.tensor)}"
        fix = fewer if servers.tensor <= trainers else f"{fewer} and rollout.servers.tensor={trainers}"
        yield Problem(field, None, wrong + "trainer, on which they take turns", fix)
    away = [device for device in servers.devices or () if device >= trainers]
    if away:
        wrong = f"no process of the trainer has GPU {away[0]}, and colocated servers are on the trainer's"
        yield Problem(field, servers.devices, wrong, f"{field}=null, or rollout.placement=disaggregated")


def _trainers(config: Config, launched: int | None) -> int:
    """The processes of the trainer on a node; if nothing says how many: at least the first one, on the first GPU."""
    return trainers_on_node(config, config.parallel.world_size if launched is None else launched) or 1


def _disaggregated(config: Config, launched: int | None) -> Iterator[Problem]:
    """Servers that keep their memory, on GPUs of the trainer, whose processes use the first ones of a node."""
    servers, cluster = config.rollout.servers, config.cluster
    if config.rollout.is_colocated or (cluster is not None and cluster.rollout_nodes):  # all servers are there
        return
    trainers = _trainers(config, launched)
    field = "rollout.servers.devices"
    if servers.devices is None:
        node, wanted = (0, 0) if cluster is None else (cluster.gpus_per_node, servers_on_node(servers))
        if wanted and trainers + wanted > node:
            wrong = f"{trainers} processes of the trainer and {servers.replicas} x {servers.tensor} GPUs of servers "
            wrong += f"(replicas x tensor) are more than the {node} of a node"
            fix = "fewer servers (rollout.servers.replicas, rollout.servers.tensor), or rollout.engine=embedded"
            if cluster is not None and wanted < node:
                processes = (node - wanted) * cluster.training_nodes
                fix += f", or launch {processes} processes" if launched else f", or parallel.world_size={processes}"
            yield Problem(field, None, wrong, fix)
        return
    both = sorted({device for device in servers.devices if device < trainers})
    if both and servers.transport is Transport.group:
        wrong = f"the trainer uses GPU {both[0]} too, and NCCL has no group with two members on one GPU"
        fix = "rollout.servers.transport=shared, or other devices"
        yield Problem(field, servers.devices, wrong, fix)
