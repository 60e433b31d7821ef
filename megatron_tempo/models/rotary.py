"""Rotary embeddings (Su et al., arXiv 2104.09864), with or without YaRN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_tempo.config.model_shape import Rope, Yarn


class Rotary:
    """The angles of rotary embeddings. Not a module, so it stays in fp32 when the network is converted to bf16."""

    def __init__(self, ropes: tuple[Rope, ...], head_dim: int) -> None:
        device = torch.cuda.current_device()
        self.frequencies = torch.stack([frequencies(rope, head_dim) for rope in ropes]).to(device)  # [ropes, d / 2]

    def __call__(self, positions: Tensor) -> Tensor:
        """Positions in their sequences, int64 [S] -> radians, float32 [ropes, S, 1, 1, d], in Megatron's order."""
        half = positions[:, None, None, None] * self.frequencies[:, None, None, None, :]
        return torch.cat([half, half], dim=-1)


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position for each pair of a head's dimensions: float32 [d / 2]."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.yarn is None:
        return plain
    share = _interpolation_share(rope.theta, rope.yarn, head_dim)
    return plain / rope.yarn.factor * share + plain * (1 - share)


def _interpolation_share(theta: float, yarn: Yarn, head_dim: int) -> Tensor:
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
