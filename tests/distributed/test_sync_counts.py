"""What the ranks of a weight sync send, counted: every copy of the model sends an equal part, and gathers no more."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.models.megatron_compat.torch_private import join_separate_group
from megatron_tempo.rollout.checksum import checksum
from megatron_tempo.rollout.replica import Target
from megatron_tempo.rollout.server_adapter import Call, WeightGroupInfo
from megatron_tempo.rollout.slices import Slices
from megatron_tempo.rollout.transfer import Senders
from megatron_tempo.types import Bucket
from megatron_tempo.weights.stream import WeightStream
from tests.distributed.test_stream import opened
from tests.support.ports import reserve_port
from tests.support.ranks import run_ranks
from tests.support.tiny import write_model

LIMIT = 12_000  # bytes of a bucket
DIES_AT = 3  # the number of a bucket
WAIT = timedelta(seconds=60)


class Adapter:
    """Calls of a server that only receives: `served`."""

    takes_parts = True

    def join_group(self, info: WeightGroupInfo) -> Call:
        return Call("/join", {"host": info.host, "port": info.port, "group": info.group, "world": info.world})

    def asks_for_places(self) -> Call | None:
        return None

    def update(
        self, bucket: Bucket, group: str | None, version: int, *, compare: bool, slices: Slices | None = None
    ) -> Call:
        assert slices is None
        sizes = {name: tensor.nbytes for name, tensor in bucket}
        return Call("/update", {"group": group, "sizes": sizes})


class Worker:
    """A worker of a server: joins groups, receives buckets and counts them."""

    def __init__(self, number: int) -> None:
        self.number, self.messages, self.bytes = number, 0, 0
        self.groups: dict[str, dist.ProcessGroup] = {}
        self.received: Counter[str] = Counter()
        self.checksums: dict[str, str] = {}

    def join(self, call: dict[str, Any]) -> None:
        store = dist.TCPStore(call["host"], call["port"], is_master=False, timeout=WAIT)
        prefixed = dist.PrefixStore(call["group"], store)
        self.groups[call["group"]] = join_separate_group(
            prefixed, call["group"], 1 + self.number, call["world"], "gloo", WAIT
        )

    def update(self, call: dict[str, Any]) -> None:
        flat = torch.empty(sum(call["sizes"].values()), dtype=torch.uint8)
        dist.broadcast(flat, src=0, group=self.groups[call["group"]])
        self.messages += 1
        self.bytes += flat.nbytes
        for (name, size), part in zip(call["sizes"].items(), flat.split(list(call["sizes"].values())), strict=True):
            self.received[name] += size
            self.checksums[name] = checksum(part)


def served(
    port: int, store_port: int, number: int, workers: int, dies_at: int | None, kind: type[Worker] = Worker
) -> dict[str, Any]:
    """A worker of a server. The first one takes the calls, and hands them on to the others by a store.

    It goes away when a sender broadcasts bucket number `dies_at`.
    """
    worker = kind(number)
    store = dist.TCPStore("127.0.0.1", store_port, is_master=number == 0, timeout=WAIT, wait_for_workers=False)

    def act(count: int) -> bool:
        path, call = json.loads(store.get(f"call{count}"))
        if path == "/update" and worker.messages == dies_at:
            return False
        if path != "/end":
            getattr(worker, path.removeprefix("/"))(call)
        store.set(f"done{count}/{number}", "")
        return bool(path != "/end")

    if number:
        count = 0
        while act(count):
            count += 1
    else:
        _answer_calls(port, store, act, workers)
    store.set(f"left{number}", "")
    if number == 0:  # the store ends with this process
        store.wait([f"left{one}" for one in range(workers)], WAIT)
    return vars(worker) | {"groups": len(worker.groups)}


def _answer_calls(port: int, store: dist.Store, act: Any, workers: int) -> None:
    class Handler(BaseHTTPRequestHandler):
        count = 0

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            count, Handler.count = Handler.count, Handler.count + 1
            store.set(f"call{count}", json.dumps([self.path, body]))
            if not act(count):
                threading.Thread(target=self.server.shutdown).start()
                if self.path == "/update":
                    return
            store.wait([f"done{count}/{number}" for number in range(workers)], WAIT)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments: object) -> None: ...

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        server.serve_forever()


def _wait_until_open(port: int) -> None:
    deadline = time.monotonic() + WAIT.total_seconds()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        else:
            return


@contextmanager
def counted(*, slices: bool = False) -> Iterator[Counter[str]]:
    """Bytes and messages that this rank sends and receives meanwhile. `slices`: it is the only tensor rank."""
    counts: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as monkeypatch:
        batch, broadcast, isend = dist.batch_isend_irecv, dist.broadcast, dist.isend
        lock = threading.Lock()

        def add(kind: str, size: int) -> None:
            with lock:
                counts.update({f"{kind}, bytes": size, f"{kind}, messages": 1})

        def messages(ops: list[dist.P2POp]) -> Any:
            for op in ops:
                add("gather, sent" if op.op is dist.isend else "gather, received", op.tensor.nbytes)
            return batch(ops)

        def to_servers(tensor: Tensor, **options: Any) -> Any:
            add("to servers", tensor.nbytes)
            return broadcast(tensor, **options)

        def to_worker(tensor: Tensor, **options: Any) -> Any:
            add("to servers", tensor.nbytes)
            return isend(tensor, **options)

        monkeypatch.setattr(dist, "batch_isend_irecv", messages)
        if slices:
            monkeypatch.setattr(dist, "isend", to_worker)  # which the gather compares its messages with
        monkeypatch.setattr(dist, "broadcast", to_servers)
        yield counts


def take_part(
    model: Path,
    layout: tuple[int, int, int],
    servers: int,
    workers: int,
    ports: list[tuple[int, int]],
    dies: int | None = None,
    kind: type[Worker] = Worker,
    adapter: Any = None,
) -> Any:
    """One process: a trainer rank of (tensor, pipeline, data) parallelism, or a worker of a server.

    `dies`: the number of a server. `kind` and `adapter`: of servers.
    """
    tensor, pipeline, data = layout
    trainers, rank = tensor * pipeline * data, int(os.environ["RANK"])
    if rank >= trainers:
        server, number = divmod(rank - trainers, workers)
        return served(*ports[server], number, workers, DIES_AT if server == dies else None, kind)
    os.environ["WORLD_SIZE"] = str(trainers)
    config = ServersConfig(tensor=workers, update_seconds=WAIT.total_seconds())
    with opened(model, tensor, pipeline) as (net, own, mappings):
        weights = WeightStream(net, own, mappings, LIMIT)
        senders = Senders(adapter or Adapter(), config, "key", torch.device("cpu"), servers)
        targets = [Target(index, 0, f"http://127.0.0.1:{port}") for index, (port, _) in enumerate(ports)]
        for port, _ in ports:
            _wait_until_open(port)
        with counted(slices=adapter is not None) as counts:
            failed, _ = senders.send(weights, targets, 0, compare=False)
        dist.barrier()
        if rank == 0:
            for port in [port for server, (port, _) in enumerate(ports) if server != dies]:
                httpx.post(f"http://127.0.0.1:{port}/end", json={}, trust_env=False)
        links = len(senders._links)
        senders.close()
        return dict(counts) | {
            "failed": failed,
            "links": links,
            "place": (own.tensor_rank, own.pipeline_rank, own.data_rank),
        }


# (tensor, pipeline, data), servers, workers of each
CASES = {
    "tp2-dp2, 1 server": ((2, 1, 2), 1, 1),
    "tp2-dp2, 2 servers of 2": ((2, 1, 2), 2, 2),
    "dp2, 3 servers": ((1, 1, 2), 3, 1),
    "pp2-dp2, 1 server of 2": ((1, 2, 2), 1, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_every_copy_sends_an_equal_part(tmp_path: Path, case: str) -> None:
    layout, servers, workers = CASES[case]
    tensor, pipeline, data = layout
    model = write_model(tmp_path / "model", tied=False, ffn=192, layers=4)
    ports = [(reserve_port(), reserve_port()) for _ in range(servers)]
    world = tensor * pipeline * data + servers * workers
    results = run_ranks(take_part, world, tmp_path / "ranks", model, layout, servers, workers, ports)
    trainers, receivers = results[: tensor * pipeline * data], results[tensor * pipeline * data :]
    whole = receivers[0]["bytes"]
    for receiver in receivers:  # each tensor once, and the same on every worker
        assert receiver["received"] == receivers[0]["received"]
        assert receiver["checksums"] == receivers[0]["checksums"]
        assert receiver["bytes"] == whole == sum(receiver["received"].values())
    assert all(trainer["failed"] == {} for trainer in trainers)
    print(case, json.dumps(trainers), file=sys.stderr)
    for trainer in trainers:
        sends = trainer["place"][0] == 0
        sent = trainer.get("to servers, bytes", 0)
        assert sent == pytest.approx(whole * servers / (pipeline * data) if sends else 0, rel=0.2)
    assert sum(trainer.get("to servers, bytes", 0) for trainer in trainers) == whole * servers
    gathered = sum(trainer.get("gather, received, bytes", 0) for trainer in trainers)
    # Half of the sharded bytes, and of padding rows, come from the other tensor rank, to each copy that sends them.
    assert gathered <= 1.02 * whole * min(data, servers) * (tensor - 1) / tensor


@pytest.mark.parametrize(("dies", "senders"), [(0, {0}), (2, {0, 1})], ids=["of one copy", "of both copies"])
def test_a_server_that_dies_costs_the_others_nothing(tmp_path: Path, dies: int, senders: set[int]) -> None:
    """Two copies send three servers: everything to one each, and a half each to the third."""
    model = write_model(tmp_path / "model", tied=False, ffn=192, layers=4)
    ports = [(reserve_port(), reserve_port()) for _ in range(3)]
    results = run_ranks(take_part, 5, tmp_path / "ranks", model, (1, 1, 2), 3, 1, ports, dies)
    for copy, trainer in enumerate(results[:2]):
        assert list(trainer["failed"]) == ([dies] if copy in senders else [])
        assert trainer["links"] == (1 if copy in senders else 2)
        assert all(reason.startswith("failed in a weight update: ") for reason in trainer["failed"].values())
    dead = results[2 + dies]
    first, second = (results[2 + server] for server in range(3) if server != dies)
    assert dead["messages"] == DIES_AT
    assert first["checksums"] == second["checksums"]
    assert first["received"] == second["received"]
    assert len(first["received"]) > 30
