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

    def __post_init__(self) -> None:
        self.weights, self.moment = torch.randn(self.size), torch.randn(self.size, dtype=torch.float64)
        self.gradients = torch.randn(self.size)

    def persistent_tensors(self) -> Iterable[Tensor]:
        return [*self.weights.chunk(2), self.weights[1:3], self.moment]

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
