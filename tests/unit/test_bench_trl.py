"""tools/bench_trl.py: both programs get the same work, and the table says what they took."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
import transformers

from megatron_tempo.cli import build
from megatron_tempo.data.tokenizer import end_tokens
from tests.support.tools import load_tool


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("bench_trl", monkeypatch)


def test_the_table_by_hand(bench: ModuleType) -> None:
    ours = [{"seconds": s, "phases": {"generate": 0.5, "logprobs": 0.25}, "tokens": 90} for s in (1.0, 3.0, 2.0)]
    theirs = [{"seconds": s, "phases": {"generate": 1.0, "logprobs": 0.5}, "tokens": 110} for s in (4.0, 9.0, 5.0)]
    assert bench.table({"ours": ours, "TRL": theirs}).splitlines()[2:] == [
        "| iteration | 2.000 s | 5.000 s | 2.50 |",
        "| generation | 0.500 s | 1.000 s | 2.00 |",
        "| log-probabilities | 0.250 s | 0.500 s | 2.00 |",
        "| actor and the rest | 1.250 s | 3.500 s | 2.80 |",
        "| response tokens, mean | 90 | 110 |  |",
    ]
    assert bench.table({"TRL": theirs}).splitlines()[2] == "| iteration | 5.000 s |  |"


def test_a_made_model_ends_responses_with_each_of_its_end_tokens(bench: ModuleType, tmp_path: Path) -> None:
    work = bench.WORKS["tiny"]
    model, prompts = bench.write(work, tmp_path)
    assert sorted(end_tokens(model)) == list(range(60, 64))
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    lengths = {len(tokenizer(row["prompt"]).input_ids) for row in rows}
    assert lengths == set(range(1, work.prompt_tokens + 1))


def test_sizes_are_those_that_the_names_say(bench: ModuleType) -> None:
    for name, rows, tokens, parameters in (("quickstart", 512, 15, 156_000), ("jagged", 128, 256, 9_500_000)):
        work = bench.WORKS[name]
        assert (work.rows, work.response_tokens) == (rows, tokens)
        if (sizes := work.model) is not None:
            attention = 2 * (sizes["heads"] + sizes["groups"]) * sizes["head_dim"]
            layer = (attention + 3 * sizes["ffn"]) * sizes["hidden"]
            assert sizes["layers"] * layer + 2 * sizes["vocab"] * sizes["hidden"] == pytest.approx(parameters, rel=0.01)


@pytest.mark.parametrize("name", ["quickstart", "jagged", "tiny"])
def test_our_command_line_passes_the_check(bench: ModuleType, tmp_path: Path, name: str) -> None:
    from trl_parts import ours

    work = bench.WORKS[name]
    model, prompts = bench.write(work, tmp_path)
    config = build(ours.words(work, str(model), str(prompts), str(tmp_path / "run")), world_size=1)
    assert config.stage2.labelled_prompts * config.stage2.responses_per_prompt == work.rows
    assert config.stage2.labelled_prompts // config.stage2.actor.mini_batch_prompts == work.steps
