"""What is read of a config.json, and the rotary embeddings that follow, against transformers' own."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from megatron_tempo.config.model_shape import FAMILIES, LayerAttention, read_model_shape
from megatron_tempo.config.rope import Llama3, Rope, Yarn
from megatron_tempo.errors import InputError
from megatron_tempo.models.rotary import frequencies
from tests.support.tiny import LLAMA3, WINDOW, write_model

PLAIN = {"rope_type": "default", "rope_theta": 500_000.0}
# The entries of allenai/Olmo-3-7B's config.json.
PUBLISHED = {
    "head_dim": None,
    "rope_parameters": None,
    "rope_theta": 500_000,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "max_position_embeddings": 65536,
    "sliding_window": 4096,
}


def changed(folder: Path, **changes: Any) -> Path:
    """A folder whose config.json is changed so; None takes an entry out."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


@pytest.fixture
def olmo3(tmp_path: Path) -> Path:
    return write_model(tmp_path, family="olmo3")


def test_exported_critics_have_classes_of_transformers() -> None:
    """All but OLMo3's (docs/status.md)."""
    absent = [name for name, family in FAMILIES.items() if not hasattr(transformers, family.token_classifier)]
    assert absent == ["olmo3"]


def test_the_published_olmo3(olmo3: Path) -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    shape = read_model_shape(changed(olmo3, **PUBLISHED, layer_types=kinds))
    sliding = LayerAttention(Rope(500_000.0), 4096)
    full = LayerAttention(Rope(500_000.0, Yarn(8.0, 8192, 32, 1, 1.2079441541679836)))
    assert shape.attention == (sliding, sliding, sliding, full)
    assert shape.ropes == (sliding.rope, full.rope)
    assert (shape.family.name, shape.heads, shape.groups, shape.head_dim) == ("olmo3", 32, 2, 128)


def test_the_defaults_of_layer_types_and_attention_factor(olmo3: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"full_attention": PLAIN | yarn, "sliding_attention": PLAIN}
    shape = read_model_shape(changed(olmo3, rope_parameters=rope, layer_types=None))
    assert [layer.window for layer in shape.attention] == [WINDOW, WINDOW, WINDOW, None]
    of_last_layer = shape.attention[3].rope.scaling
    assert isinstance(of_last_layer, Yarn)
    assert (of_last_layer.beta_fast, of_last_layer.beta_slow) == (32.0, 1.0)
    assert of_last_layer.attention_factor == pytest.approx(0.1 * math.log(4.0) + 1)


def test_a_qwen3_attends_alike_on_all_layers(tmp_path: Path) -> None:
    shape = read_model_shape(write_model(tmp_path))
    assert shape.attention == (LayerAttention(Rope(10_000.0)),) * 4


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        ("attention_bias", True, "attention_bias=true is not supported"),
        ("hidden_act", "gelu", 'hidden_act="gelu" is not supported'),
        ("use_sliding_window", True, "use_sliding_window=true is not supported"),
        ("rope_parameters", PLAIN | {"rope_type": "linear", "factor": 2.0}, 'rope_type="linear" is not supported'),
    ],
)
def test_what_is_no_plain_qwen3_is_refused(tmp_path: Path, field: str, value: Any, wrong: str) -> None:
    folder = changed(write_model(tmp_path), **{field: value})
    with pytest.raises(InputError, match=wrong) as error:
        read_model_shape(folder)
    assert str(folder / "config.json") in str(error.value)


def yarn(**changes: Any) -> dict[str, Any]:
    entries = PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | changes
    return {"full_attention": entries, "sliding_attention": PLAIN}


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        ("attention_bias", True, "attention_bias=true is not supported"),
        ("hidden_act", "relu", 'hidden_act="relu" is not supported'),
        ("layer_types", ["full_attention"] * 3 + ["chunked_attention"], 'layer_types="chunked_attention"'),
        ("sliding_window", 0, "sliding_window=0 is not supported"),
        (
            "rope_parameters",
            yarn(rope_type="linear"),
            r'full_attention.rope_type="linear" is not supported. Supported: "yarn"',
        ),
        ("rope_parameters", yarn(mscale=0.7), r"full_attention.mscale=0.7 is not supported"),
        ("rope_parameters", yarn(truncate=False), r"full_attention.truncate=false is not supported. Supported: true"),
        ("rope_parameters", yarn(factor=0.5), r"full_attention.factor=0.5 must be a number of at least 1"),
        (
            "rope_parameters",
            {"full_attention": PLAIN, "sliding_attention": PLAIN | {"partial_rotary_factor": 0.5}},
            r"sliding_attention.partial_rotary_factor=0.5 is not supported. Supported: 1.0",
        ),
    ],
)
def test_what_is_no_plain_olmo3_is_refused(olmo3: Path, field: str, value: Any, wrong: str) -> None:
    with pytest.raises(InputError, match=wrong) as error:
        read_model_shape(changed(olmo3, **{field: value}))
    assert str(olmo3 / "config.json") in str(error.value)


