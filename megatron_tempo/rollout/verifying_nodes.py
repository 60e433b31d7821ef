"""The nodes of a run, which share the verification of responses that only the first rank has.

The first rank orders the verification of a prompt's responses, and the first rank of another node does it. Orders and
replies go through a torch store of their own: "order/SESSION/NODE/LANE/N" is the N-th order on a lane, and
"reply/..." its reply. Both are deleted when they are read. A session is one collection; a lane has one order at a time.
The first rank of each other node says every few seconds that it is there: "alive/NODE".
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.runtime import progress_marker

ALIVE_SECONDS = 5.0  # between two signs of life
LOST_SECONDS = 60.0  # without one, after which a node counts as lost
_FOREVER = timedelta(days=365)
_ERRORS: dict[str, type[Exception]] = {"InputError": InputError, "EngineError": EngineError}

Result = list[float] | list[int | None]


@dataclass(frozen=True, slots=True)
class Node:
    """A node besides the first one. `rank`: its first rank."""

    rank: int
    host: str


@dataclass(slots=True)
class VerifyingNodes:
    """All ranks have one, made by `joined`; `sessions` counts the collections.

    `own`: the place in `others` of the node whose first rank this is; None on the first rank and on all that take no
    part.
    """

    address: tuple[str, int]
    others: list[Node]
    own: int | None
    store: dist.TCPStore | None  # on the first rank
    sessions: int = 0
    _closing: threading.Event = field(default_factory=threading.Event)
    _signs: dict[int, tuple[str, float]] = field(default_factory=dict)  # the last sign of each node, and when it came

    def connect(self) -> dist.TCPStore:
        """A connection of its own: a thread that waits on one keeps others from using it."""
        return dist.TCPStore(*self.address, is_master=False, timeout=_FOREVER)

    def close(self) -> None:
        self._closing.set()

    def show_life(self) -> None:
        """Begin to give signs of life, each with the time of this process's last progress."""
        store = self.connect()

        def run() -> None:
            signs = 0
            while not self._closing.is_set():
                try:
                    store.set(f"alive/{self.own}", f"{signs} {progress_marker.MARKER.last}")
                except dist.DistError:  # the first rank is gone
                    return
                signs += 1
                self._closing.wait(ALIVE_SECONDS)

        threading.Thread(target=run, name="verification-alive", daemon=True).start()

    def check(self, store: dist.TCPStore, place: int) -> None:
        """Look for a sign of life of a node, and take over its progress. Raises EngineError if the node is lost."""
        sign = store.get(f"alive/{place}").decode() if store.check([f"alive/{place}"]) else ""
        last, since = self._signs.get(place, (None, 0.0))
        if sign != last:
            if last is not None and sign.partition(" ")[2] != last.partition(" ")[2]:
                progress_marker.mark()
            self._signs[place] = (sign, time.monotonic())
        elif time.monotonic() - since > LOST_SECONDS:
            node = self.others[place]
            raise EngineError(
                f"rank {node.rank} on {node.host}, which verifies responses, has not been heard from for "
                f"{LOST_SECONDS:g} s: look at that machine and the log of that rank, then start the run again"
            )


def joined(group: dist.ProcessGroup, open_store: Callable[[], dist.TCPStore | None]) -> VerifyingNodes | None:
    """The nodes of this run; None if there is one. Collective.

    `open_store`: a collective call that returns the store on the first rank, None on the others; it is made only if
    there are several nodes. A node's first rank is the one whose LOCAL_RANK is 0, as in `ServersEngine`.
    """
    places: list[Any] = [None] * dist.get_world_size()
    mine = (socket.gethostname(), int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    dist.all_gather_object(places, mine, group=group)
    others = [Node(rank, host) for rank, (host, local) in enumerate(places) if local == 0 and rank != 0]
    if not others:
        return None
    store = open_store()
    address: list[Any] = [None if store is None else (store.host, store.port)]
    dist.broadcast_object_list(address, src=0, group=group)
    own = next((place for place, node in enumerate(others) if node.rank == dist.get_rank()), None)
    nodes = VerifyingNodes(address[0], others, own, store)
    if own is not None:
        nodes.show_life()
    return nodes


def serve(nodes: VerifyingNodes, session: int, lane: int, verify: Callable[[bytes], Result]) -> None:
    """Carry out the orders of one lane until it ends, or the first rank is gone."""
    store, number = nodes.connect(), 0
    while True:
        name = f"{session}/{nodes.own}/{lane}/{number}"
        try:
            order = store.get(f"order/{name}")
            store.delete_key(f"order/{name}")
            if not order:
                return
            store.set(f"reply/{name}", json.dumps(_reply(order, verify)))
        except dist.DistError:
            return
        number += 1


def _reply(order: bytes, verify: Callable[[bytes], Result]) -> dict[str, Any]:
    try:
        return {"result": verify(order)}
    except Exception as error:  # noqa: BLE001 - the first rank raises it
        return {"error": type(error).__name__, "message": str(error)}


class Lane:
    """The first rank's end of a lane to another node."""

    def __init__(self, nodes: VerifyingNodes, session: int, place: int, lane: int) -> None:
        self._nodes, self._place, self._store = nodes, place, nodes.connect()
        self._name, self._number = f"{session}/{place}/{lane}", 0

    def verify(self, order: bytes, is_over: Callable[[], bool]) -> Result | None:
        """The result of an order; None if `is_over` before it comes.

        Raises the node's InputError or EngineError, RuntimeError for any other error there, and EngineError if the node
        is lost.
        """
        name = f"{self._name}/{self._number}"
        self._store.set(f"order/{name}", order)  # type: ignore[arg-type]  # torch takes bytes too
        self._number += 1
        while not self._has_come(f"reply/{name}"):
            if is_over():
                return None
            self._nodes.check(self._store, self._place)
        reply = json.loads(self._store.get(f"reply/{name}"))
        self._store.delete_key(f"reply/{name}")
        progress_marker.mark()
        if "error" in reply:
            kind, message = reply["error"], reply["message"]
            if kind in _ERRORS:
                raise _ERRORS[kind](message)
            node = self._nodes.others[self._place]
            raise RuntimeError(f"rank {node.rank} on {node.host} verified responses: {kind}: {message}")
        result: Result = reply["result"]
        return result

    def end(self) -> None:
        self._store.set(f"order/{self._name}/{self._number}", "")

    def _has_come(self, name: str) -> bool:
        try:
            self._store.wait([name], timedelta(seconds=ALIVE_SECONDS))
        except dist.DistStoreError:
            return False
        return True
