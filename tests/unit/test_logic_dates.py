"""The second task: its answers by independent evaluation, its sets, its tokenizer and its base model."""

from __future__ import annotations

import datetime
import importlib
import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from megatron_tempo.config.compose import REPOSITORY
from megatron_tempo.data.tokenizer import load_tokenizer
from megatron_tempo.rewards import text
from tests.support.tools import load_tool

BBH = REPOSITORY.parent / "shared" / "data" / "bbh"
MONTHS = {datetime.date(2000, n, 1).strftime("%B"): n for n in range(1, 13)}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("make_logic_dates", monkeypatch)


@pytest.fixture
def habits(tool: ModuleType) -> ModuleType:
    return importlib.import_module("logic_parts.habits")


@pytest.fixture
def rows(tool: ModuleType) -> dict[str, list[dict[str, Any]]]:
    """The questions of each file, as written."""
    return {
        name: [json.loads(line) for line in tool.questions_file(made).splitlines()]
        for name, made in tool.make_sets(1).items()
    }


def stated_date(prompt: str) -> datetime.date:
    found = re.search(r"(\d+)/(\d+)/(\d{4})", prompt)
    if found:
        return datetime.date(int(found[3]), int(found[1]), int(found[2]))
    found = re.search(r"([A-Z][a-z]+) (\d+), (\d{4})", prompt) or re.search(r"(\d+) ([A-Z][a-z]+) (\d{4})", prompt)
    assert found, prompt
    month, day = (found[1], found[2]) if found[1] in MONTHS else (found[2], found[1])
    return datetime.date(int(found[3]), MONTHS[month], int(day))


def solve_date(prompt: str) -> str:
    """The answer, by reading the words, with datetime."""
    said, _, asked = prompt.partition(" What is the date ")
    today, days = stated_date(said), datetime.timedelta(days=1)
    if said.startswith("Yesterday was") or " yesterday, " in said:
        today += days
    elif said.startswith("Tomorrow is") or " tomorrow, " in said:
        today -= days
    elif married := re.search(r"the (\d+)-year anniversary today", said):
        today = today.replace(year=today.year + int(married[1]))
    elif ago := re.search(r", (\d+) days ago\.$|bought (\d+) eggs .* one a day until today", said):
        today += int(ago[1] or ago[2]) * days
    elif left := re.search(r", (?:in )?(\d+) days(?: from today)?\.$", said):
        today -= int(left[1]) * days
    else:
        assert re.match(r"Today is |It is .* today\.", said), said
    asked = asked.removesuffix(" in MM/DD/YYYY?")
    if asked == "a month ago":
        today = today.replace(year=today.year - (today.month == 1), month=(today.month - 2) % 12 + 1)
    elif asked == "one year ago from today":
        today = today.replace(year=today.year - 1)
    else:
        named = {"today": 0, "tomorrow": 1, "yesterday": -1, "one week from today": 7, "one week ago from today": -7}
        counted = re.fullmatch(r"(\d+) days (ago|from today)", asked)
        by = named[asked] if asked in named else int(counted[1]) * (-1 if counted[2] == "ago" else 1)
        today += by * days
    return today.strftime("%m/%d/%Y")


def test_every_answer_is_that_of_python(rows: dict[str, list[dict[str, Any]]]) -> None:
    for row in itertools.chain.from_iterable(rows.values()):
        if row["kind"] == "boolean":
            expression = row["prompt"].removesuffix(" is")
            assert re.fullmatch(r"(?:(?:True|False|and|or|not|\(|\)) ?)+", expression)
            assert row["answer"] == str(eval(expression))
        else:
            assert row["answer"] == solve_date(row["prompt"]), row["prompt"]


def test_sizes_kinds_levels_and_answers(rows: dict[str, list[dict[str, Any]]]) -> None:
    assert {name: len(some) for name, some in rows.items()} == {"labelled": 2304, "unlabelled": 256, "heldout": 256}
    for name in ("unlabelled", "heldout"):
        counts = Counter((row["kind"], row["level"], row["misleading"]) for row in rows[name])
        assert counts == {(k, n, m): 32 for k in ("boolean", "date") for n in (2, 3) for m in (False, True)}
    answers = Counter(row["answer"] for row in rows["labelled"] if row["kind"] == "boolean")
    assert all(count > 0.35 * answers.total() for count in answers.values())
    assert all(len(some) == len({row["id"] for row in some}) for some in rows.values())


