"""The network that a Hugging Face config.json describes: one description for the rules, the planner and the models.

It is read without torch and without transformers. Entries that config.json lacks have transformers' defaults of the
family. tests/unit/test_model_shape.py compares the result with transformers' own configurations.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from megatron_tempo.config.json_entries import expect, number, of_kind, unsupported
from megatron_tempo.config.rope import Rope, read_rope
from megatron_tempo.errors import InputError
from megatron_tempo.files import read_json

FULL, SLIDING = "full_attention", "sliding_attention"
LARGEST = 2**31 - 1  # of the sizes in a config.json
MOST_LAYERS = 10_000


class QKNorm(Enum):
    """What the norms of queries and keys span."""

    none = "a family without them"
    head = "each head"
    projection = "all heads of the projection"


@dataclass(frozen=True, slots=True)
class Family:
    """What the models of a `model_type` have in common."""

    name: str  # the model_type
    pre_norm: bool  # norms before attention and feed-forward part; False: after them
    qk_norm: QKNorm
    windows: bool  # layers may have an attention window, and each kind of layer has its own rotary embedding
    rope_types: tuple[str, ...]  # of the layers with full attention; windowed ones have the default
    token_classifier: str  # `architectures` in an exported critic's config.json
    defaults: Mapping[str, Any]  # transformers' defaults for missing entries; None: no default
    experts: bool = False  # the feed-forward part of each layer is a mixture of experts
    qkv_biases: bool = False  # on queries, keys and values; other linear layers have none in any family
    free_head_dim: bool = True  # False: `head_dim` is hidden_size / num_attention_heads


FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llama",
            pre_norm=True,
            qk_norm=QKNorm.none,
            windows=False,
            rope_types=("default", "llama3"),
            token_classifier="LlamaForTokenClassification",
            defaults={"rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
        ),
        Family(
            name="olmo3",
            pre_norm=False,
            qk_norm=QKNorm.projection,
            windows=True,
            rope_types=("default", "yarn"),
            token_classifier="Olmo3ForTokenClassification",  # transformers has no such class; see docs/status.md
            defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
        ),
        Family(
            name="qwen2",
            pre_norm=True,
            qk_norm=QKNorm.none,
            windows=False,
            rope_types=("default", "yarn"),
            token_classifier="Qwen2ForTokenClassification",
            defaults={"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "num_key_value_heads": 32},
            qkv_biases=True,
            free_head_dim=False,
        ),
        Family(
            name="qwen3",
            pre_norm=True,
            qk_norm=QKNorm.head,
            windows=False,
            rope_types=("default",),
            token_classifier="Qwen3ForTokenClassification",
            defaults={"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "head_dim": 128, "num_key_value_heads": 32},
        ),
        Family(
            name="qwen3_moe",
            pre_norm=True,
            qk_norm=QKNorm.head,
            windows=False,
            rope_types=("default",),
            token_classifier="Qwen3MoeForTokenClassification",
            defaults={"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "num_key_value_heads": 4}
            | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
            experts=True,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """The attention of one layer, as far as it may differ between layers."""

    rope: Rope
    window: int | None = None  # a token sees itself and the window - 1 tokens before it; None: all before it


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts in each layer: a router chooses the experts that a token goes through.

    >>> Experts(count=128, per_token=8, ffn=768, normalized=True)
    """

    count: int
    per_token: int  # how many experts the router chooses for a token ("top-k")
    ffn: int  # inner width of an expert
    normalized: bool  # the chosen experts' probabilities are divided by their sum (`norm_topk_prob`)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder with grouped attention and a gated feed-forward part, and how each layer attends.

    >>> ModelShape(family=FAMILIES["qwen3"], layers=36, hidden=4096, heads=32, groups=8, head_dim=128, ffn=12288,
    ...            vocab=151936, max_positions=40960, tied=False, norm_eps=1e-6,
    ...            attention=(LayerAttention(Rope(1e6)),) * 36)
    """

    family: Family
    layers: int
    hidden: int
    heads: int
    groups: int  # key/value heads
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    tied: bool  # input and output embeddings are one matrix
    norm_eps: float
    attention: tuple[LayerAttention, ...]  # by layer, counted over all pipeline stages
    experts: Experts | None = None  # in place of the feed-forward part of every layer; `ffn` is then unused

    @property
    def queries(self) -> int:
        """Width of the query projection."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.groups * self.head_dim

    @property
    def token_matrices(self) -> int:
        """Numbers of one layer's matrices that a token is multiplied with.

        Of a mixture of experts: the router's, and those of the experts that it chooses.
        """
        own = self.experts
        feed_forward = 3 * self.ffn if own is None else 3 * own.per_token * own.ffn + own.count
        return (2 * self.queries + 2 * self.keys + feed_forward) * self.hidden

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary embeddings of its layers, each once."""
        return tuple(dict.fromkeys(layer.rope for layer in self.attention))

    @property
    def window(self) -> int | None:
        """Size of the attention window in tokens; None if no layer has one."""
        return next((layer.window for layer in self.attention if layer.window is not None), None)

    @property
    def windowed_layers(self) -> int:
        """How many layers have an attention window."""
        return sum(layer.window is not None for layer in self.attention)


_SIZES = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"),
    "max_position_embeddings",
)


def read_model_shape(folder: Path) -> ModelShape:
    """The shape of the model in a Hugging Face folder.

    Raises InputError, which names file and field, if it cannot be read or is not implemented.
    """
    file = folder / "config.json"
    try:
        return model_shape(read_json(file, dict))
    except InputError as error:
        if str(file) in str(error):
            raise
        raise InputError(f"{file}: {error}") from error


def shape_or_problem(folder: Path) -> tuple[ModelShape | None, str]:
    """The shape of the model in a Hugging Face folder; or None, and what is wrong with the folder's config.json."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        return None, f"has no {file.name}"
    try:
        return read_model_shape(folder), ""
    except InputError as error:
        return None, f"{file.name}{str(error).removeprefix(str(file))}"


