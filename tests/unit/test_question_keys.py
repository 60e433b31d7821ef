"""Two typesettings of a question have one key, two questions have two; near copies are found, templates are not."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.schema import Config, DatasetConfig
from megatron_tempo.data.copies import QuestionSet, check_data, copies_between, near_copies, repeated, same_questions
from megatron_tempo.data.question_keys import exact_key, matching_key
from megatron_tempo.data.rows import DataError

SAME = [
    (r"Let $\frac{m}{n}$ be in lowest terms.", "Let m/n be in lowest terms"),
    (r"\(\dfrac mn\)", r"$\frac{m}{n}$"),
    ("a $9$-kilometer-long walk", "a 9 kilometer long walk"),
    (r"Find $\dfrac{3}{5}+1$.", "find 3/5 + 1"),
    (r"\frac35", "3/5"),
    ("½ of it", "1/2 of it"),
    (r"$x^2 - 5x$", "x² − 5x"),
    (r"$2^{10}$", "2¹⁰"),
    ("1{,}000 apples", "1,000 apples"),
    (r"1\,000 apples", "1000 apples"),
    (r"$\pi r^2$", "π r²"),
    (r"$\alpha+\beta$", "α + β"),
    ("“Hello” – it’s", '"Hello" - it\'s'),
    ("**Find** the `sum`", "Find the sum"),
    (r"\textbf{Find} the \emph{sum}", "find the sum"),
    (r"\(a \cdot b\)", "$a·b$"),
    (r"$3 \times 4$", "3×4"),
    (r"$x\leq 5$", "x ≤ 5"),
    (r"$x\le5$", "x &le; 5"),
    (r"$x \neq 3$", "x ≠ 3"),
    ("Ｆｉｎｄ　７", "find 7"),
    ("<p>Find <b>x</b></p>", "Find x"),
    (r"5\text{ cm}", "5 cm"),
    ("$a_{n+1}$", "a_n+1"),
    (r"\left(\frac{1}{2}\right)", "(1/2)"),
    ("café", "cafe\u0301"),
    (r"$\sqrt{2}$", "√2"),
    (r"$A\cup B$", "A∪B"),
    (r"$100^\circ$", "100°"),
    (r"25\%", "25%"),
    (r"$\$5$", "$5"),
    (r"\begin{cases} x+1 \end{cases}", "x + 1"),
    ("[asy] draw((0,0)--(1,1)); [/asy] Find x", "Find x"),
    ("  Find\n\n x ", "Find x"),
]
OTHER = [
    ("4 8 3 2 > 31 :", "4 8 3 23 > 1 :"),
    ("3+5", "3-5"),
    ("3*5", "3-5"),
    ("3/5", "3-5"),
    (r"3\cdot5", r"\frac35"),
    ("x+1", "x-1"),
    ("$x^2+5x+6$", "$x^2-5x+6$"),
    ("f(x)-3", "f(x)+3"),
    ("5 - (3)", "5 + (3)"),
    ("x<5", "x>5"),
    ("x=5", "x≠5"),
    ("it is -5 degrees", "it is 5 degrees"),
    ("2 3", "23"),
    ("3.5", "35"),
    (r"$\sin x$", r"$\cos x$"),
    (r"$A\cup B$", r"$A\cap B$"),
    (r"$\sqrt2+\sqrt3$", "2+3"),
    ("数学は楽しい", "数学は難しい"),
]


@pytest.mark.parametrize(("a", "b"), SAME)
def test_typesetting_makes_no_difference(a: str, b: str) -> None:
    assert matching_key(a) == matching_key(b)
    assert exact_key([a]) != exact_key([b]) or a.split() == b.split()


@pytest.mark.parametrize(("a", "b"), OTHER)
def test_another_question_has_another_key(a: str, b: str) -> None:
    assert matching_key(a) != matching_key(b)


@pytest.mark.parametrize("part", ["[asy]", "<p", "\\frac{1", "- ", "{", "1,", "\\", "&amp", "²", "\ud800", "e\u0301"])
def test_keys_of_hostile_text_take_little_time(part: str) -> None:
    start = time.process_time()
    matching_key(part * 50_000)
    assert time.process_time() - start < 2


NAMES = ["Aya", "Bo", "Cy", "Di", "Ed", "Flo", "Gus", "Hal", "Ida", "Jo"]


def problem(seed: int, length: int = 60) -> str:
    """Words in a random order: no two problems share four in a row but by chance."""
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(500)}" for _ in range(length))


def questions(name: str, texts: list[str]) -> QuestionSet:
    ids = {f"{name.rpartition('.')[2]}:{i}": text for i, text in enumerate(texts)}
    return QuestionSet(name, {i: matching_key(text) for i, text in ids.items()}, {i: (t,) for i, t in ids.items()})


def test_near_copies_are_found_and_templates_are_not() -> None:
    original = [problem(seed) for seed in range(20)]
    words = original[3].split()
    copy = " ".join(["Please solve:", *words[:30], "changed", *words[31:50], "twice", *words[51:]])
    half = " ".join(words[:30]) + " " + problem(99, 40)  # its first half, and another second one
    template = "{} has {} apples and gives {} of them to each of {} friends . How many are left in the basket ?"
    made = [template.format(NAMES[i % 10], 7 * i + 90, i % 5 + 1, i % 9 + 2) for i in range(40)]
    labelled = questions("data.labelled", [problem(50), copy, half, *made[:20]])
    test = questions("evaluation.sets.test", [*original, *made[20:]])
    copies = near_copies([labelled, test])
    assert [(copy.first, copy.second) for copy in copies["data.labelled", "evaluation.sets.test"]] == [
        ("labelled:1", "test:3")
    ]
    (line,) = copies_between([labelled, test], held=["test"])
    assert line.startswith(
        "warning: 1 questions of data.labelled are near copies of questions of evaluation.sets.test: "
        "labelled:1 and test:3 share "
    )


def test_the_same_question_is_no_near_copy_and_is_told_of_where_it_is_not_meant() -> None:
    one, other = problem(1), problem(2)
    labelled = questions("data.labelled", [one, problem(3)])
    unlabelled = questions("data.unlabelled", [other, one.upper()])
    test = questions("evaluation.sets.test", [other, f"${one}$", problem(4)])
    assert near_copies([labelled, unlabelled, test]) == {}
    assert copies_between([labelled, unlabelled, test], held=[]) == [
        "warning: 1 unlabelled questions are also in the labelled set, first labelled:0 and unlabelled:1",
        "warning: 1 of 3 questions of test are also in the labelled set, with their answers, "
        "first labelled:0 and test:1; "
        "data.held_out=[test] leaves them out of training",
    ]
    assert copies_between([labelled, test], held=["test"]) == []


def test_an_evaluation_set_with_a_question_twice_is_told_of() -> None:
    one, other = problem(1), problem(2)
    twice = questions("evaluation.sets.test", [one, other, f"${one.upper()}$"])
    assert copies_between([questions("data.labelled", [problem(3), problem(3)]), twice], held=[]) == [
        "warning: 1 questions of evaluation.sets.test are in it more than once, such as test:0 and test:2: each copy "
        "counts, and the interval of a score takes copies as independent questions; remove them"
    ]
    assert repeated("test", {"a": "x", "b": "y"}) is None


def test_pairs_of_same_questions() -> None:
    a, b = {"a0": "x", "a1": "y", "a2": "x"}, {"b0": "y", "b1": "z", "b2": "x"}
    assert same_questions(a, b) == [("a1", "b0"), ("a0", "b2"), ("a2", "b2")]
    assert same_questions(a, {}) == []


def test_large_sets_are_compared_in_seconds() -> None:
    labelled = questions("data.labelled", [problem(seed, 80) for seed in range(2000)])
    test = questions("evaluation.sets.test", [problem(seed, 80) for seed in range(10_000, 10_500)])
    start = time.process_time()
    assert near_copies([labelled, test]) == {}
    assert time.process_time() - start < 3


def config_with(folder: Path, sets: dict[str, list[dict[str, Any]]], held: list[str]) -> Config:
    config = Config()
    for name, rows in sets.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = DatasetConfig(path=str(path), answer_field="answer", verifier=Verifier.math, chat_template=False)
        if name == "labelled":
            config.data.labelled = dataset
        else:
            config.evaluation.sets[name] = dataset
    config.data.held_out = held
    return config


def test_check_tells_of_what_is_held_out_and_of_bad_rows(tmp_path: Path) -> None:
    row = {"prompt": r"Find $\dfrac{3}{5} + 1$ for a $9$-kilometer walk.", "answer": "8/5"}
    other = {"prompt": "Find 3/5 + 1 for a 9-kilometer walk", "answer": "8/5"}
    sets = {"labelled": [row, {"prompt": "Find 1.", "answer": "1"}], "aime": [other]}
    assert check_data(config_with(tmp_path, sets, ["aime"])) == [
        "held out of the labelled set: 1 of 2 questions (aime 1)"
    ]
    (line,) = check_data(config_with(tmp_path, sets, []))
    assert "1 of 1 questions of aime are also in the labelled set, with their answers" in line
    config = config_with(tmp_path, {"labelled": [row, {"prompt": "Find 2.", "answer": None}], "aime": [other]}, [])
    with pytest.raises(DataError, match=r"labelled\.jsonl:2: field 'answer' is null"):
        check_data(config)


def test_large_files_are_left_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_with(tmp_path, {"labelled": [{"prompt": "Find 1.", "answer": "1"}]}, [])
    monkeypatch.setattr("megatron_tempo.data.copies.CHECKED_BYTES", 10)
    (line,) = check_data(config)
    assert "too large to be looked at here: the run looks at them first" in line
