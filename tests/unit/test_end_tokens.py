"""One rule for the tokens that end a response, with every engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.data.tokenizer import end_tokens
from megatron_tempo.rollout.folder import served_folder
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.vllm import Vllm
from tests.support.tiny import WORDS, write_model

OWN, OTHER, THIRD = WORDS.index("$"), 7, 9  # the first is the tokenizer's


def model_of(folder: Path, config: Any, generation: Any) -> Path:
    """A model whose two files have these end tokens; None: no such file."""
    write_model(folder, layers=1)
    whole = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config}
    (folder / "config.json").write_text(json.dumps(whole))
    file = folder / "generation_config.json"
    file.unlink(missing_ok=True)
    if generation is not None:
        file.write_text(json.dumps({"eos_token_id": generation}))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (OTHER, [OWN, THIRD], [OWN, THIRD]),
        ([OTHER, THIRD], THIRD, [OWN, THIRD]),
        (OTHER, None, [OWN, OTHER]),
        (None, OTHER, [OWN, OTHER]),
        (OWN, OWN, [OWN]),
    ],
)
@pytest.mark.parametrize("flat_rope", [False, True])
def test_an_engine_reads_the_end_tokens_of_the_run(
    tmp_path: Path, config: Any, generation: Any, ends: list[int], flat_rope: bool
) -> None:
    """What a server adds to a request's end tokens by its own config (transformers reads it) are the same ones."""
    model = model_of(tmp_path / "model", config, generation)
    assert sorted(end_tokens(model)) == sorted(ends)
    folder = served_folder(model, tmp_path / "served", EnginePrecision.fp32, flat_rope=flat_rope)
    read = transformers.AutoConfig.from_pretrained(folder).eos_token_id
    assert sorted([read] if isinstance(read, int) else read) == sorted(ends)
    assert not (folder / "generation_config.json").exists()
    assert json.loads((model / "config.json").read_text())["eos_token_id"] == config, "the user's file is not changed"
    assert Sglang(cpu=True, tensor=1).other_ends(model, found=False) is None


def test_servers_of_somebody_else_that_end_elsewhere_are_named(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", [OTHER, OWN], [OWN, THIRD])
    warning = Sglang(cpu=True, tensor=1).other_ends(model, found=True)
    assert warning is not None
    assert f"end responses also at its {WORDS[OTHER]} ({OTHER})," in warning
    assert f"config.json with eos_token_id=[{OWN}, {THIRD}]" in warning
    assert Vllm(cpu=True, tensor=1).other_ends(model, found=True) is None
    agreeing = model_of(tmp_path / "agreeing", [OWN], [OWN, THIRD])
    assert Sglang(cpu=True, tensor=1).other_ends(agreeing, found=True) is None


def test_a_token_at_which_sglang_always_ends_is_named_until_the_model_names_it(tmp_path: Path) -> None:
    model = model_of(tmp_path / "model", OWN, OWN)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|eom_id|>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    number = len(WORDS)
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": number + 1}
    (model / "config.json").write_text(json.dumps(config))
    warning = Sglang(cpu=True, tensor=1).other_ends(model, found=False)
    assert warning is not None
    assert f"<|eom_id|> ({number})" in warning
    assert f"add {number} to eos_token_id in {model}/generation_config.json" in warning
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [OWN, number]}))
    assert Sglang(cpu=True, tensor=1).other_ends(model, found=False) is None
