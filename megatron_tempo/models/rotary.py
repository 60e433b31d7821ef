"""Rotary embeddings (Su et al., arXiv 2104.09864), as trained or stretched to longer sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_tempo.config.rope import Llama3, Rope, Yarn


class Rotary:
    """What rotates queries and keys. Not a module, so it stays in fp32 when the network is converted to bf16."""

    def __init__(self, ropes: tuple[Rope, ...], head_dim: int, dtype: torch.dtype, *, fused: bool) -> None:
        """`dtype`: of queries and keys. `fused`: whether Transformer Engine rotates them, which takes angles."""
        device = torch.cuda.current_device()
        self.frequencies = torch.stack([frequencies(rope, head_dim) for rope in ropes]).to(device)  # [ropes, d / 2]
        self.dtype, self.fused = dtype, fused

    def __call__(self, positions: Tensor) -> Tensor:
        """Positions in their sequences, int64 [S] -> what each rotary embedding of the model turns them by.

        The factors that `rotate` takes, [ropes, 2, S, 1, 1, d], once for all layers. Fused: radians, in Megatron's
        order, float32 [ropes, S, 1, 1, d].
        """
        half = positions[:, None, None, None] * self.frequencies[:, None, None, None, :]
        if self.fused:
            return torch.cat([half, half], dim=-1)
        cos, sin = half.cos().to(self.dtype), half.sin().to(self.dtype)
        return torch.stack([torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)], dim=1)


def rotate(x: Tensor, factors: Tensor) -> Tensor:
    """[S, 1, heads, d], and cosines and signed sines [2, S, 1, 1, d] -> as `x`.

    Pair i of a head is numbers i and i + d / 2. The first becomes x_i cos - x_(i + d / 2) sin, the second
    x_(i + d / 2) cos + x_i sin. Numbers are rounded as by Megatron's operations, which compute cosines in each layer.
    """
    rotated: Tensor = _Rotate.apply(x, factors)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(factors)
        cos, sin = factors
        return (x * cos).add_(_swapped(x).mul_(sin))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        cos, sin = ctx.saved_tensors[0]
        return (grad * cos).add_(_swapped(grad * sin)), None


def _swapped(x: Tensor) -> Tensor:
    """The two numbers of each pair, exchanged."""
    return x.roll(x.shape[-1] // 2, dims=-1)


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of a head's dimensions: float32 [d / 2]."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.scaling is None:
        return plain
    if isinstance(rope.scaling, Yarn):
        share = _yarn_share(rope.theta, rope.scaling, head_dim)
    else:
        share = _llama3_share(plain, rope.scaling)
    return plain / rope.scaling.factor * share + plain * (1 - share)


def _llama3_share(plain: Tensor, llama3: Llama3) -> Tensor:
    """How far Llama 3.1 interpolates each pair of these frequencies: 0 for high ones, 1 for low ones, [d / 2]."""
    turns = llama3.trained_positions * plain / (2 * math.pi)
    low, high = llama3.low_freq_factor, llama3.high_freq_factor
    return ((high - turns) / (high - low)).clamp(0, 1)


def _yarn_share(theta: float, yarn: Yarn, head_dim: int) -> Tensor:
    """How far YaRN interpolates each pair: 0 for high frequencies, 1 for low ones, float32 [d / 2].

    Pair i turns trained * theta^(-2i/d) / 2 pi times over the trained positions. Solving this for i gives the two pairs
    between which the share rises linearly, rounded to whole pairs. As in transformers, the upper one may be beyond the
    last pair.
    """

    def pair(turns: float) -> float:
        return head_dim * math.log(yarn.trained_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(yarn.beta_fast)), 0)
    last: float = min(math.ceil(pair(yarn.beta_slow)), head_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
