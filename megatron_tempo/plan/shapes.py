"""The shape of a model: from its config.json, or as published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tempo.config.choices import Published
from megatron_tempo.config.model_shape import FULL, SLIDING, ModelShape, model_shape, shape_or_problem
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import MISSING

# Entries of the models' own config.json; tests/unit/test_plan_parameters.py builds the transformers models from them.
_QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1_000_000,
}
_OLMO3 = {
    "model_type": "olmo3",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 100278,
    "max_position_embeddings": 65536,
    "sliding_window": 4096,
    "layer_types": [FULL if layer % 4 == 3 else SLIDING for layer in range(32)],
}
_QWEN3_30B_A3B = _QWEN3 | {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "num_key_value_heads": 4,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}
# 32,768 positions are those of the small and of all instruction-tuned models; the larger base models state 131,072.
_QWEN2_5 = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 32768, "rope_theta": 1_000_000}
_QWEN2_5_SMALL = _QWEN2_5 | {"vocab_size": 151936, "tie_word_embeddings": True}


def _llama3(factor: float) -> dict[str, Any]:
    """Entries of all Llama 3.1 to 3.3. `factor`: of the rotary embedding's scaling."""
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {
        "model_type": "llama",
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000,
        "rope_scaling": scaling | {"original_max_position_embeddings": 8192},
    }


def _sizes(layers: int, hidden: int, heads: int, ffn: int, groups: int | None = None) -> dict[str, int]:
    """`groups`: key/value heads; None: those of the family."""
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
    }
    return sizes if groups is None else sizes | {"num_key_value_heads": groups}


_TIED = {"tie_word_embeddings": True}
ENTRIES: dict[Published, dict[str, Any]] = {
    Published.qwen3_4b: _QWEN3 | _TIED | _sizes(36, 2560, 32, 9728),
    Published.qwen3_8b: _QWEN3 | _sizes(36, 4096, 32, 12288),
    Published.qwen3_14b: _QWEN3 | _sizes(40, 5120, 40, 17408),
    Published.qwen3_32b: _QWEN3 | _sizes(64, 5120, 64, 25600),
    Published.olmo3_7b: _OLMO3,
    Published.qwen3_30b_a3b: _QWEN3_30B_A3B,
    Published.qwen2_5_1_5b: _QWEN2_5_SMALL | _sizes(28, 1536, 12, 8960, 2),
    Published.qwen2_5_3b: _QWEN2_5_SMALL | _sizes(36, 2048, 16, 11008, 2),
    Published.qwen2_5_7b: _QWEN2_5 | _sizes(28, 3584, 28, 18944, 4),
    Published.qwen2_5_14b: _QWEN2_5 | _sizes(48, 5120, 40, 13824, 8),
    Published.qwen2_5_32b: _QWEN2_5 | _sizes(64, 5120, 40, 27648, 8),
    Published.llama3_2_1b: _llama3(32.0) | _TIED | _sizes(16, 2048, 32, 8192),
    Published.llama3_2_3b: _llama3(32.0) | _TIED | _sizes(28, 3072, 24, 8192),
    Published.llama3_1_8b: _llama3(8.0) | _sizes(32, 4096, 32, 14336),
    Published.llama3_1_70b: _llama3(8.0) | _sizes(80, 8192, 64, 28672),
}
PUBLISHED = {name: model_shape(entries) for name, entries in ENTRIES.items()}


def shape_of(config: Config) -> tuple[ModelShape | None, list[Problem]]:
    """The actor's shape, from `model.path` if it is set, else from `model.shape`; and the problems if there is none.

    A critic of `model.critic_path` is assumed to have the actor's decoder.
    """
    path = config.model.path
    if path != MISSING:
        return _read(Path(path))
    if config.model.shape is None:
        fix = f"model.path=FOLDER, or model.shape=one of {', '.join(Published.__members__)}"
        return None, [Problem("model.path", path, "it is not set, so the model to plan for is unknown", fix)]
    return PUBLISHED[config.model.shape], []


def _read(folder: Path) -> tuple[ModelShape | None, list[Problem]]:
    shape, wrong = shape_or_problem(folder)
    fix = (
        "give a folder with the config.json of a model of a supported family, or set model.shape instead of model.path"
    )
    return shape, [Problem("model.path", str(folder), wrong, fix)] if wrong else []
