"""Sources of servers: started on one node or on each, or found at given addresses.

Rank 0 orders a server, and the first rank of a node starts it, so that a server is a child of a process on its node.
Orders and replies go through a torch store: "order/NODE/N" is the N-th order to a node, "reply/SERVER/N" the reply to
the N-th order to a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta

import httpx
import torch.distributed as dist

from megatron_tempo.config.hosts import host_of
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rollout.connections import CONNECT_SECONDS, authorised
from megatron_tempo.rollout.engine_versions import check_version
from megatron_tempo.rollout.server import Server
from megatron_tempo.rollout.server_adapter import ServerAdapter
from megatron_tempo.runtime import progress_marker

log = logging.getLogger(__name__)

_FOREVER = timedelta(days=365)


def private_store(host: str, timeout: timedelta) -> dist.TCPStore:
    """A torch store that listens only at one address. By default it would listen at all of the machine's."""
    listener = socket.socket()
    listener.bind((host, 0))
    listener.listen(128)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=listener.detach()
    )


class ServerSupervisor:
    """Starts and ends the servers of this node, on orders from rank 0."""

    def __init__(self, store: tuple[str, int], node: int, make: Callable[[int], Server]) -> None:
        """`store`: has the orders. `make`: starts the server of an index, without waiting for it."""
        self._store, self._node, self._make = store, node, make
        self._servers: dict[int, Server] = {}
        self._closing = False
        # A server ends with the thread that started it, so this thread runs as long as servers are needed.
        self._thread = threading.Thread(target=self._serve, name="supervisor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        for server in list(self._servers.values()):
            server.close()

    def _serve(self) -> None:
        orders, number = dist.TCPStore(*self._store, is_master=False, timeout=_FOREVER), 0
        while True:
            try:
                order = json.loads(orders.get(f"order/{self._node}/{number}"))
            except dist.DistError:  # the first rank is gone
                return self.close()
            number += 1
            reply = f"reply/{order['server']}/{order['start']}"
            if (old := self._servers.pop(order["server"], None)) is not None:
                old.close()
            if self._closing:
                return None
            if order["ends"]:
                orders.set(reply, json.dumps({"url": ""}))
                continue
            try:
                server = self._servers[order["server"]] = self._make(order["server"])
            except (OSError, InputError) as error:
                orders.set(reply, json.dumps({"error": str(error)}))
            else:
                threading.Thread(target=self._wait, args=(server, reply), daemon=True).start()

    def _wait(self, server: Server, reply: str) -> None:
        try:
            server.wait()
            answer = {"url": server.url}
        except EngineError as error:
            server.close()
            answer = {"error": str(error)}
        dist.TCPStore(*self._store, is_master=False).set(reply, json.dumps(answer))


class SupervisedServers:
    """A `Starter`, on the first rank: sends orders to the supervisor of a server's node."""

    def __init__(self, store: dist.TCPStore, per_node: int) -> None:
        """Server i is on node i // `per_node`."""
        self._store, self._per_node = store, per_node
        self._orders: Counter[int] = Counter()
        self._starts: Counter[int] = Counter()

    async def start(self, index: int) -> str:
        return await self._order(index, ends=False)

    async def end(self, index: int) -> None:
        await self._order(index, ends=True)

    async def _order(self, index: int, *, ends: bool) -> str:
        node, start = index // self._per_node, self._starts[index]
        order = f"order/{node}/{self._orders[node]}"
        self._orders[node] += 1
        self._starts[index] += 1
        self._store.set(order, json.dumps({"server": index, "start": start, "ends": ends}))
        reply = f"reply/{index}/{start}"
        while not self._store.check([reply]):
            await asyncio.sleep(0.1)
        answer = json.loads(self._store.get(reply))
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer["url"]


UNRESOLVED = 20  # checks, two a second, after which a host that does not resolve is given up


async def _resolves(url: str) -> bool:
    try:
        await asyncio.get_running_loop().getaddrinfo(host_of(url), None)
    except (OSError, UnicodeError):
        return False
    return True


class ExternalServers:
    """A `Starter` for servers that somebody else starts: it waits until they answer."""

    def __init__(self, adapter: ServerAdapter, addresses: Sequence[str], key: str, seconds: float) -> None:
        self._adapter, self._addresses, self._key, self._seconds = adapter, addresses, key, seconds

    async def start(self, index: int) -> str:
        url, deadline, last = self._addresses[index], time.monotonic() + self._seconds, "it does not answer"
        headers, unresolved = authorised(self._key), 0
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=5.0, trust_env=False) as client:
            while time.monotonic() < deadline:
                progress_marker.mark()
                try:
                    response = await client.get(self._adapter.health.path)
                    if response.status_code == 200:
                        with contextlib.suppress(httpx.HTTPError):
                            answer = await client.get(self._adapter.asks_for_version.path)
                            check_version(self._adapter.versions, answer.text, url)
                        return url
                    last = f"{self._adapter.health.path} is answered with {response.status_code}"
                    if response.status_code in (401, 403):
                        raise EngineError(f"{url} does not take the key of rollout.servers.key_file")
                except httpx.HTTPError as error:
                    last = f"{type(error).__name__} {error}".rstrip()
                    unresolved = 0 if await _resolves(url) else unresolved + 1
                    if unresolved == UNRESOLVED:
                        machine = socket.gethostname()
                        raise EngineError(f"{url}: the host does not resolve on {machine}: mend the address") from error
                await asyncio.sleep(0.5)
        raise EngineError(f"no {self._adapter.name} server at {url} ({last}): start it, or mend the address")

    async def end(self, index: int) -> None:
        """Somebody else does."""


def parts_are_taken(adapter: ServerAdapter, addresses: Sequence[str], key: str) -> bool:
    """Whether the servers that others have started all take tensors in parts. One that does not answer does not."""
    call = adapter.asks_for_parts
    if call is None:
        return adapter.takes_parts
    for address in addresses:
        try:
            answer = httpx.get(
                f"{address}{call.path}", headers=authorised(key), timeout=CONNECT_SECONDS, trust_env=False
            )
            taken = answer.status_code == 200 and adapter.answers_parts(answer.text)
        except (httpx.HTTPError, ValueError) as error:
            taken = False
            log.info("%s: %s: %s", address, call.path, error)
        if not taken:
            log.info("%s takes whole tensors only: buckets are as large as the largest tensor", address)
            return False
    return True
