"""Tokenizers that cannot be loaded, that do not fit their model, that lose text; which tokens end a response."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from megatron_tempo.config.schema import Config
from megatron_tempo.data.sets import tokenizer_findings
from megatron_tempo.data.tokenizer import end_tokens, findings, load_tokenizer
from megatron_tempo.errors import InputError
from megatron_tempo.types import UnlabelledPrompt

WORDS = ["?", "$", "a", "b", "find", "one"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "vocab_size": len(WORDS)}))
    return tmp_path


def words(folder: Path, decoder: object = None, normalizer: object = None) -> None:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if decoder is not None:
        tokenizer.decoder = decoder
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$", unk_token="?").save_pretrained(folder)


def test_end_tokens_are_the_union_of_what_files_say(folder: Path) -> None:
    generation, config = folder / "generation_config.json", folder / "config.json"
    for says, ends in [({"eos_token_id": [4, 5]}, [4, 5, 1]), ({"eos_token_id": 4}, [4, 1]), ({}, [1])]:
        generation.write_text(json.dumps(says))
        assert end_tokens(folder) == ends
    config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": 3}))
    assert end_tokens(folder) == [1], "config.json does not count if there is a generation_config.json"
    generation.unlink()
    assert end_tokens(folder) == [3, 1]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"eos_token": None}))
    assert end_tokens(folder) == [3]
    config.write_text(json.dumps({"model_type": "qwen3", "vocab_size": len(WORDS)}))
    with pytest.raises(InputError, match="no eos_token_id"):
        end_tokens(folder)
    for end in ("$", [1, None], -1, True, {"a": 1}):
        generation.write_text(json.dumps({"eos_token_id": end}))
        with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id=.* is no token id"):
            end_tokens(folder)


def test_end_tokens_that_differ_are_told_of(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert findings(tokenizer, folder, ["find one"]) == []
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    assert findings(tokenizer, folder, []) == [], "one of them is the tokenizer's"
    (folder / "generation_config.json").write_text('{"eos_token_id": 3}')
    (line,) = findings(tokenizer, folder, [])
    assert "ends responses with b (3), the tokenizer with $ (1): each of them ends one here" in line


def test_a_tokenizer_that_changes_texts_is_told_of(folder: Path) -> None:
    assert findings(load_tokenizer(folder), folder, ["find  one\n", "a $ b"]) == [], "spaces may change"
    (line,) = findings(load_tokenizer(folder), folder, ["find one", "find two"])
    assert "changes texts: 'find two' comes back as 'find ?'" in line
    words(folder, normalizer=Lowercase())
    (line,) = findings(load_tokenizer(folder), folder, ["FIND one"])
    assert "'FIND one' comes back as 'find one'" in line
    words(folder, decoder=decoders.Fuse())
    with pytest.raises(InputError, match="loses the spaces of a text: 'find one' comes back as 'findone'"):
        findings(load_tokenizer(folder), folder, ["one", "find one"])


def byte_level(folder: Path, tokenizer_class: str, *parts: PreTokenizer) -> None:
    """A folder whose tokenizer.json has these parts, which the class's own tokenizer does not have."""
    letters = sorted(ByteLevel.alphabet())
    spaces = {"ĠĠ": len(letters), "ĊĊ": len(letters) + 1, "$": len(letters) + 2}
    model = BPE({letter: i for i, letter in enumerate(letters)} | spaces, [("Ġ", "Ġ"), ("Ċ", "Ċ")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Sequence([*parts, ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="$").save_pretrained(folder)
    said = folder / "tokenizer_config.json"
    said.write_text(json.dumps(json.loads(said.read_text()) | {"tokenizer_class": tokenizer_class}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": len(letters) + 3}))


@pytest.mark.parametrize(
    "tokenizer_class",
    ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "LlamaTokenizerFast", "TokenizersBackend"],
)
def test_texts_are_cut_as_tokenizer_json_says_whatever_the_class(folder: Path, tokenizer_class: str) -> None:
    """SmolLM2's splits digits. A class's own pre-tokenizer takes the last blank before a number from the others."""
    byte_level(folder, tokenizer_class, Digits(individual_digits=True))
    tokenizer = load_tokenizer(folder)
    for text, tokens in (("a  29", ["a", "ĠĠ", "2", "9"]), ("x\n\n7", ["x", "ĊĊ", "7"])):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.convert_ids_to_tokens(ids) == tokens
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == "$"
    assert end_tokens(folder) == [tokenizer.convert_tokens_to_ids("$")]


def test_tokens_without_an_embedding_are_refused(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["extra", "more"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"2 tokens without an embedding, first 'extra' with id 6.* vocab_size=6"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", ["cut", "3", "[]", "pipe", "folder", "\udcff", ""])
def test_a_file_of_a_tokenizer_that_is_none_is_named(folder: Path, name: str, content: str) -> None:
    path = folder / name
    text = path.read_text()
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content == "folder":
        path.mkdir()
    else:
        path.write_text(text[:-9] if content == "cut" else content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(InputError, match=str(path)):
        load_tokenizer(folder)


def test_a_tokenizer_of_an_unknown_form_is_told_of(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"its tokenizer cannot be loaded \("):
        load_tokenizer(folder)


def test_a_job_is_told_what_there_is_to_know_of_its_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = "{{ strftime_now('%Y') }} {{ messages[0].content }}"
    config = Config()
    config.model.path = str(folder)
    prompts = [UnlabelledPrompt("a", "find one", (4, 5)), UnlabelledPrompt("b", "find two", (4, 0))]
    lines = tokenizer_findings(config, tokenizer, [prompts])
    assert [line.partition(": ")[2].partition(":")[0] for line in lines[:1]] == [f"{folder}"]
    assert "'find two' comes back as 'find ?'" in lines[0]
    assert lines[1] == "the chat template asks for the date, and gets 2025-01-01 on every day: prompts stay the same"
