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
PUBLISHED = {
    name: model_shape(entries)
    for name, entries in {
        Published.qwen3_8b: _QWEN3 | {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288},
        Published.qwen3_14b: _QWEN3
        | {"num_hidden_layers": 40, "hidden_size": 5120, "intermediate_size": 17408, "num_attention_heads": 40},
        Published.olmo3_7b: _OLMO3,
        Published.qwen3_30b_a3b: _QWEN3_30B_A3B,
    }.items()
}


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
