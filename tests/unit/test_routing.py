"""What routers report: metrics by hand, and the auxiliary loss of Megatron-Core and of transformers."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from megatron_tempo.models.routing import RoutedTokens, RouterReport, aux_loss, layer_reports

EXPERTS, PER_TOKEN, TOKENS = 4, 2, 10


def test_metrics_by_hand() -> None:
    """Of two layers: a balanced one, and one whose tokens all choose the same two experts with certainty."""
    even = torch.tensor([5.0, 5, 5, 5, 2.5, 2.5, 2.5, 2.5, 10 * 1.3862944])
    uneven = torch.tensor([10.0, 10, 0, 0, 5, 5, 0, 0, 0])
    metrics = RouterReport(torch.stack([even, uneven]), TOKENS, PER_TOKEN).metrics()
    assert metrics == pytest.approx(
        {
            "router_load_max": 1.5,  # 1 and 2
            "router_load_max_layer": 2.0,
            "router_unused_experts": 0.25,
            "router_dropped": 0.0,
            "router_entropy": 0.6931472,
            "router_aux_loss": 1.5,
        }
    )


def test_choices_that_are_missing_are_dropped_ones() -> None:
    row = torch.tensor([4.0, 5, 5, 5, 2.5, 2.5, 2.5, 2.5, 0])
    assert RouterReport(row[None], TOKENS, PER_TOKEN).metrics()["router_dropped"] == pytest.approx(1 / 20)


def test_reports_of_mini_batches_add_up() -> None:
    one = RouterReport(torch.ones(1, 9), 3, PER_TOKEN) + RouterReport(2 * torch.ones(1, 9), 4, PER_TOKEN)
    assert (one.tokens, one.sums.tolist()) == (7, [[3.0] * 9])


def test_the_loss_is_megatrons_and_transformers_by_another_factor() -> None:
    """transformers does not divide by the number of experts of a token."""
    logits = torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(0))
    probs = logits.softmax(-1)
    load = torch.nn.functional.one_hot(probs.topk(PER_TOKEN).indices, EXPERTS).sum((0, 1)).float()
    own = aux_loss(load, probs.sum(0), TOKENS, PER_TOKEN)
    theirs = switch_load_balancing_loss_func(probs, load, TOKENS, PER_TOKEN, EXPERTS, 1.0)
    assert float(own) == pytest.approx(float(theirs), rel=1e-6)
    of_transformers = load_balancing_loss_func((logits,), EXPERTS, PER_TOKEN)
    assert float(own) == pytest.approx(float(of_transformers) / PER_TOKEN, rel=1e-6)


def test_a_stage_reports_its_own_layers_over_its_micro_batches() -> None:
    parts = [RoutedTokens(torch.ones(2, dtype=torch.bool), 2) for _ in range(2)]
    for number, part in enumerate(parts, start=1):
        part.reports.update({2: torch.full((5,), float(number)), 3: torch.full((5,), 10.0 * number)})
    assert layer_reports(parts, layers=4, experts=2).tolist() == [[0] * 5, [0] * 5, [3] * 5, [30] * 5]
    assert layer_reports([], layers=1, experts=2).tolist() == [[0] * 5]
