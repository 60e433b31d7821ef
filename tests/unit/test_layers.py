"""The norm and the packed attention against formulas in float64, sequence by sequence."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tempo.models.layers import PackedAttention, RMSNorm
from megatron_tempo.models.packing import MicroBatch, micro_batches
from megatron_tempo.models.parallel import Layout
from tests.support.tiny import ragged_batch

HEADS, DIM = 6, 8


def config(**changes: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, **changes)


@pytest.fixture(scope="module")
def micro() -> MicroBatch:
    """Rows of many lengths and some padding (a multiple of 4 tokens, as for sequence parallelism)."""
    layout = Layout(
        rank=0, world_size=4, tensor_rank=0, tensor=4, pipeline_rank=0, pipeline=1, data_rank=0, data=1,
        sequence_parallel=True,
    )  # fmt: skip
    (found,) = micro_batches(ragged_batch(7, seed=3, per_prompt=1), torch.arange(7), layout, 999, torch.device("cpu"))
    assert found.padding > 0
    return found


def naive_attention(query: Tensor, key: Tensor, value: Tensor, sequences: list[int], scale: float) -> Tensor:
    """[S, heads, d], [S, groups, d] twice -> [S, heads * d]: head by head, with a mask over whole score matrices."""
    heads, groups = query.shape[1], key.shape[1]
    rows, start = [], 0
    for length in sequences:
        part = slice(start, start + length)
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        outputs = []
        for head in range(heads):
            group = head * groups // heads
            scores = query[part, head] @ key[part, group].T * scale
            outputs.append(scores.masked_fill(future, -math.inf).softmax(1) @ value[part, group])
        rows.append(torch.cat(outputs, dim=1))
        start += length
    return torch.cat(rows)


@pytest.mark.parametrize("groups", [6, 3, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.21])
def test_packed_attention_is_the_attention_of_each_sequence(
    micro: MicroBatch, groups: int, scale: float | None
) -> None:
    sequences = [int((row >= 0).sum()) for row in micro.packing.grid]
    size = sum(sequences)
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, 1, heads, DIM) for heads in (HEADS, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    back = torch.randn(size, HEADS * DIM, generator=generator, dtype=torch.float64)

    mine = [x.clone().requires_grad_() for x in inputs]
    attention = PackedAttention(config(), softmax_scale=scale)
    out = attention(*mine, None, packed_seq_params=micro.packing)
    assert out.shape == (size, 1, HEADS * DIM)
    (out[:, 0] * back).sum().backward()

    theirs = [x.clone().requires_grad_() for x in inputs]
    wanted = naive_attention(theirs[0][:, 0], theirs[1][:, 0], theirs[2][:, 0], sequences, scale or DIM**-0.5)
    (wanted * back).sum().backward()
    torch.testing.assert_close(out[:, 0], wanted, rtol=1e-10, atol=1e-12)
    for found, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_a_sequence_does_not_see_its_neighbours(micro: MicroBatch) -> None:
    size = micro.tokens.numel()
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(size, 1, HEADS, DIM, generator=generator) for _ in range(3))
    attention = PackedAttention(config())
    before = attention(query, key, value, None, packed_seq_params=micro.packing)
    own = micro.packing.grid[2]
    own = own[own >= 0]
    others = torch.ones(size, dtype=torch.bool).index_fill(0, own, False)
    for x in (query, key, value):
        x[others] += 100.0
    after = attention(query, key, value, None, packed_seq_params=micro.packing)
    assert torch.equal(before[own], after[own])
    assert not torch.allclose(before[others], after[others])


def test_rms_norm_and_its_gradient_by_formula() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 1, 12, generator=generator).mul(3).requires_grad_()
    norm = RMSNorm(config(), 12, eps=1e-3)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5, generator=generator)
    back = torch.randn(5, 1, 12, generator=generator)
    out = norm(x)
    (out * back).sum().backward()

    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    wanted = wide / (wide.square().sum(-1, keepdim=True) / 12 + 1e-3).sqrt() * weight
    (wanted * back).sum().backward()
    for found, expected in [(out, wanted), (x.grad, wide.grad), (norm.weight.grad, weight.grad)]:
        assert found is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_reckons_bf16_in_fp32() -> None:
    """Squares of 300 would be right to 3 digits only in bf16; the norm itself is rounded once."""
    x = torch.full((1, 1, 64), 300.0, dtype=torch.bfloat16)
    x[..., 0] = 4000.0
    out = RMSNorm(config(), 64)(x)
    assert out.dtype == torch.bfloat16
    wide = x.double()
    wanted = wide / wide.square().mean(-1, keepdim=True).sqrt()
    assert torch.equal(out, wanted.to(torch.bfloat16))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_norms_weight_is_marked_for_sequence_parallelism(sequence_parallel: bool) -> None:
    """Without the mark, Megatron leaves out the sum of its gradient over the tensor ranks."""
    changes = {"sequence_parallel": True, "tensor_model_parallel_size": 2} if sequence_parallel else {}
    norm = RMSNorm(config(**changes), 12)
    assert norm.weight.sequence_parallel is sequence_parallel  # type: ignore[attr-defined]
