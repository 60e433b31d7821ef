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
from megatron_tempo.rollout import servers
from megatron_tempo.rollout.servers import ServersEngine
from tests.support.ranks import run_ranks


def engine_of(config: ServersConfig) -> ServersEngine:
    """An engine that only knows its configuration."""
    engine = ServersEngine.__new__(ServersEngine)
    engine._config, engine._gpus = config, None
    return engine


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

        servers.own_address = own_address
        socket.gethostname = lambda: f"node{rank}"  # type: ignore[assignment]
        engine = engine_of(ServersConfig(host="hostname", each_node=True))
        engine._control = dist.group.WORLD
        try:
            devices.append(engine._nodes(torch.device("cpu"))[0])
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
    servers.own_gpu = lambda device: f"GPU-{rank}"
    servers.visible_gpus = lambda: [f"GPU-{number}" for number in range(4)]
    for case in cases:
        engine = engine_of(ServersConfig(**case))
        engine._control = dist.group.WORLD
        try:
            found.append(engine._placed(*engine._nodes(torch.device("cpu"))))
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