def test_another_family_is_refused(tmp_path: Path) -> None:
    transformers.MistralConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match='model_type is "mistral"; supported: llama, olmo3, qwen2, qwen3, qwen3_moe'):
        read_model_shape(tmp_path)


@pytest.mark.parametrize("head_dim", [8, 12, 128])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factor": 8.0, "original_max_position_embeddings": 8192},
        {"beta_fast": 2.0, "beta_slow": 0.25, "original_max_position_embeddings": 16, "rope_theta": 1e4},
        {"beta_fast": 1.0, "beta_slow": 1.0, "original_max_position_embeddings": 2},
        {"attention_factor": 1.5},
    ],
)
def test_rotary_embeddings_are_transformers_own(olmo3: Path, head_dim: int, changes: dict[str, Any]) -> None:
    """Of both kinds of layers, with YaRN's factor."""
    rope = yarn(**changes) | {"sliding_attention": PLAIN | {"rope_theta": 3000.0}}
    shape = read_model_shape(changed(olmo3, rope_parameters=rope, head_dim=head_dim))
    theirs = Olmo3RotaryEmbedding(transformers.AutoConfig.from_pretrained(olmo3))
    for kind, layer in (("sliding_attention", shape.attention[0]), ("full_attention", shape.attention[1])):
        wanted = getattr(theirs, f"{kind}_inv_freq")
        torch.testing.assert_close(frequencies(layer.rope, head_dim), wanted, rtol=1e-6, atol=0)
        factor = layer.rope.scaling.attention_factor if isinstance(layer.rope.scaling, Yarn) else 1.0
        assert factor == getattr(theirs, f"{kind}_attention_scaling")


def test_qwen3s_rotary_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    theirs = Qwen3RotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    assert torch.equal(frequencies(read_model_shape(folder).attention[0].rope, 12), theirs.inv_freq)


# Of meta-llama/Llama-3.1-8B and of Llama-3.2-1B, and one whose pairs are of all three kinds at any size of a head.
STRETCHED = [
    {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    {"factor": 4, "low_freq_factor": 0.01, "high_freq_factor": 2, "original_max_position_embeddings": 16},
]


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("scaling", STRETCHED)
@pytest.mark.parametrize("is_flat", [False, True], ids=["rope_parameters", "rope_scaling"])
def test_llamas_rotary_embedding(tmp_path: Path, head_dim: int, scaling: dict[str, Any], is_flat: bool) -> None:
    """In the forms of transformers 5 and 4."""
    rope = scaling | {"rope_type": "llama3"}
    entries = {"rope_parameters": rope | {"rope_theta": 500_000.0}}
    if is_flat:
        entries = {"rope_parameters": None, "rope_scaling": rope, "rope_theta": 500_000.0}
    folder = changed(write_model(tmp_path, family="llama"), head_dim=head_dim, **entries)
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    rope_read = read_model_shape(folder).attention[0].rope
    assert rope_read.scaling == Llama3(
        float(scaling["factor"]),
        scaling["original_max_position_embeddings"],
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
    )
    torch.testing.assert_close(frequencies(rope_read, head_dim), theirs.inv_freq, rtol=2e-6, atol=0)
    assert theirs.attention_scaling == 1.0


def test_qwen2s_rotary_embeddings(tmp_path: Path) -> None:
    """As published, and stretched as the model cards of Qwen2.5 say."""
    folder = write_model(tmp_path, family="qwen2")
    for rope in ({}, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}):
        changed(folder, rope_parameters=PLAIN | rope)
        theirs = Qwen2RotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
        layer = read_model_shape(folder).attention[0]
        torch.testing.assert_close(frequencies(layer.rope, 8), theirs.inv_freq, rtol=1e-6, atol=0)
        factor = layer.rope.scaling.attention_factor if isinstance(layer.rope.scaling, Yarn) else 1.0
        assert factor == theirs.attention_scaling


@pytest.mark.parametrize(
    ("family", "changes", "wrong"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=true is not supported. Supported: false"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true is not supported. Supported: false"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ("llama", {"rope_parameters": PLAIN | {"rope_type": "dynamic"}}, 'rope_type="dynamic" is not supported'),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": 0.5}}, "factor=0.5 must be a number of at least 1"),
        ("llama", {"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor=null must be a number"),
        ("llama", {"rope_parameters": LLAMA3 | {"high_freq_factor": 0.05}}, "must be above low_freq_factor=0.05"),
        ("llama", {"rope_parameters": LLAMA3 | {"beta_fast": 2.0}}, "beta_fast=2.0 is not supported"),
        ("qwen2", {"attention_bias": False}, "attention_bias=false is not supported. Supported: true"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ("qwen2", {"head_dim": 12}, "head_dim=12 is not supported. Supported: 8"),
    ],
)
def test_what_is_no_plain_llama_or_qwen2_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], wrong: str
) -> None:
    folder = changed(write_model(tmp_path, family=family), **changes)
    with pytest.raises(InputError, match=re.escape(wrong)):
        read_model_shape(folder)
