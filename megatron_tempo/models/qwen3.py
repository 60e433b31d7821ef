"""Qwen3: norms before attention and MLP, and a norm of each head's query and key."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from megatron_tempo.models.decoder import Norms
from megatron_tempo.models.norms import RMSNorm
from megatron_tempo.models.shape import LayerAttention, Rope, Shape, expect, unsupported

NORMS_EACH_HEAD = True
TOKEN_CLASSIFIER = "Qwen3ForTokenClassification"


def shape_of(config: PretrainedConfig, file: Path) -> Shape:
    """The shape in `file`, a Qwen3's config.json. Raises InputError for settings that are not supported."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise unsupported(file, "rope_type", rope["rope_type"], "default")
    expect(file, config, use_sliding_window=False, attention_bias=False, hidden_act="silu")
    return Shape.of(config, (LayerAttention(Rope(rope["rope_theta"])),) * config.num_hidden_layers)


def norms(shape: Shape) -> Norms:
    """Norms before attention and MLP, and per head of queries and keys."""
    return Norms(query=RMSNorm, key=RMSNorm, pre_norm=True)
