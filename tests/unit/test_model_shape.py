"""What is read of a config.json, against transformers' own configurations of the same file."""

from __future__ import annotations

import json
import operator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tempo.config.model_shape import (
    FAMILIES,
    FULL,
    SLIDING,
    Experts,
    ModelShape,
    model_shape,
    read_model_shape,
)
from megatron_tempo.errors import InputError
from tests.support.tiny import CONFIGS

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "num_hidden_layers": 5,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
OLMO3 = QWEN3 | {"model_type": "olmo3"}
MOE = QWEN3 | {"model_type": "qwen3_moe"}
LLAMA = QWEN3 | {"model_type": "llama"}
QWEN2 = QWEN3 | {"model_type": "qwen2"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def of_transformers(entries: dict[str, Any]) -> dict[str, Any]:
    """Sizes and attention by transformers' configuration class."""
    kind = CONFIGS[entries["model_type"]]
    config = kind.from_dict(json.loads(json.dumps(entries)))
    attention = []
    for layer_kind in getattr(config, "layer_types", [FULL] * config.num_hidden_layers):
        rope = config.rope_parameters
        rope = rope.get(layer_kind, rope)
        scaling = None
        if rope["rope_type"] != "default":
            scaling = (rope["factor"], rope["original_max_position_embeddings"])
        attention.append((rope["rope_theta"], scaling, config.sliding_window if layer_kind == SLIDING else None))
    return {
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": config.num_attention_heads,
        "groups": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "ffn": config.intermediate_size,
        "vocab": config.vocab_size,
        "max_positions": config.max_position_embeddings,
        "tied": config.tie_word_embeddings,
        "norm_eps": config.rms_norm_eps,
        "attention": attention,
        "experts": Experts(
            config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob
        )
        if entries["model_type"] == "qwen3_moe"
        else None,
    }


def plain(shape: ModelShape) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(shape, name) for name in ModelShape.__slots__ if name != "family"}
    fields["attention"] = [
        (
            layer.rope.theta,
            layer.rope.scaling and (layer.rope.scaling.factor, layer.rope.scaling.trained_positions),
            layer.window,
        )
        for layer in shape.attention
    ]
    return fields


def entries() -> st.SearchStrategy[dict[str, Any]]:
    """What a config.json may also say, or leave out, in the forms of several versions of transformers."""
    theta = st.sampled_from([10_000.0, 500_000, 1e6])
    rope = st.fixed_dictionaries({}, optional={"rope_theta": theta, "rope_type": st.just("default")})
    optional: dict[str, st.SearchStrategy[Any]] = {
        "head_dim": st.sampled_from([8, 16, 128]),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5]),
        "tie_word_embeddings": st.booleans(),
        "rope_theta": theta,
        "num_key_value_heads": st.sampled_from([1, 2, 4, None]),
        "hidden_act": st.just("silu"),
        "attention_bias": st.just(False),
        "max_window_layers": st.just(3),
        "torch_dtype": st.just("bfloat16"),
    }
    scaled = rope.map(lambda one: one | YARN)
    nested = st.fixed_dictionaries({FULL: rope | scaled, SLIDING: rope})
    kinds = st.lists(st.sampled_from([FULL, SLIDING]), min_size=5, max_size=5)
    without = st.sampled_from([None, "num_key_value_heads"])
    qwen3 = st.fixed_dictionaries({}, optional=optional | {"rope_parameters": rope, "rope_scaling": st.none()})
    olmo3 = st.fixed_dictionaries(
        {},
        optional=optional
        | {"rope_parameters": nested, "layer_types": kinds, "sliding_window": st.integers(1, 64)}
        | {"rope_scaling": st.sampled_from([None, YARN])},
    )
    experts = {
        "num_experts": st.integers(8, 16),
        "num_experts_per_tok": st.integers(1, 8),
        "moe_intermediate_size": st.integers(1, 99),
        "norm_topk_prob": st.booleans(),
        "decoder_sparse_step": st.just(1),
        "mlp_only_layers": st.just([]),
        "router_aux_loss_coef": st.just(0.001),
    }
    heads = {"num_key_value_heads": st.sampled_from([1, 2, 4])}  # this class of transformers refuses None
    moe = st.fixed_dictionaries({}, optional=optional | experts | heads | {"rope_parameters": rope})
    llama = st.fixed_dictionaries(
        {},
        optional=optional
        | {"rope_parameters": rope | rope.map(lambda one: one | LLAMA3), "pretraining_tp": st.just(2)}
        | {"rope_scaling": st.sampled_from([None, LLAMA3, {"type": "llama3"} | LLAMA3]), "mlp_bias": st.just(False)},
    )
    qwen2 = st.fixed_dictionaries(
        {},
        optional={name: value for name, value in optional.items() if name not in ("head_dim", "attention_bias")}
        | {"rope_parameters": rope | scaled, "use_sliding_window": st.just(False)}
        | {"rope_scaling": st.sampled_from([None, YARN]), "sliding_window": st.integers(1, 64)},
    )
    families = [(QWEN3, qwen3), (OLMO3, olmo3), (MOE, moe), (LLAMA, llama), (QWEN2, qwen2)]
    kinds_of_models = st.one_of([changes.map(partial(operator.or_, base)) for base, changes in families])
    return st.tuples(kinds_of_models, without).map(
        lambda pair: {name: value for name, value in pair[0].items() if name != pair[1]}
    )


