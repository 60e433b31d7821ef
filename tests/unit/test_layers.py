"""The norms and the packed attention against formulas in float64, sequence by sequence."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from megatron_tempo.config.rope import Rope
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.models.attention import PackedAttention
from megatron_tempo.models.grid import Grid
from megatron_tempo.models.megatron_compat.cpu_backend import install_cpu_backend
from megatron_tempo.models.norms import ProjectionNorm, RMSNorm
from megatron_tempo.models.packing import MicroBatch, micro_batches
from megatron_tempo.models.parallel import Layout, parallel_groups
from megatron_tempo.models.rotary import Rotary, rotate
from megatron_tempo.models.swiglu import SwiGLU
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch

HEADS, DIM = 6, 8


def config(**changes: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=HEADS * DIM, num_attention_heads=HEADS, **changes)


@pytest.fixture(scope="module")
def micro() -> MicroBatch:
    """Rows of many lengths and some padding (a multiple of 4 tokens, as for sequence parallelism)."""
    layout = Layout(
        rank=0, world_size=4, tensor_rank=0, tensor=4, pipeline_rank=0, pipeline=1, data_rank=0, data=1,
        context_rank=0, context=1, sequence_parallel=True,
    )  # fmt: skip
    batch = ragged_batch(7, seed=3, per_prompt=1)
    (micro_batch,) = micro_batches(batch, torch.arange(7), layout, 999, torch.device("cpu"))
    assert micro_batch.padding > 0
    return micro_batch


def naive_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: list[int], scale: float, window: int | None = None
) -> Tensor:
    """[S, heads, d], [S, groups, d] twice -> [S, heads * d]: head by head, with a mask over whole score matrices."""
    heads, groups = query.shape[1], key.shape[1]
    rows, start = [], 0
    for length in sequences:
        part = slice(start, start + length)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        for i in range(length if window else 0):
            hidden[i, : max(0, i + 1 - window)] = True
        outputs = []
        for head in range(heads):
            group = head * groups // heads
            scores = query[part, head] @ key[part, group].T * scale
            outputs.append(scores.masked_fill(hidden, -math.inf).softmax(1) @ value[part, group])
        rows.append(torch.cat(outputs, dim=1))
        start += length
    return torch.cat(rows)


CASES = [(groups, scale, None, 1.0) for groups in (6, 3, 2, 1) for scale in (None, 0.21)]
# Of windows: one token, odd and even ones, around half of the longest, one less than it, its length, and beyond.
CASES += [(3, None, window, 1.0) for window in (1, 2, 5, 8, 10, 11, 12, 21, 22, 100)] + [(2, 0.21, 4, 1.7)]


@pytest.mark.parametrize(("groups", "scale", "window", "softmax_scale_multiplier"), CASES)
def test_packed_attention_is_the_attention_of_each_sequence(
    micro: MicroBatch, groups: int, scale: float | None, window: int | None, softmax_scale_multiplier: float
) -> None:
    sequences = [int((row >= 0).sum()) for row in micro.packing.grids[0].tokens]
    assert max(sequences) == 22
    own, size = sum(sequences), micro.tokens.numel()
    assert size == own + micro.padding
    generator = torch.Generator().manual_seed(0)
    shapes = [(size, 1, heads, DIM) for heads in (HEADS, groups, groups)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    back = torch.randn(size, HEADS * DIM, generator=generator, dtype=torch.float64)

    mine = [x.clone().requires_grad_() for x in inputs]
    attention = PackedAttention(
        config(), softmax_scale=scale, window=window, softmax_scale_multiplier=softmax_scale_multiplier
    )
    out = attention(*mine, None, packed_seq_params=micro.packing)
    assert out.shape == (size, 1, HEADS * DIM)
    out = out[:own]  # nothing reads the output of padding
    (out[:, 0] * back[:own]).sum().backward()

    theirs = [x.clone().requires_grad_() for x in inputs]
    query, key, value = (x[:, 0] for x in theirs)
    wanted = naive_attention(query, key, value, sequences, (scale or DIM**-0.5) * softmax_scale_multiplier, window)
    (wanted * back[:own]).sum().backward()
    torch.testing.assert_close(out[:, 0], wanted, rtol=1e-10, atol=1e-12)
    for actual, expected in zip(mine, theirs, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_padding_in_the_grid_would_change_no_bit(
    micro: MicroBatch, dtype: torch.dtype, window: int | None
) -> None:
    """Of what is read: the outputs of the rows' tokens and their gradients. The grid is smaller without it."""
    assert micro.packing.grids is not None
    (grid,) = micro.packing.grids
    size, longest = micro.tokens.numel(), grid.tokens.shape[1]
    own = size - micro.padding
    row = torch.full((1, longest), -1)
    row[0, : micro.padding] = torch.arange(own, size)
    cells = torch.cat([grid.cells, grid.tokens.numel() + torch.arange(micro.padding)])
    padded = replace(micro.packing, grids=(Grid(torch.cat([grid.tokens, row]), cells),))
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, 1, heads, DIM, generator=generator).to(dtype) for heads in (HEADS, 3, 3)]
    back = torch.randn(own, 1, HEADS * DIM, generator=generator).to(dtype)
    found = []
    for packing in (micro.packing, padded):
        mine = [x.clone().requires_grad_() for x in inputs]
        out = PackedAttention(config(), window=window)(*mine, None, packed_seq_params=packing)[:own]
        out.backward(back)
        found.append([out, *(x.grad for x in mine)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_sequence_does_not_see_its_neighbours(micro: MicroBatch) -> None:
    size = micro.tokens.numel()
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(size, 1, HEADS, DIM, generator=generator) for _ in range(3))
    attention = PackedAttention(config())
    before = attention(query, key, value, None, packed_seq_params=micro.packing)
    own = micro.packing.grids[0].tokens[2]
    own = own[own >= 0]
    others = torch.ones(size, dtype=torch.bool).index_fill(0, own, False)
    for x in (query, key, value):
        x[others] += 100.0
    after = attention(query, key, value, None, packed_seq_params=micro.packing)
    assert torch.equal(before[own], after[own])
    assert not torch.allclose(before[others], after[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_has_the_bits_of_megatrons_operations(dtype: torch.dtype) -> None:
    """Output and gradient. Of a sequence of 37 tokens: not a multiple of a vector."""
    x = torch.randn(37, 1, 2 * 19).to(dtype).requires_grad_()
    back = torch.randn(37, 1, 19).to(dtype)
    gate, linear = x.chunk(2, dim=-1)
    wanted, found = functional.silu(gate) * (linear + 0.0), SwiGLU(config())(x)
    assert torch.equal(found, wanted)
    (of_found,), (of_wanted,) = (torch.autograd.grad(out, x, back) for out in (found, wanted))
    assert torch.equal(of_found, of_wanted)


def test_rotations_by_complex_numbers() -> None:
    """In double precision: a pair of numbers is a complex number, multiplied by e^(i angle)."""
    install_cpu_backend()
    ropes = (Rope(theta=100.0), Rope(theta=7.0))
    positions = torch.tensor([0, 1, 2, 0, 1, 31])
    rotary = Rotary(ropes, DIM, torch.float64, fused=False)
    angles = Rotary(ropes, DIM, torch.float64, fused=True)(positions).double()
    x = torch.randn(6, 1, 3, DIM, dtype=torch.float64, requires_grad=True)
    for rope, factors in enumerate(rotary(positions)):
        found = rotate(x, factors)
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(
            torch.ones(()).double(), angles[rope, ..., : DIM // 2]
        )
        torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], dim=-1), rtol=1e-5, atol=1e-5)
        assert torch.autograd.gradcheck(rotate, (x, factors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotations_are_rounded_as_in_transformers(dtype: torch.dtype) -> None:
    install_cpu_backend()
    x = torch.randn(5, 1, 3, DIM).to(dtype).requires_grad_()
    cos, sin = Rotary((Rope(theta=100.0),), DIM, dtype, fused=False)(torch.arange(5))[0]
    whole = torch.cat([-sin[..., : DIM // 2], sin[..., DIM // 2 :]], dim=-1)
    wanted, _ = apply_rotary_pos_emb(x, x, cos[:, 0], whole[:, 0], unsqueeze_dim=1)
    found, back = rotate(x, torch.stack([cos, sin])), torch.randn(5, 1, 3, DIM).to(dtype)
    assert torch.equal(found, wanted)
    (of_found,), (of_wanted,) = (torch.autograd.grad(out, x, back) for out in (found, wanted))
    assert torch.equal(of_found, of_wanted)


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
    for actual, expected in [(out, wanted), (x.grad, wide.grad), (norm.weight.grad, weight.grad)]:
        assert actual is not None
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_reckons_bf16_in_fp32() -> None:
    """Squares of 300 would be right to 3 digits only in bf16; the norm itself is rounded once."""
    x = torch.full((1, 1, 64), 300.0, dtype=torch.bfloat16)
    x[..., 0] = 4000.0
    out = RMSNorm(config(), 64)(x)
    assert out.dtype == torch.bfloat16
    wide = x.double()
    wanted = wide / wide.square().mean(-1, keepdim=True).sqrt()
    assert torch.equal(out, wanted.to(torch.bfloat16))


def of_a_rank(x: Tensor, weight: Tensor, back: Tensor, tensor: int) -> tuple[Tensor, ...]:
    """A tensor rank's part of the norm over all heads, and of its gradients."""
    install_cpu_backend()
    with parallel_groups(ParallelConfig(tensor=tensor), torch.device("cpu"), 0) as layouts:
        layout = layouts.actor
        heads = HEADS // layout.tensor
        mine = slice(layout.tensor_rank * heads, (layout.tensor_rank + 1) * heads)
        part = x[:, :, mine].clone().requires_grad_()
        norm = ProjectionNorm(config(tensor_model_parallel_size=layout.tensor), DIM, 1e-3, HEADS, layout.groups.tp)
        with torch.no_grad():
            norm.weight.copy_(weight[mine].flatten())
        out = norm(part)
        (out * back[:, :, mine]).sum().backward()
        assert norm.weight.tensor_model_parallel  # type: ignore[attr-defined]
        assert not getattr(norm.weight, "sequence_parallel", False)
        assert part.grad is not None
        assert norm.weight.grad is not None
        return out.detach(), part.grad, norm.weight.grad.view(heads, DIM)


@pytest.mark.long
@pytest.mark.parametrize("tensor", [1, 2])
def test_the_norm_over_all_heads_and_its_gradient_by_formula(tmp_path: Path, tensor: int) -> None:
    """On each tensor rank its heads' part of the whole."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(5, 1, HEADS, DIM, generator=generator).mul(torch.arange(1, HEADS + 1)[:, None])
    weight = torch.rand(HEADS, DIM, generator=generator) + 0.5
    back = torch.randn(5, 1, HEADS, DIM, generator=generator)
    ranks = run_ranks(of_a_rank, tensor, tmp_path, x, weight, back, tensor)
    actual = [torch.cat(parts, dim=-2) for parts in zip(*ranks, strict=True)]

    wide, scale = x.double().requires_grad_(), weight.double().requires_grad_()
    mean = wide.square().sum((-2, -1), keepdim=True) / (HEADS * DIM)
    wanted = wide / (mean + 1e-3).sqrt() * scale
    (wanted * back).sum().backward()
    for one, expected in zip(actual, (wanted, wide.grad, scale.grad), strict=True):
        assert expected is not None
        torch.testing.assert_close(one.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_norms_weight_is_marked_for_sequence_parallelism(sequence_parallel: bool) -> None:
    """Without the mark, Megatron leaves out the sum of its gradient over the tensor ranks."""
    changes = {"sequence_parallel": True, "tensor_model_parallel_size": 2} if sequence_parallel else {}
    norm = RMSNorm(config(**changes), 12)
    assert norm.weight.sequence_parallel is sequence_parallel  # type: ignore[attr-defined]