def model_shape(entries: Mapping[str, Any]) -> ModelShape:
    """The shape that the entries of a config.json describe. Raises InputError, which names the field."""
    name = entries.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise InputError(f"model_type is {json.dumps(name)}; supported: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    given = dict(family.defaults) | {key: value for key, value in entries.items() if value is not None}
    for field, known in (
        ("attention_bias", family.qkv_biases),
        ("mlp_bias", False),
        ("hidden_act", "silu"),
        ("partial_rotary_factor", 1.0),
    ):
        expect(field, given.get(field, known), known)
    if _is_size(given.get("num_hidden_layers")) and given["num_hidden_layers"] > MOST_LAYERS:
        raise InputError(f"num_hidden_layers={given['num_hidden_layers']} must be at most {MOST_LAYERS:,}")
    wrong = [field for field in _SIZES if not _is_size(given.get(field))]
    if entries.get("num_key_value_heads", family.defaults.get("num_key_value_heads")) is None:  # null: as many as heads
        given["num_key_value_heads"] = given.get("num_attention_heads")
    if not wrong:
        given.setdefault("head_dim", given["hidden_size"] // given["num_attention_heads"])
        wrong = [field for field in ("num_key_value_heads", "head_dim") if not _is_size(given[field])]
        if not family.free_head_dim:
            expect("head_dim", given["head_dim"], given["hidden_size"] // given["num_attention_heads"])
    if wrong:
        raise InputError(f"no whole number from 1 to {LARGEST:,} under {', '.join(wrong)}")
    return ModelShape(
        family=family,
        layers=given["num_hidden_layers"],
        hidden=given["hidden_size"],
        heads=given["num_attention_heads"],
        groups=given["num_key_value_heads"],
        head_dim=given["head_dim"],
        ffn=given["intermediate_size"],
        vocab=given["vocab_size"],
        max_positions=given["max_position_embeddings"],
        tied=of_kind("tie_word_embeddings", given.get("tie_word_embeddings", False), bool),
        norm_eps=number("rms_norm_eps", given["rms_norm_eps"]),
        attention=_windowed(family, given) if family.windows else _full(family, given),
        experts=_experts(given) if family.experts else None,
    )


def _experts(given: Mapping[str, Any]) -> Experts:
    """The experts of a family whose layers all have them."""
    expect("decoder_sparse_step", given.get("decoder_sparse_step", 1), 1)
    expect("mlp_only_layers", given.get("mlp_only_layers", []), [])
    # transformers 5 writes num_local_experts; published files have num_experts.
    sizes = {"num_experts": given.get("num_local_experts", given["num_experts"])}
    sizes |= {name: given[name] for name in ("num_experts_per_tok", "moe_intermediate_size")}
    if wrong := [name for name, size in sizes.items() if not _is_size(size)]:
        raise InputError(f"no whole number from 1 to {LARGEST:,} under {', '.join(wrong)}")
    count, per_token, ffn = sizes.values()
    if per_token > count:
        raise InputError(f"num_experts_per_tok={per_token} must be at most num_experts={count}")
    normalized = of_kind("norm_topk_prob", given.get("norm_topk_prob", False), bool)
    return Experts(count, per_token, ffn, normalized)


def _full(family: Family, given: Mapping[str, Any]) -> tuple[LayerAttention, ...]:
    """The attention of a family whose layers are all alike."""
    expect("use_sliding_window", given.get("use_sliding_window", False), False)
    for kind in _layer_types(given, [FULL] * given["num_hidden_layers"]):
        expect("layer_types", kind, FULL)
    field = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
    parameters = of_kind(field, given.get(field) or {}, dict)
    rope = read_rope(
        field,
        {"rope_theta": given["rope_theta"]} | _without_none(parameters),
        given["max_position_embeddings"],
        family.rope_types,
    )
    return (LayerAttention(rope),) * int(given["num_hidden_layers"])


def _windowed(family: Family, given: Mapping[str, Any]) -> tuple[LayerAttention, ...]:
    """The attention of a family whose layers have full or windowed attention (`layer_types`)."""
    layers = given["num_hidden_layers"]
    kinds = _layer_types(given, [FULL if (layer + 1) % 4 == 0 else SLIDING for layer in range(layers)])
    by_kind = of_kind("rope_parameters", given.get("rope_parameters") or {}, dict)
    scaling = of_kind("rope_scaling", given.get("rope_scaling") or {}, dict)
    attentions: dict[str, LayerAttention] = {}
    for kind in dict.fromkeys(kinds):
        if kind not in (FULL, SLIDING):
            raise unsupported("layer_types", kind, SLIDING)
        field = f"rope_parameters.{kind}"
        # As in transformers: an entry rope_theta or rope_scaling next to rope_parameters applies only to FULL.
        theta = given["rope_theta"] if kind == FULL else family.defaults["rope_theta"]
        parameters = _without_none(of_kind(field, by_kind.get(kind) or {}, dict) | (scaling if kind == FULL else {}))
        rope = read_rope(field, {"rope_theta": theta} | parameters, given["max_position_embeddings"], family.rope_types)
        window = given.get("sliding_window") if kind == SLIDING else None
        if kind == SLIDING and not _is_size(window):
            raise unsupported("sliding_window", window, 4096)
        attentions[kind] = LayerAttention(rope, window)
    return tuple(attentions[kind] for kind in kinds)


def _layer_types(given: Mapping[str, Any], usual: list[str]) -> list[str]:
    kinds = of_kind("layer_types", given.get("layer_types", usual), list)
    if len(kinds) != given["num_hidden_layers"]:
        raise InputError(f"layer_types names {len(kinds)} layers, num_hidden_layers={given['num_hidden_layers']}")
    return kinds


def _without_none(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def _is_size(value: object) -> bool:
    return type(value) is int and 1 <= value <= LARGEST
