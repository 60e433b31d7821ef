"""The verifiers that read an answer in this process: what they refuse, hostile text, and classes of equal answers."""

from __future__ import annotations

import time
from typing import Any

import pytest

from megatron_tempo.errors import InputError
from megatron_tempo.rewards import choice, grid, text
from megatron_tempo.rewards.answers import plain, statements
from megatron_tempo.rewards.math import RESPONSE_CHARS
from megatron_tempo.rewards.reading import ReadingScorer

PROMPT = "Which?\n(A) one\n(B) two\n(C) three\n\nGive the letter."
GRID = '{"House 1": {"Name": "Eric"}, "House 2": {"Name": "Bob"}}'
SCORERS = {
    "choice": (ReadingScorer(choice.read, choice.gold), "B", "\\boxed{B}"),
    "text": (ReadingScorer(text.read, text.gold), "two words", "Answer: two words"),
    "grid": (ReadingScorer(grid.read, grid.gold), GRID, GRID),
}
HOSTILE = {
    "open boxes": "\\boxed{" * 100_000,
    "boxes in boxes": "\\boxed{" * 50_000 + "B" + "}" * 50_000,
    "texts in texts": "\\boxed{" + "\\text{" * 300 + "B" + "}" * 301,
    "braces": "{" * 100_000 + "}" * 100_000,
    "objects in objects": '{"a":' * 50_000,
    "lists in objects": '{"a":[' * 50_000,
    "objects before a long list": '{"a":' * 500 + "[" + "1," * 50_000,
    "open texts in JSON": '{"' * 100_000,
    "closed deep": '{"a":' * 900 + "1" + "}" * 900,
    "lines": "\n" * 2**20,
    "blanks": " " * 2**20,
    "bars": "|" * 2**20,
    "tables": "| a | b |\n" * 50_000,
    "stars": "* " * 2**19 + "x",
    "answers": "the answer is " * 50_000,
    "answer lines": "Answer:\n" * 50_000,
    "answers in a line": "answer:" * 100_000,
    "letters": "Answer: " + "A " * 900,
    "parentheses": "Answer: " + "(A" * 900,
    "and and and": "Answer: " + "A and " * 300,
    "digits": "Answer: " + "9" * 1990,
    "letters that grow": "Answer: " + "\ufdfa" * 1990,
    "surrogates": "Answer: \ud800\udfff\ud800",
    "null bytes": "Answer: \x00" * 1000,
    "backslashes": "\\" * 2**20,
    "ends": "<|im_end|>" * 100_000,
    "infinity": '{"House 1": {"Name": NaN}, "House 2": {"Name": -Infinity}}',
    "a number too long": '{"House 1": {"Name": ' + "9" * 10_000 + "}}",
}


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_wrong_and_costs_little(name: str, response: str) -> None:
    scorer, answer, right = SCORERS[name]
    started = time.process_time()
    assert scorer.score([item(response, answer), item(right, answer)]) == [0.0, 1.0]
    assert scorer.classes(PROMPT, [right, response])[0] == 0
    assert time.process_time() - started < 4


def item(response: str, answer: str) -> Any:
    from megatron_tempo.rewards.scorer import Item

    return Item("", PROMPT, response, answer)


@pytest.mark.parametrize("name", SCORERS)
def test_the_end_of_a_long_response_counts(name: str) -> None:
    scorer, answer, right = SCORERS[name]
    thought = "Let us think about it. " * (RESPONSE_CHARS // 10)
    assert scorer.score([item(f"{thought}\n{right}", answer), item(f"{right}\n{thought}", answer)]) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "answer", "words"),
    [
        ("choice", "D", "the answer 'D' is not among the options A, B, C"),
        ("choice", "A, D", "not among the options"),
        ("choice", "two", "the answer 'two' is no choice; give the option's letter"),
        ("choice", "()", "is no choice"),
        ("text", "word " * 1000, "is no short text"),
        ("text", "**", "is no short text"),
        ("grid", "Eric, Bob", "is no grid"),
        ("grid", "[]", "it is no object of houses"),
        ("grid", '{"House 1": "Eric"}', "a house is no object of attributes"),
        ("grid", '{"House 1": {"Name": ["Eric", "Bob"]}}', "a cell is no text"),
        ("grid", '{"House 1": {"Name": "Eric"}, "House 1": {"Name": "Bob"}}', "a key is there twice"),
        ("grid", '{"House 1": {"Name": ""}}', "a cell is no text"),
    ],
)
def test_an_answer_that_cannot_be_used_is_refused(name: str, answer: str, words: str) -> None:
    scorer, sound, _ = SCORERS[name]
    scorer.check(PROMPT, sound)
    with pytest.raises(InputError, match=words):
        scorer.check(PROMPT, answer)


