"""Qwen3's part of the parameter table: its norms."""

from __future__ import annotations

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.weights.param_mapping import Norm, Replicated


def norms(shape: ModelShape) -> list[Norm]:
    """The norms of a layer, in Hugging Face's order."""
    return [
        Norm("self_attention.q_layernorm", "self_attn.q_norm", shape.head_dim, Replicated()),
        Norm("self_attention.k_layernorm", "self_attn.k_norm", shape.head_dim, Replicated()),
        Norm("input_layernorm", "input_layernorm", shape.hidden, Replicated()),
        Norm("pre_mlp_layernorm", "post_attention_layernorm", shape.hidden, Replicated()),
    ]
