"""When wrong weights are sent again, when restarted servers pass the gate, and what is wrong with weights."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import httpx
import pytest
import torch
import torch.distributed as dist

from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import DriftError
from megatron_tempo.rollout.checksum import checksum, checksums_of
from megatron_tempo.rollout.engine import AnswersByServer
from megatron_tempo.rollout.read_back import EVERYTHING, SELECTIONS, Selection
from megatron_tempo.rollout.server_adapter import Call
from megatron_tempo.rollout.server_checks import wrong_weights
from megatron_tempo.rollout.servers import ServersEngine
from megatron_tempo.rollout.vllm import Vllm
from tests.support.logged import logged


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class StandInFleet:
    """`restarted`: the servers that wait for the gate."""

    def __init__(self, restarted: Sequence[int] = ()) -> None:
        self.waits = list(restarted)

    def none_is_left(self) -> bool:
        return False

    def restarted(self) -> list[int]:
        return self.waits

    def release(self) -> None:
        self.waits = []


class Updated(ServersEngine):
    """An engine whose updates are only noted. `wrong`: what is found after each, one after another; then nothing."""

    def __init__(self, wrong: Sequence[str] = (), *, resyncs: bool, restarted: Sequence[int] = ()) -> None:
        self._config, self._control, self._updates = ServersConfig(), dist.group.WORLD, 0
        self._resyncs, self.resynced, self.gate, self._is_in_gate = resyncs, 0, None, False
        self._fleet, self._gpus, self._asleep = cast(Any, StandInFleet(restarted)), None, False
        self.wrong, self.updates = list(wrong), []

    def _update(self, *, empty_only: bool, selection: Selection | None) -> str | None:
        self.updates.append((empty_only, selection))
        return self.wrong.pop(0) if self.wrong else None


def test_by_default_wrong_weights_stop_the_run() -> None:
    engine = Updated(["server 1 does not hold"], resyncs=False)
    with pytest.raises(DriftError, match="server 1 does not hold"):
        engine.load_weights(cast(Any, None), 0)
    assert engine.updates == [(False, EVERYTHING)]


def test_with_resync_they_are_sent_to_all_once_more() -> None:
    engine = Updated(["server 1 does not hold"], resyncs=True)
    with logged(logging.WARNING) as messages:
        engine._feed(empty_only=True, selection=Selection(3, SELECTIONS))
    assert messages == ["server 1 does not hold; all weights are sent again"]
    assert engine.updates == [(True, Selection(3, SELECTIONS)), (False, EVERYTHING)]
    assert engine.resynced == 1
    engine = Updated(["first", "second"], resyncs=True)
    with logged(logging.WARNING), pytest.raises(DriftError, match="second"):
        engine.load_weights(cast(Any, None), 0)
    assert len(engine.updates) == 2


@pytest.mark.parametrize("every", [1, 3])
def test_after_some_updates_every_selection_has_been_read_back(every: int) -> None:
    engine = Updated(resyncs=False)
    engine._config.checksums_every = every
    for version in range(every * (SELECTIONS + 1)):
        engine.load_weights(cast(Any, None), version)
    compared = [selection for _, selection in engine.updates]
    assert compared[0] == EVERYTHING
    assert {selection.index for selection in compared[1:] if selection is not None} == set(range(SELECTIONS))
    assert [i for i, selection in enumerate(compared) if selection is not None] == list(range(0, len(compared), every))
    engine._config.checksums_every = 0
    engine.load_weights(cast(Any, None), 99)
    assert engine.updates[-1] == (False, None)


def test_a_restarted_server_answers_after_the_gate_only() -> None:
    engine = Updated(resyncs=False, restarted=[2])
    assert isinstance(engine, AnswersByServer)
    engine.load_weights(cast(Any, None), 0)
    assert engine._first.restarted() == [2], "there is no gate, so nothing is released either"
    called: list[list[int]] = []

    def gate() -> None:
        called.append(list(engine._first.restarted()))
        engine.load_weights(cast(Any, None), 1)  # against a drift: it does not lead to the gate again

    engine.gate = gate
    engine.load_weights(cast(Any, None), 1)
    engine.load_weights(cast(Any, None), 2)  # nothing waits any more
    assert called == [[2]]
    assert engine._first.restarted() == []


def test_a_restarted_server_that_does_not_pass_is_not_released() -> None:
    engine = Updated(resyncs=False, restarted=[0])

    def gate() -> None:
        raise DriftError("garbled")

    engine.gate = gate
    with pytest.raises(DriftError, match="garbled"):
        engine.load_weights(cast(Any, None), 0)
    assert engine._first.restarted() == [0]


# What is wrong with weights

NAME, OTHER = "model.norm.weight", "model.layers.0.input_layernorm.weight"


def answering(arrived: dict[str, Any], installed: dict[str, str] | None) -> Callable[[Sequence[Call]], Any]:
    """A worker's answers: (checksum, size) of what arrived, the checksum of what is installed; None: it dies."""

    async def ask(calls: Sequence[Call]) -> httpx.Response | None:
        assert calls[0].body is not None
        if calls[0].body["method"] == "checksums":
            return httpx.Response(200, json={"results": [{"tensors": arrived, "blocks": [], "missing": []}]})
        assert calls[0].body == {"method": "read_back", "args": [0, 1]}
        if installed is None:
            return None
        tensors = [[name, name, "0,0,1", total] for name, total in installed.items()]
        return httpx.Response(200, json={"results": [{"tensors": tensors, "unread": []}]})

    return ask


def found(arrived: dict[str, Any], installed: dict[str, str] | None) -> str | None:
    expected = checksums_of(list(sent().items()))
    adapter = Vllm(cpu=True, tensor=1)
    return asyncio.run(wrong_weights(adapter, answering(arrived, installed), expected, EVERYTHING))


def sent() -> dict[str, torch.Tensor]:
    return {NAME: torch.ones(4), OTHER: torch.full((4,), 2.0)}


def test_what_arrived_and_what_is_installed_are_compared() -> None:
    arrived = {name: (total, str(size)) for name, (total, size) in checksums_of(list(sent().items())).items()}
    installed = {name: checksum(one) for name, one in sent().items()}
    assert found(arrived, installed) == ""
    swapped = {NAME: installed[OTHER], OTHER: installed[NAME]}
    assert found(arrived, swapped) == (f"does not hold the actor's weights: 2 of 2 tensors differ, first {OTHER}")
    text = found(arrived | {NAME: ("0" * 16, "3.0")}, installed)
    assert text == f"does not hold the actor's weights: 1 of 2 tensors differ, first {NAME}"
    assert found(arrived, {NAME: installed[NAME]}) is not None, "one is not installed anywhere"
    assert f"first {OTHER}" in (found(arrived, {NAME: installed[NAME]}) or "")
    assert found(arrived, None) is None, "the server has died"
