"""The published tokenizer, chat template and end tokens, as training and evaluation use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from megatron_tempo.cli import build
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.schema import DatasetConfig
from megatron_tempo.data.dataset import load_unlabelled
from megatron_tempo.data.tokenizer import end_tokens, findings, load_tokenizer
from megatron_tempo.errors import InputError
from tests.support.tools import load_tool

pytestmark = pytest.mark.real
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # of the template
TEXTS = ["What is 29 + 14?", "a  29", "x\n\n29", "naïve 北京 \U0001f600 1234567", "def f(x):\n    return x ** 2\n"]


def test_the_folder_is_the_published_model(model: Path) -> None:
    shape = read_model_shape(model)
    assert (shape.layers, shape.hidden, shape.heads, shape.groups, shape.vocab) == (30, 576, 9, 3, 49_152)
    assert shape.tied
    assert shape.ropes[0].theta == 100_000.0
    opened = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert sum(parameter.numel() for parameter in opened.parameters()) == 134_515_008
    assert opened.generation_config.eos_token_id == [2, 0]


def test_texts_come_back_from_their_tokens_and_digits_are_tokens(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert findings(tokenizer, model, TEXTS) == []
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("x\n\n29").input_ids) == ["x", "ĊĊ", "2", "9"]


def test_the_class_that_its_authors_name_makes_the_same_tokens(model: Path, tmp_path: Path) -> None:
    """huggingface.co has GPT2Tokenizer in tokenizer_config.json, which transformers 5 makes without tokenizer.json."""
    for path in model.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    said = json.loads((model / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": "GPT2Tokenizer"}))
    ours, theirs = load_tokenizer(model), load_tokenizer(tmp_path)
    for text in TEXTS:
        assert ours(text).input_ids == theirs(text).input_ids
    assert end_tokens(tmp_path) == end_tokens(model)


def test_both_end_tokens_end_a_response(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert tokenizer.convert_ids_to_tokens(end_tokens(model)) == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize(("system", "said"), [(None, DEFAULT_SYSTEM), ("You calculate.", "You calculate."), ("", "")])
def test_prompts_with_and_without_system_text(model: Path, tmp_path: Path, system: str | None, said: str) -> None:
    """The template writes a system text of its own where there is none. The prompt ends where the answer begins."""
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"prompt": "What is 29 + 14?"}) + "\n")
    config = DatasetConfig(path=str(path), system=system, suffix=" Answer with the number only.")
    tokenizer = load_tokenizer(model)
    (prompt,) = load_unlabelled(config, tokenizer, 64)
    expected = (
        f"<|im_start|>system\n{said}<|im_end|>\n<|im_start|>user\nWhat is 29 + 14? Answer with the number only."
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prompt.text == expected
    assert tokenizer.decode(list(prompt.token_ids)) == expected
    assert [token for token in prompt.token_ids if token in (0, 1, 2)] == [1, 2, 1, 2, 1]


def test_a_folder_that_is_another_model_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tool("real_model", monkeypatch)
    from real_parts.folder import PARAMETERS, check_facts

    check_facts(model, PARAMETERS)
    for path in model.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 29}))
    with pytest.raises(
        InputError, match=r"num_hidden_layers is 29, published 30; parameters is 7, published 134515008"
    ):
        check_facts(tmp_path, 7)


def test_the_preset_is_accepted_with_the_fetched_files(model: Path) -> None:
    config = build(["experiment=smollm2_arithmetic"])
    assert Path(config.model.path) == model
