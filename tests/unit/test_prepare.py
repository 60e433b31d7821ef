"""megatron-tempo prepare: each benchmark from its public form, what is dropped and why, and that no label slips in."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_tempo import cli
from megatron_tempo.config.benchmarks import BENCHMARKS
from megatron_tempo.config.choices import Verifier
from megatron_tempo.data.prepare import CUSTOM, Order, Report, heldout_path, prepare
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.runtime.folder_lock import FolderLock
from tests.support.tools import load_tool


@pytest.fixture(scope="module", autouse=True)
def verifiers() -> Iterator[None]:
    """The workers of all tests: `make` is called with them."""
    with Verifiers(workers=1, seconds=30) as SHARED["verifiers"]:
        yield


SHARED: dict[str, Verifiers] = {}


def make(tmp_path: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> tuple[list[dict[str, Any]], Report]:
    """The rows written, and the report."""
    source = tmp_path / "task.json"
    source.write_text(json.dumps(rows))
    order = Order(name, [source], **{"out": tmp_path / "out.jsonl", **changes})
    return read(order.out, prepare(order, SHARED["verifiers"]))


def read(path: Path, report: Report) -> tuple[list[dict[str, Any]], Report]:
    return [json.loads(line) for line in path.read_text().splitlines()], report


DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nFind 1+1.\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
ZEBRA = {"header": ["House", "Name", "Drink"], "rows": [["1", "Eric", "tea"], ["2", "Bob", "milk"]]}
EMPTY = '{"House 1": {"Name": "...", "Drink": "..."}, "House 2": {"Name": "...", "Drink": "..."}}'
FULL = '{"House 1": {"Name": "Eric", "Drink": "tea"}, "House 2": {"Name": "Bob", "Drink": "milk"}}'
OPTIONS = ["(A)two", "(B) 4", "C. six"]

# The set, a row as published (docs/data.md has the sources), and the row that is made of it.
FORMS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "H4": ("aime2024", {"id": 60, "problem": "P", "answer": "204", "year": "2024"}, {"id": "60", "answer": "204"}),
    "Maxwell-Jia": ("aime2024", {"ID": "2024-I-1", "Problem": "P", "Answer": 33}, {"id": "2024-I-1", "answer": "33"}),
    "TTRL": ("aime2024", {"prompt": "P", "answer": "025", "id": "0"}, {"id": "0", "answer": "025"}),
    "opencompass": ("aime2025", {"question": "P", "answer": "70"}, {"id": "task:0", "answer": "70"}),
    "MathArena": ("aime2026", {"problem_idx": 1, "answer": 277, "problem": "P"}, {"id": "1", "answer": "277"}),
    "Seed": ("beyond_aime", {"problem": "P", "answer": 7}, {"id": "task:0", "answer": "7"}),
    "OlymMATH": (
        "olymmath_hard",
        {"problem": "P", "answer": "$\\frac12$", "subject": "Algebra", "unique_id": "OlymMATH-HARD-0-EN"},
        {"id": "OlymMATH-HARD-0-EN", "answer": "$\\frac12$"},
    ),
    "MATH-500": (
        "math500",
        {"problem": "P", "solution": "...", "answer": "p - q", "unique_id": "test/precalculus/807.json"},
        {"id": "test/precalculus/807.json", "answer": "p - q"},
    ),
    "BBH words": ("bbh", {"input": "P", "target": "a b"}, {"id": "task:0", "answer": "a b", "verifier": "text"}),
    "BBH options": (
        "bbh",
        {"input": "Q\nOptions:\n(A) 1\n(B) 2", "target": "(B)"},
        {"id": "task:0", "prompt": "Q\nOptions:\n(A) 1\n(B) 2", "answer": "(B)", "verifier": "choice"},
    ),
    "AGIEval": (
        "agieval",
        {"passage": " T ", "question": "P", "options": OPTIONS, "label": "B", "answer": None},
        {"id": "task:0", "prompt": "T\n\nP\n\n(A) two\n(B) 4\n(C) six", "answer": "B", "verifier": "choice"},
    ),
    "AGIEval, two right": (
        "agieval",
        {"passage": None, "question": "P", "options": OPTIONS, "label": ["A", "C"], "answer": None},
        {"id": "task:0", "prompt": "P\n\n(A) two\n(B) 4\n(C) six", "answer": "A, C", "verifier": "choice"},
    ),
    "AGIEval, blanks": (
        "agieval",
        {"passage": "", "question": "P", "options": None, "label": None, "answer": "$5$;$10$"},
        {"id": "task:0", "answer": "(5, 10)", "verifier": "math"},
    ),
    "AGIEval, a blank": (
        "agieval",
        {"passage": None, "question": "P", "options": None, "label": None, "answer": "$2\\sqrt{3}$"},
        {"id": "task:0", "answer": "$2\\sqrt{3}$", "verifier": "math"},
    ),
    "ZebraLogic": (
        "zebralogic",
        {"id": "lgp-1", "size": "2*2", "puzzle": "P", "solution": ZEBRA},
        {"id": "lgp-1", "prompt": f"P\n\nThe grid:\n\n{EMPTY}", "answer": FULL},
    ),
    "DAPO": (
        "dapo_math_17k",
        {
            "prompt": [{"role": "user", "content": DAPO}],
            "reward_model": {"ground_truth": "2", "style": "rule"},
            "extra_info": {"index": "9a9b"},
        },
        {"id": "9a9b", "prompt": "Find 1+1.", "answer": "2"},
    ),
    "DAPO of open-r1": ("dapo_math_17k", {"prompt": "P", "solution": "34"}, {"id": "task:0", "answer": "34"}),
    "Dolci": (
        "dolci_general",
        {"prompt": "user: P", "ground_truth": ["Well, ..."], "custom_id": "c1"},
        {"id": "c1", "answer": "Well, ..."},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_row_of_each_public_form(tmp_path: Path, form: str) -> None:
    name, row, made = FORMS[form]
    assert make(tmp_path, name, [row])[0] == [{"prompt": "P", **made}]
    (alone,), _ = make(tmp_path, name, [row], unlabelled=True, out=tmp_path / "alone.jsonl")
    assert alone == {"id": made["id"], "prompt": made.get("prompt", "P")}


def test_every_set_has_a_form() -> None:
    code = {name for name, benchmark in BENCHMARKS.items() if benchmark.verifier is Verifier.code}
    assert {name for name, _, _ in FORMS.values()} == set(BENCHMARKS) - {"gpqa_diamond", "olymmath_easy"} - code


def gpqa(number: int) -> dict[str, str]:
    wrong = {f"Incorrect Answer {n}": f"wrong {n} of {number}" for n in (1, 2, 3)}
    return {"Question": f"Q {number}\n", "Correct Answer": f" right {number}\n", **wrong, "Record ID": f"rec{number}"}


def test_options_of_gpqa_are_shuffled_by_the_seed(tmp_path: Path) -> None:
    rows = [gpqa(number) for number in range(64)]
    made, _ = make(tmp_path, "gpqa_diamond", rows)
    for number, row in enumerate(made):
        question, _, *options = row["prompt"].splitlines()
        assert (row["id"], question) == (f"rec{number}", f"Q {number}")
        assert [option[:4] for option in options] == ["(A) ", "(B) ", "(C) ", "(D) "]
        assert options["ABCD".index(row["answer"])][4:] == f"right {number}"
        texts = {f"right {number}", *(f"wrong {n} of {number}" for n in (1, 2, 3))}
        assert {option[4:] for option in options} == texts
    assert min(Counter(row["answer"] for row in made).values()) >= 6  # of 16 expected
    # The order of a question's options hangs on the seed and on it, not on the rows around it.
    assert make(tmp_path, "gpqa_diamond", rows[::-1], force=True)[0] == made[::-1]
    assert make(tmp_path, "gpqa_diamond", rows, seed=1, force=True)[0] != made
    same = gpqa(0) | {"Incorrect Answer 2": "Right  0"}
    lacking = gpqa(1) | {"Incorrect Answer 2": ""}
    _, report = make(tmp_path, "gpqa_diamond", [same, lacking, gpqa(2)], force=True)
    assert report.dropped == {"the right option is there twice": 1, "an option is missing": 1}


BAD_MESSAGES = "its messages do not have a known role and a text each, or do not end with the user's"
BOOLEAN = "has true or false for an answer, which is no text and no number"
NO_LIST = (
    "its column of messages holds text that is no list of chat messages in JSON; if it is the question itself, give "
    "the column another name"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x"}]
# A set, a row beside a sound one, and why it is dropped.
DROPPED: list[tuple[str, dict[str, Any], str]] = [
    ("math500", {"problem": "x", "answer": " "}, "has no answer"),
    ("math500", {"problem": "x", "answer": None}, "has no answer"),
    ("math500", {"problem": "x", "answer": [None]}, "has no answer"),
    ("math500", {"problem": "x", "answer": ["1", "2"]}, "has several answers"),
    ("math500", {"problem": "x", "answer": []}, "has several answers"),
    ("math500", {"problem": "x", "answer": True}, BOOLEAN),
    ("math500", {"problem": "x", "answer": [False]}, BOOLEAN),
    ("bbh", {"input": "Q", "target": True}, BOOLEAN),
    ("agieval", {"question": "x", "options": OPTIONS, "label": True}, BOOLEAN),
    ("agieval", {"question": "x", "options": ["(A)1", True], "label": "A"}, BOOLEAN),
    ("gpqa_diamond", gpqa(9) | {"Correct Answer": True}, BOOLEAN),
    ("gpqa_diamond", gpqa(9) | {"Incorrect Answer 2": {"a": 1}}, "has a group of fields for an answer"),
    ("gpqa_diamond", gpqa(9) | {"Question": CHAT}, "has several chat messages where the set has one text"),
    ("dolci_general", {"messages": "What is 1+1?", "ground_truth": "2"}, NO_LIST),
    ("dolci_general", {"messages": '[{"text": "x"}]', "ground_truth": "2"}, NO_LIST),
    ("dolci_general", {"messages": "[]", "ground_truth": "2"}, NO_LIST),
    ("dolci_general", {"messages": '[{"role": "user", "content": "x"', "ground_truth": "2"}, BAD_MESSAGES),
    ("dolci_general", {"messages": "[{role: user, content: x}]", "ground_truth": "2"}, BAD_MESSAGES),
    ("math500", {"problem": "[{role: user, content: What is 1+1?}]", "answer": "2"}, BAD_MESSAGES),
    ("math500", {"problem": "x", "answer": {"value": 1}}, "has a group of fields for an answer"),
    ("math500", {"problem": "x", "answer": float("nan")}, "its answer is not a finite number"),
    ("math500", {"problem": "x", "answer": float("-inf")}, "its answer is not a finite number"),
    ("math500", {"problem": "x", "answer": "Infinity"}, "its answer is not a finite number"),
    ("math500", {"problem": "x", "answer": "NaN"}, "has no answer"),
    ("math500", {"problem": "x \ud800", "answer": "1"}, "has half a surrogate pair, which is no text"),
    ("math500", {"problem": "x", "answer": "\udfff"}, "has half a surrogate pair, which is no text"),
    ("math500", {"problem": "x", "answer": "1", "id": "\ud800"}, "has half a surrogate pair, which is no text"),
    ("math500", {"problem": '[{"role": "user", "content": "x"', "answer": "1"}, BAD_MESSAGES),
    (
        "math500",
        {"problem": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "answer": "1"},
        BAD_MESSAGES,
    ),
    ("math500", {"problem": [{"role": "user", "content": 3}], "answer": "1"}, BAD_MESSAGES),
    ("math500", {"problem": [3], "answer": "1"}, BAD_MESSAGES),
    ("agieval", {"question": "x", "options": [1, 2], "label": [1]}, "has columns of another form than the set's"),
    ("zebralogic", {"puzzle": "x", "solution": "y"}, "has columns of another form than the set's"),
    ("math500", {"problem": " ", "answer": "1"}, "has no question"),
    ("math500", {"problem": None, "answer": "1"}, "has no question"),
    ("math500", {"problem": 5, "answer": "1"}, "has no question"),
    ("math500", {"answer": "1"}, "lacks a column that the first row has"),
    ("math500", {"problem": "x", "answer": "1" * 3000}, "its verifier does not recognise the answer"),
    ("math500", {"problem": "See ![it](a.png).", "answer": "1"}, "asks about an image"),
    ("math500", {"problem": "See <image_1>.", "answer": "1"}, "asks about an image"),
    ("math500", {"problem": "x", "answer": "1", "image": "a.png"}, "asks about an image"),
    ("bbh", {"input": "Q\n(A) 1\n(B) 2", "target": "(C)"}, "its verifier does not recognise the answer"),
    ("agieval", {"question": "x", "options": OPTIONS, "label": None}, "has no answer"),
    ("agieval", {"question": "x", "options": OPTIONS, "label": "E"}, "its verifier does not recognise the answer"),
    ("agieval", {"question": "x", "options": ["(A)1", "(B)1"], "label": "A"}, "the right option is there twice"),
    ("zebralogic", {"puzzle": "x", "solution": None}, "the solution is no table that starts with the houses"),
    (
        "zebralogic",
        {"puzzle": "x", "solution": {"header": ["House", "Name"], "rows": [["1"]]}},
        "the solution is no table that starts with the houses",
    ),
    ("zebralogic", {"puzzle": "x", "solution": {"header": ["House", "A"], "rows": [["___", "___"]]}}, "has no answer"),
    ("dapo_math_17k", {"prompt": DAPO.replace("1+1", " 1+1"), "solution": "2"}, "the same question as an earlier row"),
]
SOUND = {name: row for name, row, _ in FORMS.values()} | {
    "dapo_math_17k": {"prompt": "Find 1+1.", "solution": "2"},
    "gpqa_diamond": gpqa(1),
}


@pytest.mark.parametrize(("name", "row", "reason"), DROPPED, ids=[f"{name}: {why}" for name, _, why in DROPPED])
def test_what_is_dropped_and_why(tmp_path: Path, name: str, row: dict[str, Any], reason: str) -> None:
    made, report = make(tmp_path, name, [SOUND[name], row])
    assert len(made) == report.kept == 1
    assert report.rows == 2
    assert report.dropped == {reason: 1}
    assert any(f"1 dropped: {reason} (task:1)" in line for line in report.reasons())


def test_contradicting_answers_leave_no_question(tmp_path: Path) -> None:
    answers = {"a": "1", "b": "2", "a ": "3", " a": "1", "b\n": "2"}
    rows = [{"prompt": prompt, "solution": answer} for prompt, answer in answers.items()]
    made, report = make(tmp_path, "dapo_math_17k", rows)
    assert [row["prompt"] for row in made] == ["b"]
    contradicted = "the same question as another row, with another answer"
    assert report.dropped == {contradicted: 2, "the same question as an earlier row": 2}
    # Without the answers nothing contradicts.
    made, _ = make(tmp_path, "dapo_math_17k", rows, unlabelled=True, out=tmp_path / "u.jsonl")
    assert [row["prompt"] for row in made] == ["a", "b"]


def test_answers_that_only_their_own_spelling_equals_are_kept_counted_and_named(tmp_path: Path) -> None:
    answers = [
        "12",
        r"a \mid 6",
        r"\frac{1}{2}",
        "6, 12, 18, ...",
        r"\text{Tuesday}",
        r"30\%",
        "???",
        r"7 \pmod{9}",
        "x \\equiv 2",
    ]
    rows = [{"problem": f"Q{i}", "answer": answer} for i, answer in enumerate(answers)]
    made, report = make(tmp_path, "math500", rows)
    assert len(made) == report.kept == len(answers)
    assert report.unparsed == 5
    (line,) = [line for line in report.lines(Order("math500", [], tmp_path / "out.jsonl")) if "cannot parse" in line]
    assert line == (
        "  5 kept: the verifier cannot parse the answer, so that only a response with the same spelling is right"
        r" (task:1: 'a \\mid 6', task:3: '6, 12, 18, ...', task:6: '???', ...)"
    )


def test_one_answer_in_two_spellings_is_no_contradiction(tmp_path: Path) -> None:
    answers = {"a": "3.5", "a ": r"\frac{7}{2}", "b": "1", "b ": "2", "c": "x", "c ": "y", "c  ": "x"}
    rows = [{"prompt": prompt, "solution": answer} for prompt, answer in answers.items()]
    made, report = make(tmp_path, "dapo_math_17k", [*rows, {"prompt": "d", "solution": "5"}])
    assert [(row["prompt"], row["answer"]) for row in made] == [("a", "3.5"), ("d", "5")]
    assert report.dropped["the same question as another row, with another answer"] == 4
    # Where nobody compares answers, other words are another answer.
    prose = [{"prompt": "p", "ground_truth": words} for words in ("It is 7/2.", "It is 3.5.")]
    made, _ = make(tmp_path, "dolci_general", [*prose, {"prompt": "q", "ground_truth": "So."}], force=True)
    assert [row["prompt"] for row in made] == ["q"]


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What's 1+1?"}]


@pytest.mark.parametrize(
    "column",
    [
        MESSAGES,
        json.dumps(MESSAGES),
        str(MESSAGES),
        [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "What's 1+1?"}],
        str([{"value": "Be brief.", "from": "system"}, {"value": "What's 1+1?", "from": "human"}]),
        [MESSAGES[0], {"role": "user", "content": [{"type": "text", "text": "What's 1+1?"}]}],
    ],
)
def test_messages_are_read_in_every_form(tmp_path: Path, column: Any) -> None:
    made, _ = make(tmp_path, "math500", [{"problem": column, "answer": "2"}])
    assert made[0]["prompt"] == MESSAGES
    made, _ = make(tmp_path, "math500", [{"problem": json.dumps(MESSAGES[1]), "answer": "2"}], force=True)
    assert made[0]["prompt"] == "What's 1+1?", "a single message is its text"
    for text in ('[1, 2] and {"role": 3}', "[x]", '{"a": 1}', '[{"value": 3}]'):
        made, _ = make(tmp_path, "math500", [{"problem": text, "answer": "2"}], force=True)
        assert made[0]["prompt"] == text, "another text stays as it is"


def test_why_nothing_is_left_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        make(tmp_path, "math500", [{"problem": "x", "answer": None}] * 4)
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/task.json: none of the 4 rows can be used:",
        "  4 dropped: has no answer (task:0, task:1, task:2, ...)",
    ]
    with pytest.raises(InputError, match="there are no rows"):
        make(tmp_path, "math500", [])
    assert not (tmp_path / "out.jsonl").exists()
    os.mkfifo(tmp_path / "out.jsonl")
    with pytest.raises(InputError, match=r"out\.jsonl is a named pipe, not a file; give another name"):
        make(tmp_path, "math500", [{"problem": "x", "answer": "1"}], force=True)


def test_a_benchmark_keeps_what_it_counts_twice_under_ids_of_their_own(tmp_path: Path) -> None:
    rows = [{"problem": "P", "answer": "1", "id": 1}] * 2
    made, report = make(tmp_path, "math500", rows)
    assert len({row["id"] for row in made}) == 2
    assert report.repeated == 1
    lines = report.lines(Order("math500", [], tmp_path / "out.jsonl"))
    assert any("math500 has 500 questions as published" in line for line in lines)


def test_a_set_of_ones_own(tmp_path: Path) -> None:
    rows = [{"q": "What?", "meta": {"gold": answer}, "key": answer} for answer in ("yes", "no")]
    rows[1]["q"] = "Why?"
    fields = {"prompt_field": "q", "answer_field": "meta.gold", "id_field": "key", "verifier": Verifier.text}
    made, _ = make(tmp_path, CUSTOM, rows, **fields)
    assert made[0] == {"id": "yes", "prompt": "What?", "answer": "yes"}
    with pytest.raises(InputError, match=r"task:0: there is no column question among q, meta, key; name one with --pr"):
        make(tmp_path, CUSTOM, rows, **fields | {"prompt_field": "question"}, force=True)
    with pytest.raises(InputError, match=r"there is no column problem or question or .* among q, meta, key"):
        make(tmp_path, "math500", rows, force=True)


def questions(count: int) -> list[dict[str, Any]]:
    return [{"problem": f"Question {number}", "answer": str(number), "id": number} for number in range(count)]


def test_questions_are_held_out_by_the_seed_and_their_text_alone(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    rest, report = make(tmp_path, "math500", questions(40), heldout=8, seed=3)
    held, _ = read(heldout_path(out), report)
    assert (len(rest), len(held)) == (32, 8)
    assert heldout_path(out).name == "out_heldout.jsonl"
    assert {row["prompt"] for row in rest} | {row["prompt"] for row in held} == {r["problem"] for r in questions(40)}
    assert [int(row["id"]) for row in rest] == sorted(int(row["id"]) for row in rest)
    again, _ = make(tmp_path, "math500", questions(40)[::-1], heldout=8, seed=3, force=True)
    assert again == rest[::-1]
    other, _ = make(tmp_path, "math500", questions(40), heldout=8, seed=4, force=True)
    assert other != rest
    alone, _ = make(tmp_path, "math500", questions(40), heldout=8, seed=3, unlabelled=True, out=tmp_path / "u.jsonl")
    assert [row["prompt"] for row in alone] == [row["prompt"] for row in rest]
    with pytest.raises(InputError, match="3 questions are too few for --split-heldout=3 and others"):
        make(tmp_path, "math500", questions(3), heldout=3, force=True)


def test_no_label_goes_into_an_unlabelled_set(tmp_path: Path) -> None:
    out = tmp_path / "u.jsonl"
    made, _ = make(tmp_path, "math500", questions(3), unlabelled=True, out=out)
    assert all(set(row) == {"id", "prompt"} for row in made)
    before = out.read_text()
    with pytest.raises(InputError, match=r"u\.jsonl is an unlabelled set and must not contain answers"):
        make(tmp_path, "math500", questions(3), out=out, force=True)
    assert out.read_text() == before
    for given in ({"answer_field": "answer"}, {"verifier": Verifier.math}):
        with pytest.raises(InputError, match="an unlabelled set has no answers; omit"):
            make(tmp_path, "math500", questions(3), unlabelled=True, **given)
    # Questions that nobody has answered yet are what such a set is for.
    rows = [{"problem": "Who knows?"}]
    assert make(tmp_path, "math500", rows, unlabelled=True, out=out, force=True)[0][0]["prompt"] == "Who knows?"


def test_nothing_is_replaced_or_left_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    make(tmp_path, "math500", questions(4))
    before = out.read_text()
    with pytest.raises(InputError, match=r"out\.jsonl exists already; --force replaces it"):
        make(tmp_path, "math500", questions(5))
    heldout_path(tmp_path / "new.jsonl").write_text("mine\n")
    with pytest.raises(InputError, match=r"new_heldout\.jsonl exists already"):
        make(tmp_path, "math500", questions(5), out=tmp_path / "new.jsonl", heldout=1)
    monkeypatch.setattr("megatron_tempo.files.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        make(tmp_path, "math500", questions(5), force=True)
    assert out.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new_heldout.jsonl", "out.jsonl", "task.json"]
    with pytest.raises(InputError, match=r"must end in \.jsonl"):
        make(tmp_path, "math500", questions(5), out=tmp_path / "out.json")


def fail(descriptor: int) -> None:
    raise OSError("no space left")


def run(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    return int(tool.main())


@pytest.mark.long
def test_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The prepare command on AGIEval's two kinds and a row without a label; check_answers.py on what it wrote."""
    kinds = [row for form, (_, row, _) in FORMS.items() if form in ("AGIEval", "AGIEval, blanks", "AGIEval, a blank")]
    source, out = tmp_path / "sat-math.jsonl", tmp_path / "agieval.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*kinds, kinds[0] | {"label": None}]))
    prepare = ["prepare", "agieval"]
    assert cli.main([*prepare, str(source), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "4 rows read, 3 questions kept, 1 rows dropped" in output
    assert "1 dropped: has no answer (sat-math:3)" in output
    assert f"{out}: 3 questions" in output
    assert cli.main([*prepare, str(source), "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert cli.main([*prepare, str(tmp_path / "none"), "--out", str(out), "--force"]) == 2
    assert "does not exist" in capsys.readouterr().err
    with FolderLock(out.with_name("agieval.jsonl.lock"), "out", "a test", ""):
        assert cli.main([*prepare, str(source), "--out", str(out), "--force"]) == 2
    assert f"error: {out} is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["agieval.jsonl", "sat-math.jsonl"]

    check_answers = load_tool("check_answers", monkeypatch)
    assert run(check_answers, monkeypatch, out) == 0
    output = capsys.readouterr().out
    assert "choice: 1 of 1 found right: boxed" in output
    assert "math: 2 of 2 found wrong: one digit changed" in output
    out.write_text(json.dumps({"id": "1", "prompt": "P", "answer": "1/8 or \\text{(E)}", "verifier": "math"}) + "\n")
    assert run(check_answers, monkeypatch, out) == 1
    assert "not " in capsys.readouterr().out


def test_answers_that_want_a_judge_are_told_of(tmp_path: Path) -> None:
    _, row, _ = FORMS["Dolci"]
    made, report = make(tmp_path, "dolci_general", [row])
    assert "verifier" not in made[0]
    assert any("want a judge; none was checked" in line for line in report.lines(Order("dolci_general", [], tmp_path)))


def test_a_custom_question_in_two_typesettings_is_kept_once(tmp_path: Path) -> None:
    asked = ["What is $9$ plus $5$?", "what is 9 plus 5 ?", "What is x^{12}?", "What is x_{12}?", "What is  x^{12} ?"]
    rows = [{"q": q, "a": a} for q, a in zip(asked, ["14", "14", "1", "2", "1"], strict=True)]
    changes = {"verifier": Verifier.math, "prompt_field": "q", "answer_field": "a"}
    written, report = make(tmp_path, CUSTOM, rows, **changes)
    assert [row["prompt"] for row in written] == [asked[0], asked[2], asked[3]]
    assert report.dropped == {"the same question as an earlier row, in another typesetting": 2}


def test_of_a_solution_in_the_form_of_gsm8k_only_the_answer_is_kept(tmp_path: Path) -> None:
    answers = ["She has 2 * 3 = <<2*3=6>>6.\n#### 6", "#### 1,200", "#### Steps\nIt is 7"]
    rows = [{"q": f"Question {i}?", "a": answer} for i, answer in enumerate(answers)]
    changes = {"verifier": Verifier.math, "prompt_field": "q", "answer_field": "a"}
    assert [row["answer"] for row in make(tmp_path, CUSTOM, rows, **changes)[0]] == ["6", "1,200", answers[2]]
