"""Models that take turns on the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from megatron_tempo.models import offload
from megatron_tempo.models.offload import ModelOffloader

CPU = torch.device("cpu")


@dataclass
class Model:
    """Weights as views of one storage, a moment that stands alone, gradients."""

    size: int
    device: torch.device = CPU
    weights: Tensor = field(init=False)
    moment: Tensor = field(init=False)
    gradients: Tensor = field(init=False)
    caches_dropped: int = 0

    def __post_init__(self) -> None:
        self.weights, self.moment = torch.randn(self.size), torch.randn(self.size, dtype=torch.float64)
        self.gradients = torch.randn(self.size)

    def persistent_tensors(self) -> Iterable[Tensor]:
        return [*self.weights.chunk(2), self.weights[1:3], self.moment]

    def sent_tensors(self) -> Iterable[Tensor]:
        return self.weights.chunk(2)

    def drop_leftovers(self) -> None:
        """No pass runs."""

    def drop_caches(self) -> None:
        self.caches_dropped += 1

    def transient_tensors(self) -> Iterable[Tensor]:
        return [self.gradients]

    def there(self) -> int:
        """Bytes on the device."""
        return sum(x.untyped_storage().nbytes() for x in (self.weights, self.moment, self.gradients))


def test_one_at_a_time_and_each_comes_back_as_it_left() -> None:
    first = Model(100)
    one_at_a_time = ModelOffloader(one_at_a_time=True)
    one_at_a_time.load(first)
    half = first.weights.chunk(2)[1]  # a view that somebody keeps
    before = [tensor.clone() for tensor in first.persistent_tensors()]
    one_at_a_time.offload_all()
    assert first.there() == 0
    second = Model(60)
    one_at_a_time.load(second)
    for _ in range(3):
        one_at_a_time.load(first)
        assert (first.there(), second.there()) == (1600, 0)
        assert all(map(torch.equal, first.persistent_tensors(), before))
        half += 1.0
        first.moment *= 2.0
        before = [tensor.clone() for tensor in first.persistent_tensors()]
        one_at_a_time.load(second)
        assert (first.there(), second.there()) == (0, 960)
    one_at_a_time.load(first)
    assert torch.equal(half, before[1])


def test_a_tensor_replaced_while_loaded_is_restored() -> None:
    """As an optimizer's state does when a checkpoint is loaded."""
    one, other, offloader = Model(10), Model(10), ModelOffloader(one_at_a_time=True)
    offloader.load(other)
    offloader.load(one)
    offloader.load(other)
    offloader.load(one)
    one.moment = torch.arange(10.0, dtype=torch.float64)
    offloader.load(other)
    offloader.load(one)
    assert torch.equal(one.moment, torch.arange(10.0, dtype=torch.float64))


def test_loading_uses_only_the_memory_that_offloading_has_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    leaving, arriving = Model(100), Model(80)
    offloader = ModelOffloader(one_at_a_time=True)
    offloader.load(arriving)
    offloader.load(leaving)
    peaks: list[int] = []
    copy_in = offload._Copies.copy_in

    def watched(self: offload._Copies, one: offload._OffloadedStorage) -> None:
        copy_in(self, one)
        peaks.append(leaving.there() + arriving.there())

    monkeypatch.setattr(offload._Copies, "copy_in", watched)
    offloader.load(arriving)
    assert len(peaks) == 3
    assert max(peaks) <= 1600


def test_without_offload_no_model_moves() -> None:
    first, second, all_there = Model(10), Model(10), ModelOffloader(one_at_a_time=False)
    all_there.load(first)
    all_there.offload_all()
    all_there.load(second)
    assert first.there() == second.there() == 160


def test_lent_gpus_hold_nothing_but_weights_that_are_sent() -> None:
    actor, critic, turns = Model(100), Model(60), ModelOffloader(one_at_a_time=False, lends=True)
    half, before = actor.weights.chunk(2)[1], None  # a view that somebody keeps
    turns.load(actor)
    turns.load(critic)
    assert (actor.there(), critic.there()) == (0, 960), "one model at a time is implied"
    for number in range(3):
        turns.load(actor)
        half += 1.0
        actor.moment *= 2.0
        before = [tensor.clone() for tensor in actor.persistent_tensors()]
        turns.lend()
        assert (actor.there(), critic.there()) == (0, 0)
        with pytest.raises(AssertionError, match="the engine has the GPUs"):
            turns.load(critic)
        for _ in range(2):
            turns.load_weights(actor)
            assert actor.there() == 400, "without the moment and the gradients"
            assert all(map(torch.equal, list(actor.persistent_tensors())[:3], before))
            turns.lend()
            assert actor.there() == 0
        turns.take_back()
        if number:
            turns.load(critic)
    turns.load(actor)
    assert before is not None
    assert all(map(torch.equal, actor.persistent_tensors(), before))
    assert torch.equal(half, before[1])
    turns.load(critic)
    assert (actor.there(), critic.there()) == (0, 960)


def test_a_model_of_which_the_weights_are_there_is_completed() -> None:
    """As for an export, and then a step."""
    actor, other, turns = Model(100), Model(10), ModelOffloader(one_at_a_time=True, lends=True)
    turns.load(actor)
    turns.load(other)
    before = [actor.weights, actor.moment]
    turns.load_weights(actor)
    assert (actor.there(), other.there()) == (400, 0)
    turns.load(actor)
    assert actor.there() == 1600
    moment = actor.moment.clone()
    turns.load_weights(actor)
    assert actor.there() == 1600, "all of it is there"
    turns.load(other)
    turns.load(actor)
    assert torch.equal(actor.moment, moment)
    assert before[0] is actor.weights


def test_a_sync_loads_the_whole_model_if_nobody_else_has_the_gpus() -> None:
    actor, other, turns = Model(100), Model(10), ModelOffloader(one_at_a_time=True)
    turns.load(actor)
    turns.load(other)
    turns.load_weights(actor)
    assert actor.there() == 1600
    assert (actor.caches_dropped, other.caches_dropped) == (0, 0), "the next pass has them"
