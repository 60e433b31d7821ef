"""The table of Qwen3: which Hugging Face tensors make which Megatron parameter."""

from __future__ import annotations

from megatron_tempo.models.qwen3 import Shape
from megatron_tempo.weights.slots import Columns, GateUp, QueryKeyValue, Slot, Vocabulary, Whole


def slots(shape: Shape, pipeline: int, *, critic: bool) -> list[Slot]:
    """Every parameter of the model, in Hugging Face's order. The same list on every rank.

    The critic's Hugging Face form is Qwen3ForTokenClassification with one label. A tied output matrix is not listed:
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
    queries, keys = shape.heads * dim, shape.groups * dim

    def whole(name: str, hf_name: str, size: int) -> Slot:
        return Slot(f"{ours}.{name}.weight", (f"{theirs}.{hf_name}.weight",), ((size,),), Whole(), stage)

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
        whole("self_attention.q_layernorm", "self_attn.q_norm", dim),
        whole("self_attention.k_layernorm", "self_attn.k_norm", dim),
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
        whole("input_layernorm", "input_layernorm", hidden),
        whole("pre_mlp_layernorm", "post_attention_layernorm", hidden),
    ]
