"""The norms of a layer in the parameter table. They follow from the family's description."""

from __future__ import annotations

from megatron_tempo.config.model_shape import ModelShape, QKNorm
from megatron_tempo.weights.param_mapping import Norm, Replicated, ShardedDim0, TPSharding


def norms(shape: ModelShape) -> list[Norm]:
    """The norms of a layer, those of queries and keys first, then in Hugging Face's order."""
    names = (
        (("input_layernorm", "input_layernorm"), ("pre_mlp_layernorm", "post_attention_layernorm"))
        if shape.family.pre_norm
        else (
            ("self_attention.linear_proj.norm", "post_attention_layernorm"),
            ("mlp.linear_fc2.norm", "post_feedforward_layernorm"),
        )
    )
    hidden = [Norm(megatron, name, shape.hidden, Replicated()) for megatron, name in names]
    return [*_of_queries_and_keys(shape), *hidden]


def _of_queries_and_keys(shape: ModelShape) -> list[Norm]:
    if shape.family.qk_norm is QKNorm.none:
        return []
    if shape.family.qk_norm is QKNorm.head:
        shardings: list[tuple[int, TPSharding]] = [(shape.head_dim, Replicated())] * 2
    else:
        shardings = [(size, ShardedDim0(size)) for size in (shape.queries, shape.keys)]
    return [
        Norm(f"self_attention.{name}_layernorm", f"self_attn.{name}_norm", size, sharding)
        for name, (size, sharding) in zip("qk", shardings, strict=True)
    ]
