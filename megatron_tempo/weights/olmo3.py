"""OLMo3's part of the parameter table: its norms."""

from __future__ import annotations

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.weights.param_mapping import Norm, Replicated, ShardedDim0


def norms(shape: ModelShape) -> list[Norm]:
    """The norms of a layer, in Hugging Face's order."""
    return [
        Norm("self_attention.q_layernorm", "self_attn.q_norm", shape.queries, ShardedDim0(shape.queries)),
        Norm("self_attention.k_layernorm", "self_attn.k_norm", shape.keys, ShardedDim0(shape.keys)),
        Norm("self_attention.linear_proj.norm", "post_attention_layernorm", shape.hidden, Replicated()),
        Norm("mlp.linear_fc2.norm", "post_feedforward_layernorm", shape.hidden, Replicated()),
    ]
