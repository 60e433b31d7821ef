"""What a server reads of a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from megatron_tempo.config.schema import EnginePrecision
from megatron_tempo.rollout.folder import private_file, served_folder
from tests.support.tiny import write_model


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


def test_a_key_is_for_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("an older one")
    path.chmod(0o644)
    assert private_file(path, "new").read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o600