@settings(max_examples=300, deadline=None)
@given(entries())
def test_it_is_what_transformers_reads(config_entries: dict[str, Any]) -> None:
    assert plain(model_shape(config_entries)) == of_transformers(config_entries)


def test_sizes_that_are_left_out_are_transformers_own() -> None:
    """Qwen3's heads have 128 numbers; those of other families share the hidden size."""
    assert [model_shape(one).head_dim for one in (QWEN3, OLMO3, LLAMA, QWEN2)] == [128, 16, 16, 16]
    assert [of_transformers(one)["head_dim"] for one in (QWEN3, OLMO3, LLAMA, QWEN2)] == [128, 16, 16, 16]


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"model_type": "mistral"}, 'model_type is "mistral"; supported: llama, olmo3, qwen2, qwen3, qwen3_moe'),
        ({"model_type": None}, "model_type is null"),
        ({"hidden_size": "64"}, "no whole number from 1 to 2,147,483,647 under hidden_size"),
        ({"hidden_size": True, "vocab_size": 0}, "under hidden_size, vocab_size"),
        ({"num_key_value_heads": 1.5}, "under num_key_value_heads"),
        ({"rms_norm_eps": "1e-6"}, 'rms_norm_eps="1e-6" must be a number above 0'),
        ({"tie_word_embeddings": "yes"}, 'tie_word_embeddings="yes" must be true or false'),
        ({"rope_parameters": [1]}, "must be an object"),
        ({"rope_parameters": {"rope_theta": -1}}, "rope_theta=-1 must be a number above 0"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            'rope_type="linear" is not supported. Supported: "default"',
        ),
        (
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not supported. Supported: 1.0",
        ),
        ({"layer_types": [FULL] * 3}, "layer_types names 3 layers, num_hidden_layers=5"),
        ({"layer_types": [FULL] * 4 + [SLIDING]}, 'layer_types="sliding_attention" is not supported'),
        ({"layer_types": "full_attention"}, "must be a list"),
        (
            {"model_type": "qwen3_moe", "num_experts": 4},
            "num_experts_per_tok=8 must be at most num_experts=4",
        ),
        ({"model_type": "qwen3_moe", "num_local_experts": 0}, "under num_experts"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, "mlp_only_layers=[0] is not supported"),
        ({"model_type": "qwen3_moe", "norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InputError) as error:
        model_shape(QWEN3 | changes)
    assert wrong in str(error.value)


def test_the_file_is_named(tmp_path: Path) -> None:
    for text in (None, "{", "[]", json.dumps(QWEN3 | {"vocab_size": -1})):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError) as error:
            read_model_shape(tmp_path)
        assert str(error.value).count(str(tmp_path / "config.json")) == 1


def test_each_family_is_under_its_own_name() -> None:
    assert all(name == family.name for name, family in FAMILIES.items())
