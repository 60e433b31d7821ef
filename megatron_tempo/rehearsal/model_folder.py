"""A Hugging Face folder of any size that takes no disk space: its weights are a hole in a file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megatron_tempo.config.model_shape import FULL, SLIDING, ModelShape
from megatron_tempo.config.rope import Llama3, Rope
from megatron_tempo.weights import folder as folder_of_weights
from megatron_tempo.weights import tables

_FILE_BYTES = 4_000_000_000


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
    if shape.experts is not None:
        entries |= {
            "num_experts": shape.experts.count,
            "num_experts_per_tok": shape.experts.per_token,
            "moe_intermediate_size": shape.experts.ffn,
            "norm_topk_prob": shape.experts.normalized,
        }
    if not shape.family.windows:
        return entries | {"rope_parameters": _rope(shape.ropes[0])}
    kinds = [FULL if layer.window is None else SLIDING for layer in shape.attention]
    ropes = {kind: layer.rope for kind, layer in zip(kinds, shape.attention, strict=True)}
    entries |= {"layer_types": kinds, "rope_parameters": {kind: _rope(rope) for kind, rope in ropes.items()}}
    return entries | ({} if shape.window is None else {"sliding_window": shape.window})


def _rope(rope: Rope) -> dict[str, Any]:
    entries = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.scaling is None:
        return entries
    scaling = rope.scaling
    entries |= {"factor": scaling.factor, "original_max_position_embeddings": scaling.trained_positions}
    if isinstance(scaling, Llama3):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return entries | {"rope_type": "llama3", "low_freq_factor": low, "high_freq_factor": high}
    return entries | {
        "rope_type": "yarn",
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention_factor,
    }


def write_model_folder(folder: Path, shape: ModelShape) -> None:
    """Write config.json, and weights in bf16: zeros that no disk block holds, in files of a few GB.

    Linux refuses to map a single file that is larger than the machine's memory.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_entries(shape), indent=1) + "\n")
    files: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for mapping in tables.mappings(shape, critic=False):
        for name, sizes in zip(mapping.names, mapping.shapes, strict=True):
            if files[-1] and size + 2 * math.prod(sizes) > _FILE_BYTES:
                files.append({})
                size = 0
            files[-1][name] = sizes
            size += 2 * math.prod(sizes)
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file, tensors in zip(names, files, strict=True):
        _write_zeros(folder / file, tensors)
    index = {tensor: file for file, tensors in zip(names, files, strict=True) for tensor in tensors}
    (folder / folder_of_weights.INDEX).write_text(json.dumps({"weight_map": index}) + "\n")


def _write_zeros(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file: the length of its header, the header, the tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, sizes in tensors.items():
        start, end = end, end + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # as safetensors aligns its tensors
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
