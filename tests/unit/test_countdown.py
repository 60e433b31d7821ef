import itertools
import json
import operator
import time
import timeit
from pathlib import Path

import pytest

from megatron_tempo.errors import InputError
from megatron_tempo.rewards.countdown import reached, score

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
PROMPT = "2 4 5 6 > 7 :"
RIGHT = "2 * 4 = 8 + 5 = 13 - 6 = 7 y $"


@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        (PROMPT, RIGHT),
        (PROMPT, "2 * 4 = 8 + 5 = 13 - 6 = 7 n $"),  # its own check is not judged
        ("2 2 1 3 > 7 :", "2 + 2 = 4 * 1 = 4 + 3 = 7 y $"),  # two solutions: each is right
        ("2 2 1 3 > 7 :", "2 * 2 = 4 * 1 = 4 + 3 = 7 y $"),
        ("9 9 9 9 > 0 :", "9 + 9 = 18 - 9 = 9 - 9 = 0 y $"),
        ("7 7 1 1 > 49 :", "7 * 7 = 49 * 1 = 49 * 1 = 49 y $"),
        ("3 4 > 12 :", "3 * 4 = 12 y $"),  # any number of numbers from two
    ],
)
def test_right(prompt: str, response: str) -> None:
    assert score(prompt, response, "*+-") == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "2 * 4 = 8 + 5 = 13 + 6 = 19 y $",  # right arithmetic, wrong target
        "2 * 4 = 8 + 5 = 13 - 6 = 8 y $",  # wrong arithmetic at the end
        "2 * 4 = 8 + 5 = 14 - 6 = 7 y $",  # wrong arithmetic on the way
        "2 * 4 = 9 + 5 = 13 - 6 = 7 y $",  # two errors that cancel
        "4 * 2 = 8 + 5 = 13 - 6 = 7 y $",  # numbers in another order
        "2 * 4 = 8 - 6 = 2 + 5 = 7 y $",
        "2 * 4 = 8 + 5 = 13 y $",  # a number left out
        "1 * 4 = 4 + 5 = 9 - 2 = 7 y $",  # other numbers
        "2 * 4 = 8 + 5 = 13 - 6 = 7 * 1 = 7 y $",  # a number too many
        "2 * 4 = 8 + 5 = 13 - 6 = 7 y",  # no end token
        "2 * 4 = 8 + 5 = 13 - 6 = 7 $",  # no check
        "2 * 4 = 8 + 5 = 13 - 6 = 7 7 $",
        "2 * 4 = 8 + 5 = 13 - 6 = 7 y $ $",
        "2 * 4 = 8 + 5 = 13 - 6 = 7 $ y",
        "$ 2 * 4 = 8 + 5 = 13 - 6 = 7 y $",
        "2 * 4 8 + 5 = 13 - 6 = 7 y $",
        "2 * 4 > 8 + 5 = 13 - 6 = 7 y $",
        "2 * 4 = 08 + 5 = 13 - 6 = 7 y $",
        "2*4=8+5=13-6=7 y $",
        "2  * 4 = 8 + 5 = 13 - 6 = 7 y $",
        " " + RIGHT,
        RIGHT + "\n",
        "2 ×  4 = 8 + 5 = 13 - 6 = 7 y $",
        "2 * 4 = 8 + 5 = 13 - 6 = ٧ y $",  # a digit that int() would read
        "7",
        "*+-",
        "$",
        "",
        " ",
        "\x00",
    ],
)
def test_wrong(response: str) -> None:
    assert score(PROMPT, response, "*+-") == 0.0


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (RIGHT, 7),
        ("2 * 4 = 8 + 5 = 13 - 6 = 7 n $", 7),
        ("2 * 4 = 8 + 5 = 13 + 6 = 19 y $", 19),  # wrong, and an answer
        ("2 + 4 = 6 - 5 = 1 + 6 = 7 y $", 7),  # by another way
        ("2 * 4 = 8 + 5 = 13 - 6 = 8 y $", None),  # wrong arithmetic
        ("4 * 2 = 8 + 5 = 13 - 6 = 7 y $", None),  # numbers in another order
        ("2 * 4 = 8 + 5 = 13 - 6 = 7 y", None),
        ("2 - 4 = -2 + 5 = 3 + 6 = 9 y $", None),
        ("", None),
    ],
)
def test_the_answer_of_a_response(response: str, answer: int | None) -> None:
    assert reached(PROMPT, response) == answer
    assert reached(PROMPT.replace("> 7", "> 40"), response) == answer, "the target plays no part"
    assert score(PROMPT, response, "*+-") == float(answer == 7)


