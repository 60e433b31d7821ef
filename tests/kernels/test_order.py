"""The programs of a launch come to their ends in any order on a GPU. Whichever is last, the results are the same bits.

The interpreter runs them one after another by their numbers; here it is made to take other orders.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.updates import Ratio
from megatron_tempo.kernels.rows import BLOCK
from tests.kernels.implementations import CUDA, triton
from tests.kernels.test_policy_loss import CONFIGS, loss_of, random_case
from tests.kernels.test_value_loss import loss_of as value_loss_of

pytestmark = pytest.mark.skipif(CUDA, reason="with CUDA nothing is interpreted")

LENGTHS = [3, 2 * BLOCK + 1, 0, 5 * BLOCK, 7]


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the interpreter go through a launch's programs in the order of a seed."""
    from triton.runtime.interpreter import interpreter_builder

    usual = interpreter_builder.set_grid_idx

    def shuffle(seed: int) -> None:
        def set_grid_idx(x: int, y: int, z: int) -> None:
            programs = interpreter_builder.grid_dim[0]
            order = torch.randperm(programs, generator=torch.Generator().manual_seed(seed)).tolist()
            usual(order[x], y, z)

        monkeypatch.setattr(interpreter_builder, "set_grid_idx", set_grid_idx)

    return shuffle


def same(results: list[list[Tensor | None]]) -> bool:
    first, *others = results
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b))
        for other in others
        for a, b in zip(other, first, strict=True)
    )


@pytest.mark.parametrize("config", [CONFIGS[2], CONFIGS[6]], ids=[ratio.name for ratio in Ratio])
def test_policy_loss(shuffled: Callable[[int], None], config: object) -> None:
    results = []
    for seed in range(4):
        results.append(list(loss_of(triton(), LENGTHS, config, **random_case(LENGTHS, 8, 0.3, config))))  # type: ignore[arg-type]
        shuffled(seed)
    assert same(results)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_value_loss(shuffled: Callable[[int], None], clip: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    values, old = (torch.randn(sum(LENGTHS), generator=generator) for _ in range(2))
    targets, results = torch.ones(len(LENGTHS)), []
    for seed in range(4):
        results.append(list(value_loss_of(triton(), LENGTHS, values, targets, clip, old)))
        shuffled(seed)
    assert same(results)


def test_moments(shuffled: Callable[[int], None]) -> None:
    implementation, results = triton(), []
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(sum(LENGTHS) + len(LENGTHS), generator=generator)
    rewards, rows = torch.randn(len(LENGTHS), generator=generator), implementation.rows(LENGTHS)
    for seed in range(4):
        results.append([implementation.kernels.advantage_moments(values, rewards, rows, Baseline.paper)])
        shuffled(seed)
    assert same(results)
