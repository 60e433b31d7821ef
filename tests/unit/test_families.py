"""What is read of a config.json, and the rotary embeddings that follow, against transformers' own."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from megatron_tempo.config.model_shape import FAMILIES, LayerAttention, Rope, Yarn, read_model_shape
from megatron_tempo.errors import InputError
from megatron_tempo.models.rotary import frequencies
from megatron_tempo.weights import tables
from tests.support.tiny import WINDOW, write_model

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


def test_every_place_knows_the_same_families() -> None:
    assert set(FAMILIES) == set(tables.NORMS)


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
    of_last_layer = shape.attention[3].rope.yarn
    assert of_last_layer is not None
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
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(InputError, match='model_type is "llama"; supported: olmo3, qwen3'):
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
        factor = layer.rope.yarn.attention_factor if layer.rope.yarn else 1.0
        assert factor == getattr(theirs, f"{kind}_attention_scaling")


def test_qwen3s_rotary_embedding(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    theirs = Qwen3RotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    assert torch.equal(frequencies(read_model_shape(folder).attention[0].rope, 12), theirs.inv_freq)
