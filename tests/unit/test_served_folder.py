"""What a server reads of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.errors import InputError
from megatron_tempo.rollout.folder import private_file, served_folder
from tests.support.tiny import LLAMA3, write_model


@pytest.mark.parametrize("flat_rope", [False, True])
def test_it_has_config_and_tokenizer_and_no_say_in_sampling(tmp_path: Path, flat_rope: bool) -> None:
    model = write_model(tmp_path / "model", tied=False, layers=1)
    (model / "generation_config.json").write_text('{"top_k": 1}')
    folder = served_folder(model, tmp_path / "served", EnginePrecision.fp8, flat_rope=flat_rope)
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert "generation_config.json" not in names
    assert not any(name.endswith(".safetensors") for name in names)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert (config["rope_theta"] if flat_rope else config["rope_parameters"]["rope_theta"]) == 10000.0
    assert "quantization_config" not in json.loads((model / "config.json").read_text())
    assert len(transformers.AutoTokenizer.from_pretrained(folder)) == len(
        transformers.AutoTokenizer.from_pretrained(model)
    )


def test_fp8_leaves_the_routers_of_a_mixture_as_they_are(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family="qwen3_moe", layers=2)
    folder = served_folder(model, tmp_path / "served", EnginePrecision.fp8, flat_rope=True)
    config = json.loads((folder / "config.json").read_text())
    routers = ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert config["quantization_config"]["modules_to_not_convert"] == routers


def flat(model: Path, tmp_path: Path, **changes: Any) -> dict[str, Any]:
    """What SGLang is told of a model whose config.json is changed so; None takes an entry out."""
    config = json.loads((model / "config.json").read_text()) | changes
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    folder = served_folder(model, tmp_path / "served", EnginePrecision.fp32, flat_rope=True)
    return json.loads((folder / "config.json").read_text())


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "attention_factor": 1.3}


@pytest.mark.parametrize("published", [False, True])
def test_an_olmo3_is_told_to_sglang_as_it_was_published(tmp_path: Path, published: bool) -> None:
    """With YaRN, which is meant for full attention alone, and its factor as SGLang reads it."""
    plain = {"rope_type": "default", "rope_theta": 500_000.0}
    nested = {"rope_parameters": {"full_attention": plain | YARN, "sliding_attention": plain}}
    older = {"rope_parameters": None, "rope_theta": 500_000.0, "rope_scaling": YARN}
    model = write_model(tmp_path / "model", family="olmo3")
    config = flat(model, tmp_path, **(older if published else nested))
    assert "rope_parameters" not in config
    assert config["rope_theta"] == 500_000.0
    assert config["rope_scaling"].pop("attn_factor") == pytest.approx(1.3 / 1.20794, rel=1e-5)
    assert config["rope_scaling"] == YARN
    assert config["layer_types"] == json.loads((model / "config.json").read_text())["layer_types"]


def test_a_base_that_is_not_said_is_the_familys(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family="olmo3")
    config = flat(model, tmp_path, rope_parameters=None)
    assert (config["rope_theta"], "rope_scaling" in config) == (500_000.0, False)


def test_llamas_scaling_in_the_form_of_transformers_4(tmp_path: Path) -> None:
    config = flat(write_model(tmp_path / "model", family="llama"), tmp_path)
    assert config["rope_theta"] == LLAMA3["rope_theta"]
    assert config["rope_scaling"] == {name: value for name, value in LLAMA3.items() if name != "rope_theta"}


def test_two_bases_cannot_be_told_to_sglang(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family="olmo3")
    rope = {
        kind: {"rope_type": "default", "rope_theta": theta}
        for kind, theta in (("full_attention", 500_000.0), ("sliding_attention", 10_000.0))
    }
    with pytest.raises(InputError, match=r"rope_theta of full attention: use rollout\.engine=vllm"):
        flat(model, tmp_path, rope_parameters=rope)


def test_a_key_is_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("an older one")
    path.chmod(0o644)
    assert private_file(path, "new").read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
