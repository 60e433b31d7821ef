"""Where servers are started, and at which address: all ranks agree, or all of them say what is wrong."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tempo.config.choices import Transport
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import InputError
from megatron_tempo.rollout import server_nodes, servers
from megatron_tempo.rollout.server_nodes import ServerNodes
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.rollout.transfer import Fed
from tests.support.ranks import run_ranks

CPU = torch.device("cpu")


def engine_of(config: ServersConfig) -> ServersEngine:
    """An engine that only knows its configuration."""
    engine = ServersEngine.__new__(ServersEngine)
    engine._config, engine._gpus = config, None
    return engine


def nodes_of(config: ServersConfig, copy: int = 0, *, colocated: bool = False) -> ServerNodes:
    assert dist.group.WORLD is not None
    return server_nodes.server_nodes(config, CPU, dist.group.WORLD, copy, colocated=colocated)


def places(addresses: list[list[str]]) -> list[list[int] | str]:
    """For each case (the addresses of the ranks' machines; none: no address), the nodes or the error."""
    dist.init_process_group("gloo")
    rank, devices = dist.get_rank(), []
    os.environ["LOCAL_RANK"] = "0"
    for case in addresses:

        def own_address(host: str, address: str = case[rank]) -> str:
            if not address:
                raise InputError(f"{host} has no IPv4 address here")
            return address

        server_nodes.own_address = own_address
        socket.gethostname = lambda: f"node{rank}"  # type: ignore[assignment]
        try:
            devices.append(nodes_of(ServersConfig(host="hostname", each_node=True)).first)
        except InputError as error:
            devices.append(str(error))
    dist.destroy_process_group()
    return devices


def test_all_ranks_agree(tmp_path: Path) -> None:
    cases = [["10.0.0.1", "10.0.0.2"], ["10.0.0.1", "127.0.1.1"], ["10.0.0.1", ""], ["", "10.0.0.2"]]
    first, second = run_ranks(places, 2, tmp_path, cases)
    assert first == second
    nodes, loopback, *nameless = first
    assert nodes == [0, 1]
    assert "rollout.servers.host=hostname is 127.0.1.1 on node1" in loopback
    assert "give an address that the others reach" in loopback
    assert nameless == ["node1: hostname has no IPv4 address here", "node0: hostname has no IPv4 address here"]


@pytest.mark.parametrize(
    ("visible", "transport", "first", "second"),
    [
        ("4,5,6,7", Transport.group, "6", "7"),
        ("4,5,6,7", Transport.shared, "6,4,5,7", "7,4,5,6"),
        ("GPU-a,GPU-b,GPU-c,GPU-d", Transport.shared, "GPU-c,GPU-a,GPU-b,GPU-d", "GPU-d,GPU-a,GPU-b,GPU-c"),
        (None, Transport.shared, "2,0,1,3", "3,0,1,2"),
    ],
)
def test_what_a_server_sees(
    visible: str | None, transport: Transport, first: str, second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    engine = engine_of(ServersConfig(devices=[2, 3], replicas=2, transport=transport))
    assert [engine._devices(index, [2, 3]) for index in (0, 1)] == [first, second]
    assert engine._devices(0, []) == ""  # on a CPU


def gpus(cases: list[dict[str, Any]]) -> list[list[int] | str]:
    """For each case, where servers are placed on a machine of two ranks and four GPUs, or the error."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    os.environ["LOCAL_RANK"] = str(rank)
    server_nodes.own_gpu = lambda device: f"GPU-{rank}"
    servers.visible_gpus = lambda: [f"GPU-{number}" for number in range(4)]
    for case in cases:
        engine = engine_of(ServersConfig(**case))
        engine._control = dist.group.WORLD
        try:
            nodes = nodes_of(engine._config)
            found.append(engine._placed(nodes.first, nodes.trainers))
        except InputError as error:
            found.append(str(error))
    dist.destroy_process_group()
    return found


def test_all_ranks_agree_where_servers_are_placed(tmp_path: Path) -> None:
    """The first rank starts the servers, and knows the other rank's GPU."""
    cases = [{}, {"replicas": 2}, {"devices": [1]}, {"devices": [1], "transport": Transport.shared}, {"tensor": 4}]
    first, second = run_ranks(gpus, 2, tmp_path, cases)
    assert first[:2] == [[2], [2, 3]]
    assert second[:2] == [[], []]
    assert first[2] == second[2]
    assert "rollout.servers.devices=[1]: the trainer uses GPU 1 too" in first[2]
    assert (first[3], second[3]) == ([1], [])
    assert first[4] == second[4]
    assert "rollout.servers.devices=null" in first[4]


def fed(cases: list[tuple[str, list[int], dict[str, Any], bool]]) -> list[list[Fed] | str | None]:
    """For each case (the machine of each rank, by a letter; the copy of each rank; servers; whether these are
    colocated), which copies feed which servers, or the error."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), []
    server_nodes.own_address = lambda host: "10.0.0.1"
    for machines, copies, config, colocated in cases:
        os.environ["LOCAL_RANK"] = str(machines[:rank].count(machines[rank]))
        socket.gethostname = lambda name=machines[rank]: name  # type: ignore[assignment]
        given = ServersConfig(transport=Transport.shared, **config)
        try:
            found.append(nodes_of(given, copies[rank], colocated=colocated).fed)
        except InputError as error:
            found.append(str(error))
    dist.destroy_process_group()
    return found


def test_servers_are_fed_by_the_copies_of_the_model_on_their_own_machine(tmp_path: Path) -> None:
    """From where the ranks really are: a launcher may number them otherwise than node by node."""
    each, two = {"each_node": True}, {"each_node": True, "replicas": 2}
    cases = [
        ("aaaa", [0, 0, 1, 1], each, True),  # one machine: all copies
        ("aabb", [0, 0, 1, 1], each, True),  # tensor 2
        ("aabb", [0, 1, 2, 3], two, False),  # tensor 1
        ("aabb", [0, 0, 1, 1], {"replicas": 2}, True),  # only the first node has servers
        ("abab", [0, 1, 0, 1], two, True),  # ranks dealt to the machines by turns
        ("aabb", [0, 1, 0, 1], each, False),  # pipeline 2
        ("abab", [0, 0, 1, 1], each, True),
        ("aaab", [0, 0, 1, 1], each, True),
        ("aabb", [0, 1, 2, 3], {"addresses": ["http://a:1"]}, False),
    ]
    ranks = run_ranks(fed, 4, tmp_path, cases)
    assert all(found == ranks[0] for found in ranks), "every rank knows the same"
    alone, tensors, copies, first, dealt, pipeline, torn, uneven, addresses = ranks[0]
    assert alone is None
    assert tensors == [Fed((0,), (0,)), Fed((1,), (1,))]
    assert copies == [Fed((0, 1), (0, 1)), Fed((2, 3), (2, 3))]
    assert first == [Fed((0, 1), (0,))]
    assert dealt == [Fed((0, 1), (0,)), Fed((2, 3), (1,))]
    assert "a has servers and 2 processes of the trainer, which hold no whole copy" in pipeline
    assert "parallel.pipeline=1 and a parallel.tensor that divides 2" in pipeline
    assert pipeline.endswith("or give group")
    assert torn.endswith("or give rollout.placement=disaggregated and rollout.servers.transport=group")
    assert "b has servers and 1 processes" in uneven
    assert "does not know on which of them the servers of rollout.servers.addresses are: give group" in addresses
