"""Maps every Megatron parameter to its Hugging Face tensors. Families differ in their norms and in biases."""

from __future__ import annotations

from itertools import chain

from megatron_tempo.config.model_shape import Experts, ModelShape
from megatron_tempo.config.pipeline_layers import PipelineLayers
from megatron_tempo.weights.norms import norms
from megatron_tempo.weights.param_mapping import (
    ParamMapping,
    Replicated,
    ShardedDim1,
    ShardedGateUp,
    ShardedQKV,
    ShardedVocab,
)

WITHOUT_PIPELINE = PipelineLayers()


def mappings(
    shape: ModelShape, pipeline: PipelineLayers = WITHOUT_PIPELINE, *, critic: bool, expert_ranks: int = 1
) -> list[ParamMapping]:
    """Every parameter of the model, layer by layer. The same list on every rank.

    `expert_ranks`: ranks that share the experts of each layer, equally many consecutive ones each.
    In Hugging Face's format, the critic is the family's token classifier with one label. A tied output matrix is not
    listed, because it is the input embedding.
    """
    hidden = shape.hidden
    embedding = ParamMapping(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        ((shape.vocab, hidden),),
        ShardedVocab(shape.vocab),
        0,
    )
    places = {
        layer: (local, stage)
        for stage, chunks in enumerate(pipeline.chunks(shape.layers))
        for local, layer in enumerate(chain.from_iterable(chunks))
    }
    layers = [
        mapping for layer in range(shape.layers) for mapping in _layer(shape, layer, *places[layer], expert_ranks)
    ]
    last = pipeline.stages - 1
    norm = ParamMapping("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),), Replicated(), last)
    return [embedding, *layers, norm, *_head(shape, last, critic=critic)]


def _head(shape: ModelShape, stage: int, *, critic: bool) -> list[ParamMapping]:
    if critic:
        return [
            ParamMapping("output_layer.weight", ("score.weight",), ((1, shape.hidden),), Replicated(), stage),
            ParamMapping("output_layer.bias", ("score.bias",), ((1,),), Replicated(), stage),
        ]
    if shape.tied:
        return []
    head = ((shape.vocab, shape.hidden),)
    return [ParamMapping("output_layer.weight", ("lm_head.weight",), head, ShardedVocab(shape.vocab), stage)]


def _layer(shape: ModelShape, layer: int, local: int, stage: int, expert_ranks: int) -> list[ParamMapping]:
    theirs, ours = f"model.layers.{layer}", f"decoder.layers.{local}"
    hidden, dim = shape.hidden, shape.head_dim
    queries, keys = shape.queries, shape.keys
    qkv = ShardedQKV(shape.heads, shape.groups, dim)
    biases = [
        ParamMapping(
            f"{ours}.self_attention.linear_qkv.bias",
            tuple(f"{theirs}.self_attn.{name}_proj.bias" for name in "qkv"),
            ((queries,), (keys,), (keys,)),
            qkv,
            stage,
        )
    ]
    return [
        ParamMapping(
            f"{ours}.self_attention.linear_qkv.weight",
            tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv"),
            ((queries, hidden), (keys, hidden), (keys, hidden)),
            qkv,
            stage,
        ),
        *(biases if shape.family.qkv_biases else []),
        ParamMapping(
            f"{ours}.self_attention.linear_proj.weight",
            (f"{theirs}.self_attn.o_proj.weight",),
            ((hidden, queries),),
            ShardedDim1(queries),
            stage,
        ),
        *(
            _gated(f"{ours}.mlp", f"{theirs}.mlp", hidden, shape.ffn, stage)
            if shape.experts is None
            else _mixture(f"{ours}.mlp", f"{theirs}.mlp", hidden, shape.experts, stage, expert_ranks)
        ),
        *(
            ParamMapping(
                f"{ours}.{norm.megatron}.weight",
                (f"{theirs}.{norm.name}.weight",),
                ((norm.size,),),
                norm.sharding,
                stage,
            )
            for norm in norms(shape)
        ),
    ]


def _gated(
    ours: str, theirs: str, hidden: int, ffn: int, stage: int, expert_rank: int | None = None
) -> list[ParamMapping]:
    """A gated feed-forward part, or an expert."""
    gate_up = tuple(f"{theirs}.{name}_proj.weight" for name in ("gate", "up"))
    wide, narrow, down = (ffn, hidden), (hidden, ffn), (f"{theirs}.down_proj.weight",)
    return [
        ParamMapping(f"{ours}.linear_fc1.weight", gate_up, (wide, wide), ShardedGateUp(ffn), stage, expert_rank),
        ParamMapping(f"{ours}.linear_fc2.weight", down, (narrow,), ShardedDim1(ffn), stage, expert_rank),
    ]


def _mixture(
    ours: str, theirs: str, hidden: int, experts: Experts, stage: int, expert_ranks: int
) -> list[ParamMapping]:
    """A router and its experts."""
    router = ((experts.count, hidden),)
    mappings = [ParamMapping(f"{ours}.router.weight", (f"{theirs}.gate.weight",), router, Replicated(), stage)]
    of_rank = experts.count // expert_ranks
    for expert in range(experts.count):
        rank, local = divmod(expert, of_rank)
        names = f"{ours}.experts.{local}", f"{theirs}.experts.{expert}"
        mappings += _gated(*names, hidden, experts.ffn, stage, rank)
    return mappings
