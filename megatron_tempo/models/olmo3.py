"""OLMo3: norms after attention and MLP, one norm over all queries and one over all keys, windows, YaRN.

`layer_types` selects each layer's window and rotary embedding, as in transformers' Olmo3ForCausalLM. Published models
have windows on three of four layers, and YaRN on the others.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron.core.transformer.spec_utils import ModuleSpec
from transformers import PretrainedConfig

from megatron_tempo.errors import InputError
from megatron_tempo.models.decoder import Norms
from megatron_tempo.models.norms import ProjectionNorm
from megatron_tempo.models.shape import LayerAttention, Rope, Shape, Yarn, expect, unsupported

NORMS_EACH_HEAD = False
TOKEN_CLASSIFIER = "Olmo3ForTokenClassification"  # transformers has no such class; see docs/status.md

_FULL, _SLIDING = "full_attention", "sliding_attention"
_PLAIN_ROPE = {"rope_type", "type", "rope_theta"}
_YARN = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"}
_DEFAULTS = {"partial_rotary_factor": 1.0, "truncate": True}  # of transformers


def shape_of(config: PretrainedConfig, file: Path) -> Shape:
    """The shape in `file`, an OLMo3's config.json. Raises InputError for settings that are not supported."""
    expect(file, config, attention_bias=False, hidden_act="silu")
    kinds = config.layer_types
    if len(kinds) != config.num_hidden_layers:
        raise InputError(f"{file}: layer_types names {len(kinds)} layers, num_hidden_layers={config.num_hidden_layers}")
    for kind in kinds:
        if kind not in (_FULL, _SLIDING):
            raise unsupported(file, "layer_types", kind, _SLIDING)
    attention = {kind: LayerAttention(_rope(config, file, kind)) for kind in set(kinds)}
    if _SLIDING in attention:
        window = config.sliding_window
        if not isinstance(window, int) or window < 1:
            raise unsupported(file, "sliding_window", window, 4096)
        attention[_SLIDING] = LayerAttention(attention[_SLIDING].rope, window)
    return Shape.of(config, tuple(attention[kind] for kind in kinds))


def norms(shape: Shape) -> Norms:
    """Norms after attention and MLP, and over whole query and key projections."""
    query, key = (ModuleSpec(ProjectionNorm, {"heads": heads}) for heads in (shape.heads, shape.groups))
    return Norms(query, key, pre_norm=False)


def _rope(config: PretrainedConfig, file: Path, kind: str) -> Rope:
    field = f"rope_parameters.{kind}"
    parameters = {name: value for name, value in config.rope_parameters[kind].items() if value is not None}
    rope_type = parameters.get("rope_type", "default")
    if rope_type not in ("default", "yarn"):
        raise unsupported(file, f"{field}.rope_type", rope_type, "yarn")
    for name in parameters.keys() - _PLAIN_ROPE - (_YARN if rope_type == "yarn" else set()):
        if parameters[name] != _DEFAULTS.get(name):
            raise unsupported(file, f"{field}.{name}", parameters[name], _DEFAULTS.get(name))
    return Rope(float(parameters["rope_theta"]), _yarn(parameters, file, field) if rope_type == "yarn" else None)


def _yarn(parameters: dict[str, Any], file: Path, field: str) -> Yarn:
    for name in ("factor", "original_max_position_embeddings"):
        if not isinstance(parameters.get(name), int | float) or parameters[name] < 1:
            raise InputError(f"{file}: {field}.{name}={parameters.get(name)} must be a number of at least 1")
    factor = float(parameters["factor"])
    return Yarn(
        factor=factor,
        trained_positions=parameters["original_max_position_embeddings"],
        beta_fast=parameters.get("beta_fast") or 32.0,
        beta_slow=parameters.get("beta_slow") or 1.0,
        attention_factor=parameters.get("attention_factor", 0.1 * math.log(factor) + 1.0),
    )
