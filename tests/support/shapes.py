"""Shapes of networks for tests of the planner."""

from __future__ import annotations

from megatron_tempo.config.model_shape import FAMILIES, LayerAttention, ModelShape
from megatron_tempo.config.rope import Rope


def qwen3_shape(
    layers: int,
    hidden: int,
    heads: int,
    groups: int,
    head_dim: int,
    ffn: int,
    vocab: int,
    max_positions: int,
    *,
    tied: bool = False,
    window: int | None = None,
    windowed: int = 0,
) -> ModelShape:
    """A network with Qwen3's norms. `windowed` of its layers attend to `window` tokens."""
    rope = Rope(10_000.0)
    attention = (LayerAttention(rope, window),) * windowed + (LayerAttention(rope),) * (layers - windowed)
    return ModelShape(
        family=FAMILIES["qwen3"],
        layers=layers,
        hidden=hidden,
        heads=heads,
        groups=groups,
        head_dim=head_dim,
        ffn=ffn,
        vocab=vocab,
        max_positions=max_positions,
        tied=tied,
        norm_eps=1e-6,
        attention=attention,
    )
