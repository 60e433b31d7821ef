"""A fleet of one server on a real socket."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.rollout.engine import EngineWork
from megatron_tempo.rollout.fleet import Fleet
from megatron_tempo.rollout.server_adapter import ServerAdapter


class OneServer:
    """A source of servers that has one."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def start(self, index: int) -> str:
        return self._url


def update(fleet: Fleet, version: int) -> None:
    assert fleet.end_update(fleet.begin_update(empty_only=False), {}, version, {}) is None


def opened_fleet(adapter: ServerAdapter, url: str, config: ServersConfig | None = None) -> Fleet:
    """A fleet of this server, with weights of version 0."""
    fleet = Fleet(adapter, config or ServersConfig(), OneServer(url), 1, "key", [0], 100, EngineWork())
    fleet.open()
    update(fleet, 0)
    return fleet


@contextmanager
def fleet_of(adapter: ServerAdapter, url: str, config: ServersConfig | None = None) -> Iterator[Fleet]:
    """`opened_fleet`, closed at the end of the block."""
    fleet = opened_fleet(adapter, url, config)
    try:
        yield fleet
    finally:
        fleet.close()