def test_no_question_is_in_two_sets_or_in_the_pretraining(
    tool: ModuleType, rows: dict[str, list[dict[str, Any]]]
) -> None:
    prompts = [row["prompt"] for row in itertools.chain.from_iterable(rows.values())]
    assert len(prompts) == len(set(prompts))
    stream = tool.pretraining(tool.make_sets(1), tool.BASES["plain"], 1)
    assert not {prompt for prompt, _ in itertools.islice(stream, 3000)} & set(prompts)


def test_the_questions_depend_on_the_seed_only(tool: ModuleType, rows: dict[str, list[dict[str, Any]]]) -> None:
    again, other = tool.make_sets(1), tool.make_sets(2)
    assert [row.question.prompt for row in again["heldout"]] == [row["prompt"] for row in rows["heldout"]]
    assert {row.question.prompt for row in other["heldout"]} != {row["prompt"] for row in rows["heldout"]}


def is_like_bbh(prompt: str) -> bool:
    """Whether a question has a form of BIG-Bench Hard's that none of ours has: by operands and `not`, or by year."""
    if not prompt.endswith(" is"):
        return any(int(year) < 2022 for year in re.findall(r"\b\d{4}\b", prompt))
    words = prompt.split()
    operands, nots = words.count("True") + words.count("False"), words.count("not")
    if "(" in words:
        return operands <= 3
    return operands == 4 or (nots >= 3 and nots % 2 == 1)


def test_no_question_can_be_one_of_big_bench_hard(tool: ModuleType, rows: dict[str, list[dict[str, Any]]]) -> None:
    prompts = [row["prompt"] for row in itertools.chain.from_iterable(rows.values())]
    stream = tool.pretraining(tool.make_sets(1), tool.BASES["plain"], 1)
    assert not [p for p in [*prompts, *(p for p, _ in itertools.islice(stream, 2000))] if is_like_bbh(p)]


@pytest.mark.skipif(not BBH.is_dir(), reason="BIG-Bench Hard's files are not here")
def test_big_bench_hard_has_those_forms() -> None:
    """`is_like_bbh` is true of all questions of BIG-Bench Hard, but a few that state no year."""
    for name in ("boolean_expressions", "date_understanding"):
        asked = [one["input"] for one in json.loads((BBH / f"{name}.json").read_text())["examples"]]
        prompts = [one.partition("\nOptions:")[0] for one in asked]
        dated = [p for p in prompts if p.endswith(" is") or re.search(r"\d{4}", p)]
        assert len(dated) > 200
        assert not [p for p in dated if not is_like_bbh(p)]


def test_a_trace_without_errors_states_the_answer(tool: ModuleType, habits: ModuleType) -> None:
    right, misled = habits.Habits(slip=0.0, misled=0.0), habits.Habits(slip=0.0, misled=1.0)
    for row in itertools.chain.from_iterable(tool.make_sets(1).values()):
        prompt, gold = row.question.prompt, text.gold("", row.question.answer)
        assert text.read(prompt, row.question.trace(habits.Steps(right, random.Random(0)))) == gold
        wrong = row.question.trace(habits.Steps(misled, random.Random(0)))
        assert (text.read(prompt, wrong) != gold) == row.question.is_misleading, wrong


def test_a_boolean_trace_by_hand(habits: ModuleType) -> None:
    """True or not True and not ( True and False ): with the misconception, `or` comes first."""
    parts = importlib.import_module("logic_parts.booleans")
    true, false = parts.Term(0, True), parts.Term(0, False)
    terms = (true, parts.Term(1, True), parts.Term(1, parts.Expression((true, false), ("and",))))
    question = parts.BooleanQuestion(parts.Expression(terms, ("or", "and")))
    assert question.prompt == "True or not True and not ( True and False ) is"
    assert question.answer == "True"
    assert not question.is_misleading
    right, misled = (habits.Steps(habits.Habits(slip=0.0, misled=share), random.Random(0)) for share in (0.0, 1.0))
    start = "not: True or False and not ( True and False ). brackets: True or False and True. "
    assert question.trace(right) == start + "and: True or False. So the answer is True."
    assert question.trace(misled) == start + "or: True and True. So the answer is True."