def test_options_are_the_last_list_of_a_prompt() -> None:
    assert choice.options(PROMPT) == {"A": "one", "B": "two", "C": "three"}
    passage = "A. He came.\nB. He saw.\n\nWhat then?\n(A) He won\n(B) He lost\n(C) A. and B.\n(E) He left\n"
    assert choice.options(passage) == {"A": "He won", "B": "He lost", "C": "A. and B."}
    assert choice.options("(B) two\n(C) three") == choice.options("(A) one") == choice.options("") == {}


def test_letters_count_without_options_too() -> None:
    assert choice.read("Which?", "Answer: G") == {"G"}
    assert choice.read(PROMPT, "Answer: G") is None
    assert choice.gold("Which?", "(G)") == {"G"}


CLASSES = {
    "choice": (["\\boxed{B}", "Answer: (b)", "C", "I do not know.", "two", "A or B", "(B) or (A)", ""],
               [0, 0, 1, None, 0, 2, 2, None]),
    "text": (["Answer: True", "\\boxed{true}", "Answer: 1,000", "Answer: 1000.0", "", "Answer: 1 000", "True."],
             [0, 0, 1, 1, None, 2, 0]),
    "grid": ([GRID, GRID.replace("Bob", "Ann"), "none", "x " + GRID.upper().replace("HOUSE", "House"), GRID[:-1]],
             [0, 1, None, 0, None]),
}  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_equal_answers_get_equal_numbers(name: str) -> None:
    responses, numbers = CLASSES[name]
    assert SCORERS[name][0].classes(PROMPT, responses) == numbers
    assert SCORERS[name][0].classes(PROMPT, []) == []


def test_classes_agree_with_scores() -> None:
    """A response is right where its class is that of a response that gives the right answer."""
    for name, (responses, _) in CLASSES.items():
        scorer, answer, right = SCORERS[name]
        first, *others = scorer.classes(PROMPT, [right, *responses])
        assert scorer.score([item(response, answer) for response in responses]) == [float(n == first) for n in others]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("\\boxed{1} \\boxed{2}", ["1, 2"]),
        ("\\boxed{1}. No: \\boxed{2}", ["2"]),
        ("Answer: 1\n\\boxed{2}", ["2"]),
        ("\\boxed{1}\nAnswer: 2", ["2"]),
        ("Answer: \\boxed{2}", ["2"]),
        ("**Final Answer:**\n\n2\n3", ["2"]),
        ("> Answer: 2", ["2"]),
        ("The answer is 1.5. So be it.", ["1.5", "The answer is 1.5. So be it."]),
        ("The answer is\n2", ["2", "2"]),
        ("Hence the final answer: 2", ["2", "Hence the final answer: 2"]),
        ("one\ntwo\n", ["two"]),
        ("", []),
    ],
)
def test_statements(response: str, expected: list[str]) -> None:
    assert statements(response) == expected


@pytest.mark.parametrize(
    ("written", "words"),
    [
        ("**(B)**", "(B)"),
        ("$\\text{it\\&t}$", "it&t"),
        ("\\(\\mathrm{a\\,b}\\)", "a b"),
        ("\\textbf{\\text{x}}", "x"),
        ("a~b\\quad c", "a b  c"),
        ("\\{ ]", "{ ]"),
    ],
)
def test_plain(written: str, words: str) -> None:
    assert plain(written) == words
