"""Transformer Engine's fused operations and flash attention with grouped queries, by formulas in fp32, on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron_tempo.models.attention import _causal, _groups_queries

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")]
needs_te = pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine")
BF16 = {"rtol": 2e-2, "atol": 2e-2}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


@needs_te
def test_the_rotary_embedding_takes_an_angle_for_each_token() -> None:
    """Positions start again in the middle, as at the next row of a micro-batch."""
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb

    x, back = normal(96, 1, 4, 64), normal(96, 1, 4, 64).detach()
    positions = torch.cat([torch.arange(60), torch.arange(36)]).cuda()
    half = positions[:, None, None, None] / 1e4 ** (torch.arange(0, 64, 2, device="cuda") / 64)
    angles = torch.cat([half, half], dim=-1)
    found = fused_apply_rotary_pos_emb(x, angles)
    found.backward(back)
    wide = x.detach().float().requires_grad_()
    first, second = wide.chunk(2, dim=-1)
    wanted = wide * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
    wanted.backward(back.float())
    assert x.grad is not None
    torch.testing.assert_close(found.float(), wanted, **BF16)
    torch.testing.assert_close(x.grad.float(), wide.grad, **BF16)


@needs_te
def test_swiglu_gates_by_the_first_half() -> None:
    import transformer_engine.pytorch as te

    x, back = normal(33, 1, 256), normal(33, 1, 128).detach()
    found = te.ops.SwiGLU()(x)
    found.backward(back)
    wide = x.detach().float().requires_grad_()
    gate, linear = wide.chunk(2, dim=-1)
    wanted = functional.silu(gate) * linear
    wanted.backward(back.float())
    assert x.grad is not None
    torch.testing.assert_close(found.float(), wanted, **BF16)
    torch.testing.assert_close(x.grad.float(), wide.grad, **BF16)


def test_grouped_queries_agree_with_repeated_keys() -> None:
    query, key, value = normal(2, 8, 100, 64), normal(2, 2, 100, 64), normal(2, 2, 100, 64)
    assert _groups_queries(query, key, value)
    assert not _groups_queries(query.float(), key.float(), value.float()), "flash attention has no fp32"
    back = normal(2, 8, 100, 64).detach()
    found = _causal(query, key, value, 0.125)
    found.backward(back)
    wide = [x.detach().float().requires_grad_() for x in (query, key, value)]
    wanted = _causal(*wide, scale=0.125)
    wanted.backward(back.float())
    torch.testing.assert_close(found.float(), wanted, **BF16)
    for narrow, other in zip((query, key, value), wide, strict=True):
        assert narrow.grad is not None
        torch.testing.assert_close(narrow.grad.float(), other.grad, rtol=5e-2, atol=5e-2)