def test_results_stay_between_0_and_49() -> None:
    assert score("7 8 7 1 > 48 :", "7 * 8 = 56 - 7 = 49 - 1 = 48 y $", "") == 0.0
    assert score("3 5 6 1 > 5 :", "3 - 5 = -2 + 6 = 4 + 1 = 5 y $", "") == 0.0


@pytest.mark.parametrize(
    "response",
    ["9" * 10**7, "9 ** 9 ** 9 ** 9 $", "2 * " * 10**6, "(" * 10**6, " " * 10**7, "2 * 4 = 8" + "\ud800" * 10**6],
)
def test_hostile_text_costs_no_time(response: str) -> None:
    assert score(PROMPT, response, "*+-") == 0.0
    # The least of several: a garbage collection may fall into one of them.
    seconds = timeit.repeat(lambda: score(PROMPT, response, "*+-"), timer=time.process_time, number=1, repeat=5)
    assert min(seconds) < 0.01


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "2 4 5 6",
        "2 > 2 :",
        "2 4 5 6 > :",
        "2 4 x 6 > 7 :",
        "2 4 5 6 > 7",
        "2 4 5 6 : 7 >",
        "-2 4 > 2 :",
        "٢ 4 > 6 :",
    ],
)
def test_malformed_prompt(prompt: str) -> None:
    with pytest.raises(InputError, match="no countdown question"):
        score(prompt, RIGHT, "*+-")


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (QUICKSTART / f"{name}.jsonl").read_text().splitlines()]


def solve(prompt: str) -> dict[str, str]:
    """Right responses by their operators, by trying all of them."""
    arithmetic = {"+": operator.add, "-": operator.sub, "*": operator.mul}
    words = prompt.split()
    numbers, target = words[:4], int(words[5])
    right: dict[str, str] = {}
    for operators in itertools.product("+-*", repeat=3):
        values = [int(numbers[0])]
        for symbol, number in zip(operators, numbers[1:], strict=True):
            values.append(arithmetic[symbol](values[-1], int(number)))
        if all(0 <= value <= 49 for value in values) and values[-1] == target:
            steps = [f"{o} {n} = {v}" for o, n, v in zip(operators, numbers[1:], values[1:], strict=True)]
            right["".join(operators)] = f"{numbers[0]} {' '.join(steps)} y $"
    return right


@pytest.mark.parametrize(("name", "rows"), [("labelled", 6000), ("unlabelled", 512), ("heldout", 256)])
def test_shipped_questions(name: str, rows: int) -> None:
    questions = read(name)
    assert len(questions) == len({row["id"] for row in questions}) == rows
    for row in questions:
        assert row.keys() == {"id", "prompt", "answer"}
        solutions = solve(row["prompt"])
        assert score(row["prompt"], solutions[row["answer"]], row["answer"]) == 1.0
        if name != "labelled":
            assert len(solutions) == 1


def test_shipped_questions_are_disjoint() -> None:
    prompts = [row["prompt"] for name in ("labelled", "unlabelled", "heldout") for row in read(name)]
    assert len(set(prompts)) == len(prompts)


def test_shipped_vocabulary_covers_the_questions() -> None:
    vocabulary = json.loads((QUICKSTART / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    prompts = " ".join(row["prompt"] for name in ("labelled", "unlabelled", "heldout") for row in read(name))
    assert {*prompts.split(), *RIGHT.split()} <= vocabulary.keys()


def test_pretraining_has_not_seen_the_shipped_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(QUICKSTART.parents[1] / "tools")
    from countdown_task import split

    made = split(seed=1, labelled=6000, unlabelled=512, heldout=256)
    seen = {question.prompt for question in made.pretraining}
    assert len(seen) > 60000
    for name in ("labelled", "unlabelled", "heldout"):
        shipped = [row["prompt"] for row in read(name)]
        assert [question.prompt for question in getattr(made, name)] == shipped
        assert seen.isdisjoint(shipped)
