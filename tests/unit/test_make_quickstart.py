"""The quickstart's model: the heads that it is trained with, and those that it is shipped with."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from tests.support.tools import load_tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("make_quickstart", monkeypatch)


def test_wider_heads_say_the_same_and_their_zeros_stay(tool: ModuleType) -> None:
    torch.manual_seed(0)
    narrow = tool.make_model(tool.make_tokenizer(), layers=2, hidden=32, ffn=48)
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0.0, 0.2)
    narrow.config.rms_norm_eps = 0.0  # of another weight in wider heads
    for module in narrow.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.0
    wide = tool.widened(narrow)
    assert wide.config.head_dim == 2 * narrow.config.head_dim
    tokens = torch.randint(0, 60, (3, 20))
    torch.testing.assert_close(wide(tokens).logits, narrow(tokens).logits, atol=1e-4, rtol=0)
    optimizer = torch.optim.Adam(wide.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        wide(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    for layer in wide.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            weight = getattr(layer.self_attn, name).weight
            assert int((weight == 0).sum()) == weight.numel() // 2
