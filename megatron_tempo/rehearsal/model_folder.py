"""A Hugging Face folder of any size that takes no disk space: its weights are a hole in a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_tempo.config.model_shape import FULL, SLIDING, ModelShape, Rope
from megatron_tempo.weights import tables


def config_entries(shape: ModelShape) -> dict[str, Any]:
    """The entries of a config.json that `config.model_shape.model_shape` reads as `shape`."""
    entries: dict[str, Any] = {
        "model_type": shape.family.name,
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.ffn,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "tie_word_embeddings": shape.tied,
        "rms_norm_eps": shape.norm_eps,
    }
    if not shape.family.windows:
        return entries | {"rope_parameters": _rope(shape.ropes[0])}
    kinds = [FULL if layer.window is None else SLIDING for layer in shape.attention]
    ropes = {kind: layer.rope for kind, layer in zip(kinds, shape.attention, strict=True)}
    entries |= {"layer_types": kinds, "rope_parameters": {kind: _rope(rope) for kind, rope in ropes.items()}}
    return entries | ({} if shape.window is None else {"sliding_window": shape.window})


def _rope(rope: Rope) -> dict[str, Any]:
    if rope.yarn is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    yarn = rope.yarn
    return {
        "rope_type": "yarn",
        "rope_theta": rope.theta,
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.trained_positions,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "attention_factor": yarn.attention_factor,
    }


def write_model_folder(folder: Path, shape: ModelShape) -> None:
    """Write config.json, and model.safetensors in bf16 whose tensors are zeros that no disk block holds."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_entries(shape), indent=1) + "\n")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for mapping in tables.mappings(shape, 1, critic=False):
        for name, sizes in zip(mapping.names, mapping.shapes, strict=True):
            start, end = end, end + 2 * math.prod(sizes)
            header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # safetensors wants its tensors aligned
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
