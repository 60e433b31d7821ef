"""Which Hugging Face tensors make which Megatron parameter. Families differ in their norms alone."""

from __future__ import annotations

from collections.abc import Callable

from megatron_tempo.models.shape import Shape
from megatron_tempo.weights import olmo3, qwen3
from megatron_tempo.weights.param_mapping import Columns, GateUp, Norm, QueryKeyValue, Slot, Vocabulary, Whole

NORMS: dict[str, Callable[[Shape], list[Norm]]] = {"olmo3": olmo3.norms, "qwen3": qwen3.norms}


def slots(shape: Shape, pipeline: int, *, critic: bool) -> list[Slot]:
    """Every parameter of the model, layer by layer. The same list on every rank.

    The critic's Hugging Face form is the family's token classifier with one label. A tied output matrix is not listed:
    it is the input embedding.
    """
    hidden = shape.hidden
    embedding = Slot(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        ((shape.vocab, hidden),),
        Vocabulary(shape.vocab),
        0,
    )
    per_stage = shape.layers // pipeline
    layers = [
        slot
        for layer in range(shape.layers)
        for slot in _layer(shape, layer, layer % per_stage, stage=layer // per_stage)
    ]
    last = pipeline - 1
    norm = Slot("decoder.final_layernorm.weight", ("model.norm.weight",), ((hidden,),), Whole(), last)
    return [embedding, *layers, norm, *_head(shape, last, critic=critic)]


def _head(shape: Shape, stage: int, *, critic: bool) -> list[Slot]:
    if critic:
        return [
            Slot("output_layer.weight", ("score.weight",), ((1, shape.hidden),), Whole(), stage),
            Slot("output_layer.bias", ("score.bias",), ((1,),), Whole(), stage),
        ]
    if shape.tied:
        return []
    head = ((shape.vocab, shape.hidden),)
    return [Slot("output_layer.weight", ("lm_head.weight",), head, Vocabulary(shape.vocab), stage)]


def _layer(shape: Shape, layer: int, local: int, stage: int) -> list[Slot]:
    theirs, ours = f"model.layers.{layer}", f"decoder.layers.{local}"
    hidden, dim, ffn = shape.hidden, shape.head_dim, shape.ffn
    queries, keys = shape.queries, shape.keys
    return [
        Slot(
            f"{ours}.self_attention.linear_qkv.weight",
            tuple(f"{theirs}.self_attn.{name}_proj.weight" for name in "qkv"),
            ((queries, hidden), (keys, hidden), (keys, hidden)),
            QueryKeyValue(shape.heads, shape.groups, dim),
            stage,
        ),
        Slot(
            f"{ours}.self_attention.linear_proj.weight",
            (f"{theirs}.self_attn.o_proj.weight",),
            ((hidden, queries),),
            Columns(queries),
            stage,
        ),
        Slot(
            f"{ours}.mlp.linear_fc1.weight",
            tuple(f"{theirs}.mlp.{name}_proj.weight" for name in ("gate", "up")),
            ((ffn, hidden), (ffn, hidden)),
            GateUp(ffn),
            stage,
        ),
        Slot(
            f"{ours}.mlp.linear_fc2.weight",
            (f"{theirs}.mlp.down_proj.weight",),
            ((hidden, ffn),),
            Columns(ffn),
            stage,
        ),
        *(
            Slot(f"{ours}.{norm.megatron}.weight", (f"{theirs}.{norm.name}.weight",), ((norm.size,),), norm.cut, stage)
            for norm in NORMS[shape.family](shape)
        ),
    ]