def test_date_traces_by_hand(habits: ModuleType) -> None:
    """Leap years count; with the misconception, all months have 30 days."""
    parts = importlib.import_module("logic_parts.dates")
    steps = (parts.Step("days", 1), parts.Step("days", -7))
    question = parts.DateQuestion(datetime.date(2024, 2, 29), steps, "")
    right, misled = (habits.Steps(habits.Habits(slip=0.0, misled=share), random.Random(0)) for share in (0.0, 1.0))
    assert question.trace(right) == (
        "02/29/2024. 29+1=30. February has 29 days, so today is 03/01/2024. "
        "1-7=-6. February has 29 days, so the answer is 02/23/2024."
    )
    assert question.trace(misled) == (
        "02/29/2024. 29+1=30. February has 30 days, so today is 02/30/2024. 30-7=23, so the answer is 02/23/2024."
    )
    assert not question.is_misleading
    back = parts.DateQuestion(datetime.date(2031, 1, 15), (parts.Step("months", -1), parts.Step("years", -1)), "")
    assert back.trace(right) == (
        "01/15/2031. 1-1=0, which is December, so today is 12/15/2030. 2030-1=2029, so the answer is 12/15/2029."
    )


@pytest.mark.parametrize(("base", "low", "high"), [("plain", 0.45, 0.8), ("misled", 0.35, 0.8)])
def test_how_often_traces_are_right(tool: ModuleType, habits: ModuleType, base: str, low: float, high: float) -> None:
    """And that those of the misled base are mostly wrong on misleading questions, and not on others."""
    right: dict[bool, list[bool]] = {True: [], False: []}
    rng = random.Random(0)
    for row in tool.make_sets(1)["heldout"] * 8:
        trace = row.question.trace(habits.Steps(tool.BASES[base], rng))
        right[row.question.is_misleading].append(f"answer is {row.question.answer}." in trace)
    shares = {kind: sum(verdicts) / len(verdicts) for kind, verdicts in right.items()}
    assert low < (shares[True] + shares[False]) / 2 < high
    assert (shares[True] < 0.5 < shares[False] - 0.1) == (base == "misled")


@pytest.fixture
def made(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the program writes, with tiny models after three steps."""
    made_once = tool.common_tokenizer(tool.make_sets(1))
    monkeypatch.setattr(tool, "common_tokenizer", lambda sets: made_once)
    small = ["--steps=3", "--rows=4", "--layers=1", "--hidden=16", "--ffn=16"]
    monkeypatch.setattr("sys.argv", ["make_logic_dates.py", f"--out={tmp_path}", *small])
    assert tool.main() == 0
    return tmp_path


def test_the_program_writes_a_model_that_the_trainer_reads(tool: ModuleType, made: Path, capsys: Any) -> None:
    tokenizer = load_tokenizer(made / "plain")
    rows = [json.loads(line) for line in (made / "labelled.jsonl").read_text().splitlines()]
    trace = "02/29/2024. 29+1=30. February has 29 days, so the answer is 03/01/2024."
    for words in [row["prompt"] for row in rows[:200]] + [trace]:
        assert tokenizer.decode(tokenizer(words)["input_ids"]) == words
    assert tokenizer.tokenize("2031") == ["20", "31"]
    assert len(tokenizer.tokenize("the answer is 03/01/2024")) > 5
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    assert json.loads((made / "plain" / "config.json").read_text())["vocab_size"] >= len(tokenizer)

    plain, misled = ((made / base / "model.safetensors").read_bytes() for base in ("plain", "misled"))
    assert plain != misled, "they are trained on other reasoning"
    before = (made / "plain" / "model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert tool.main() == 0  # complete: nothing is made again
    assert "is complete" in capsys.readouterr().out
    assert (made / "plain" / "model.safetensors").stat().st_mtime_ns == before


def test_files_of_other_arguments_are_not_replaced(
    tool: ModuleType, made: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.argv", ["make_logic_dates.py", f"--out={made}", "--seed=2"])
    before = (made / "heldout.jsonl").read_text()
    assert tool.main() == 2
    assert "--force replaces them" in capsys.readouterr().err
    assert (made / "heldout.jsonl").read_text() == before


def test_labels_are_the_responses(tool: ModuleType, made: Path) -> None:
    """Rows of a batch: prompts and padding have no label; the last label is the end token."""
    tokenizer = load_tokenizer(made / "plain")
    stream = tool.pretraining(tool.make_sets(1), tool.BASES["plain"], 1)
    pairs = list(itertools.islice(stream, 16))
    tokens, labels = next(tool.batches(tokenizer, iter(pairs), 2, 1))
    assert tokens.shape == labels.shape
    responses = {response for _, response in pairs}
    for row, targets in zip(tokens, labels, strict=True):
        kept = targets != -100
        assert torch.equal(targets[kept], row[kept])
        assert tokenizer.decode(targets[kept]).removesuffix("<|im_end|>") in responses
