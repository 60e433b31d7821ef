"""Rules on the engine that generates."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.config.choices import EngineKind, EnginePrecision, Transport
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config, ServersConfig
from megatron_tempo.errors import InputError
from megatron_tempo.input_files import read_text

_ADDRESS = re.compile(r"https?://[^/\s:]+:\d+")

_LOOPBACK = re.compile(r"https?://(127\.|localhost)")


def check(config: Config) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.max_staleness:
        yield from _ahead(config)
    if rollout.engine is EngineKind.embedded:
        return
    servers = rollout.servers
    yield from _started(rollout.engine, servers) if servers.addresses is None else _found(servers)
    if servers.transport is Transport.shared:
        yield from _shared(servers)


def _ahead(config: Config) -> Iterator[Problem]:
    if config.rollout.engine is EngineKind.embedded:
        wrong = "the embedded engine generates in the trainer's processes, not beside them"
        yield Problem("rollout.max_staleness", 1, wrong, "rollout.engine=sglang or vllm, or rollout.max_staleness=0")
    if config.rollout.replay is not None:
        yield Problem("rollout.max_staleness", 1, "a replay generates nothing", "rollout.max_staleness=0")


def _started(engine: EngineKind, servers: ServersConfig) -> Iterator[Problem]:
    if shutil.which(servers.python) is None:
        fix = f"give rollout.servers.python=ENVIRONMENT/bin/python, of the environment that has {engine.name}"
        yield Problem("rollout.servers.python", servers.python, "is no program that can be run", fix)
    wanted = servers.replicas * servers.tensor
    if servers.devices is not None and len(servers.devices) != wanted:
        fix = f"give {wanted} of them, or change rollout.servers.replicas or rollout.servers.tensor"
        wrong = f"are {len(servers.devices)} devices for {servers.replicas} x {servers.tensor} (replicas x tensor)"
        yield Problem("rollout.servers.devices", servers.devices, wrong, fix)
    if servers.key_file is not None:
        fix = "rollout.servers.key_file=null, or give rollout.servers.addresses"
        yield Problem("rollout.servers.key_file", servers.key_file, "servers that we start get a key of ours", fix)


def _found(servers: ServersConfig) -> Iterator[Problem]:
    assert servers.addresses is not None
    for address in servers.addresses:
        if not _ADDRESS.fullmatch(address):
            yield Problem("rollout.servers.addresses", address, "is no address", "give it as http://HOST:PORT")
    if len(set(servers.addresses)) < len(servers.addresses) or not servers.addresses:
        wrong = "is empty" if not servers.addresses else "names a server twice"
        yield Problem("rollout.servers.addresses", servers.addresses, wrong, "give each server's address once")
    away = [address for address in servers.addresses if not _LOOPBACK.match(address)]
    if away and servers.host.startswith("127."):
        wrong = f"is where {away[0]} is to fetch weights from, and not reached from another machine"
        yield Problem("rollout.servers.host", servers.host, wrong, "rollout.servers.host=hostname")
    if servers.key_file is None:
        fix = "give the file that the servers have their key from"
        yield Problem("rollout.servers.key_file", None, "servers without a key are not used", fix)
    else:
        yield from check_key("rollout.servers.key_file", servers.key_file)
    if servers.each_node:
        fix = "rollout.servers.each_node=false: all servers are found by their addresses"
        yield Problem("rollout.servers.each_node", True, "none is started where addresses are given", fix)


def _shared(servers: ServersConfig) -> Iterator[Problem]:
    fix = "rollout.servers.transport=group"
    if servers.each_node:
        wrong = "memory is shared within one node, and servers are started on every one"
        yield Problem("rollout.servers.transport", "shared", wrong, fix)
    if servers.precision is EnginePrecision.fp8:
        wrong = "matrices are made FP8 where they are whole, which is not so in shared memory"
        yield Problem("rollout.servers.transport", "shared", wrong, fix)


def check_key(field: str, path: str) -> Iterator[Problem]:
    """A file that holds a key."""
    try:
        if not read_text(Path(path)).strip():
            yield Problem(field, path, "is empty", "write the server's key into it")
    except InputError as error:
        yield Problem(field, path, str(error).removeprefix(f"{path} "), "give the file with the server's key")
