"""The critic's loss against numbers worked out by hand, and against a loop in float64 and its autograd."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_tempo.kernels.rows import BLOCK
from megatron_tempo.kernels.value_loss import VALUE_METRICS
from tests.kernels.implementations import Implementation


def loss_of(
    implementation: Implementation,
    lengths: list[int],
    values: Tensor,
    targets: Tensor,
    clip: float | None = None,
    old: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and metrics by row, and the gradient of the values, each row's loss weighed its own."""
    mine = implementation(values).requires_grad_()
    before = None if old is None else implementation(old)
    loss, metrics = implementation.kernels.value_loss(
        mine, implementation(targets), implementation.rows(lengths), clip=clip, old_values=before
    )
    (loss * implementation(weights_of(lengths))).sum().backward()
    assert mine.grad is not None
    return loss, metrics, mine.grad


def weights_of(lengths: list[int]) -> Tensor:
    return torch.linspace(0.5, 1.5, len(lengths), dtype=torch.float64)


def test_loss_and_gradient_by_hand(implementation: Implementation) -> None:
    """Row 0 is drawn to 1: (0.25 + 0.5625 + 0.0625 + 0) / 4; row 1 to 0: (0.015625 + 0.140625) / 2."""
    values = torch.tensor([0.5, 0.25, 0.75, 1.0, 0.125, 0.375])
    loss, metrics, grad = loss_of(implementation, [4, 2], values, torch.tensor([1.0, 0.0]))
    implementation.close(loss, [0.21875, 0.078125])
    implementation.close(metrics, [[0.21875, 0.625, 0.0], [0.078125, 0.25, 0.0]])
    implementation.close(grad, [-0.125, -0.1875, -0.0625, 0.0, 1.5 * 0.125, 1.5 * 0.375])


def test_clip_by_hand(implementation: Implementation) -> None:
    """The mean moved by 0.5, the clip is 0.1, so e = -0.4. R = 1.

    The first value's error -0.5 becomes -0.9, which is worse and counts; the second's, 0.5, becomes 0.1, and its own
    counts. S = -0.9, so the gradient is (2 * -0.9 + 0.9) / 2 and (2 * 0.5 + 0.9) / 2.
    """
    values, old = torch.tensor([0.5, 1.5]), torch.tensor([0.25, 0.75])
    loss, metrics, grad = loss_of(implementation, [2], values, torch.tensor([1.0]), 0.1, old)
    implementation.close(loss, [(0.81 + 0.25) / 2])
    implementation.close(metrics, [[0.53, 1.0, 1.0]])
    implementation.close(grad, [0.5 * -0.45, 0.5 * 0.95])


def loop(lengths: list[int], values: Tensor, targets: Tensor, clip: float | None, old: Tensor) -> tuple[Tensor, list]:
    losses, row_metrics = [], []
    for row, before, target in zip(values.split(lengths), old.split(lengths), targets, strict=True):
        if not len(row):
            losses.append(torch.zeros((), dtype=torch.float64))
            row_metrics.append([0.0, 0.0, 0.0])
            continue
        shift, clipped = torch.zeros((), dtype=torch.float64), 0.0
        if clip is not None:
            moved = row.mean() - before.mean()
            if abs(moved.item()) > clip:
                shift, clipped = math.copysign(clip, moved.item()) - moved, 1.0
        terms = []
        for value in row:
            plain, held = (value - target) ** 2, (value + shift - target) ** 2
            terms.append(held if held.item() > plain.item() else plain)
        losses.append(torch.stack(terms).mean())
        row_metrics.append([losses[-1].item(), row.mean().item(), clipped])
    return torch.stack(losses), row_metrics


def assert_as_the_loop(implementation: Implementation, lengths: list[int], seed: int, clip: float | None) -> list:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), generator=generator).double().requires_grad_()
    old = (values.detach() + 0.3 * torch.randn(sum(lengths), generator=generator)).float().double()
    targets = torch.randint(0, 2, (len(lengths),), generator=generator).double()
    expected, row_metrics = loop(lengths, values, targets, clip, old)
    (expected * weights_of(lengths)).sum().backward()
    loss, metrics, grad = loss_of(implementation, lengths, values, targets, clip, old)
    implementation.close(loss, expected.detach())
    implementation.close(metrics, row_metrics)
    assert values.grad is not None
    implementation.close(grad, values.grad)
    return row_metrics


@pytest.mark.parametrize("clip", [None, 0.05, 0.2, 100.0])
def test_loss_gradient_and_metrics_are_those_of_a_loop(implementation: Implementation, clip: float | None) -> None:
    lengths = [4, 1, 0, 13, 1, 30, 2, 7]
    clipped = sum(row[2] for row in assert_as_the_loop(implementation, lengths, 2, clip))
    assert (0 < clipped < len(lengths)) == (clip in (0.05, 0.2)), "the case has rows on both sides of the clip"


@pytest.mark.parametrize("clip", [None, 0.01])
def test_rows_about_a_blocks_length(implementation: Implementation, clip: float | None) -> None:
    assert_as_the_loop(implementation, [BLOCK - 1, BLOCK, BLOCK + 1, 0, 66 * BLOCK + 3, 1], 4, clip)


@given(lengths=st.lists(st.integers(0, 6), max_size=8), seed=st.integers(0, 2**31), clip=st.sampled_from([None, 0.1]))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_has_the_same_loss_in_any_company(
    implementation: Implementation, lengths: list[int], seed: int, clip: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values, old = (torch.randn(sum(lengths), generator=generator) for _ in range(2))
    targets = torch.randn(len(lengths), generator=generator)
    loss, metrics, _ = loss_of(implementation, lengths, values, targets, clip, old)
    assert metrics.shape == (len(lengths), len(VALUE_METRICS))
    for i in torch.randperm(len(lengths), generator=generator).tolist():
        one = [x.split(lengths)[i] for x in (values, old)]
        alone, row_metrics, _ = loss_of(implementation, [lengths[i]], one[0], targets[i : i + 1], clip, one[1])
        implementation.close(alone, loss[i : i + 1].detach())
        implementation.close(row_metrics, metrics[i : i + 1])
