"""Time that grows with a response's length: what runs without a time limit is linear, whatever the text is."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from megatron_tempo.rewards import choice, countdown, grid, text
from megatron_tempo.rewards.judge import _harmless, read_verdict
from megatron_tempo.rewards.responses import View, seen
from megatron_tempo.rewards.statement import stated

# Each is repeated up to a length, behind `pre` and before `post`.
UNITS: dict[str, tuple[str, str, str]] = {
    **{unit: ("", unit, "") for unit in (
        *(r"\boxed{", r"\boxed ", r"\boxed{1},", r"\text{", "\\", "<think>", "</think>", "<think></think>", "<answer>"),
        *("<answer></answer>", "7", "7,", "1,000", ",", ".", "，", "选", "选 ", "答案", "-", "*", "> ", " \n", "\t"),
        *("{", "{}", '{"', '{"a":', '{"a":[', '{"a":"', "[", "|a", "|a\n", "|-", "answer is ", "answer is St."),
        *("Answer:\n", "#### ", "therefore ", "(A) ", "A, ", "A\n", "$", "<|im_end|>", "</s>", "<|", "[EOS]", "```"),
        *("ｘ", "𝐱", "\u200b"),
    )},
    "blanks before a letter": ("", " ", "x"),
    "blanks after a box": (r"\boxed", " ", "x"),
    "blanks in a fence": ("```json", " ", "x"),
    "digits in a box": (r"\boxed ", "7", ".7.7"),
    "boxes in one another": ("", r"\boxed{", "}" * 2000),
    "objects in one another, then many": ('{"a":[' * 300, '{"b":1},', ""),
    "empty objects behind open ones": ('{"a":[' * 300, "{},", ""),
    "open objects, and a key twice": ('{"a":' * 300 + '{"k":1', ',"k":1', "}"),
    "a number that is too long": ('{"a":[' * 300, "7", ""),
}  # fmt: skip
PROMPT = "Which?\n(A) one\n(B) two"
READERS: dict[str, Callable[[str], Any]] = {
    "choice": lambda response: choice.read(PROMPT, response),
    "text": lambda response: text.read(PROMPT, response),
    "grid": lambda response: grid.read(PROMPT, response),
    "countdown": lambda response: countdown.reached("2 4 5 6 > 13 :", response),
    "math": stated,
    "judge": _harmless,
    "judge's reply": lambda response: read_verdict(response, "17f3"),
    "seen": lambda response: seen(response, View.answer, read_unfinished_thoughts=False),
    "seen, unfinished": lambda response: seen(response, View.answer, read_unfinished_thoughts=True),
}
SHORT, LONG = 2_500, 20_000  # of a longer response no verifier reads more
# 8 times the text may take 8 times as long, and not 64 times. A short time is measured as NOISE.
GROWTH, NOISE = 32, 0.0015


def seconds(read: Callable[[str], Any], response: str) -> float:
    best = 1e9
    for _ in range(2):
        start = time.process_time()
        read(response)
        best = min(best, time.process_time() - start)
        if best < NOISE:
            break
    return best


def hostile(unit: tuple[str, str, str], length: int) -> str:
    before, repeated, after = unit
    return before + repeated * ((length - len(before) - len(after)) // len(repeated)) + after


@pytest.mark.parametrize("reader", READERS)
def test_eight_times_the_text_takes_about_eight_times_as_long(reader: str) -> None:
    read = READERS[reader]
    lengths = (SHORT, LONG) if "seen" not in reader else (2**13, 2**16)
    for name, unit in UNITS.items():
        short, long = (seconds(read, hostile(unit, length)) for length in lengths)
        assert long < GROWTH * max(short, NOISE), (name, short, long)


# The last grid


def brute_force(response: str) -> tuple[int, grid.Grid] | None:
    """The last JSON grid, by an attempt at each brace: what `grid._last_object` does in linear time."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in pairs}) != len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    decoder = json.JSONDecoder(object_pairs_hook=unique)
    last, place = None, response.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(response, place)
        except ValueError:
            end = place + 1
        else:
            with contextlib.suppress(ValueError):
                last = end, grid._grid(value.get("solution", value))
        place = response.find("{", end)
    return last


def test_the_last_grid_is_that_of_an_attempt_at_each_brace() -> None:
    rng, found, repeated = random.Random(3), 0, 0
    pieces = [
        *('{"House 1": ', '{"Name": ', '"Eric"', '"tea"', "}", "}}", ", ", '"Name": ', '"solution": ', "{", "[", "]"),
        *("{ ", "{\n}", "x", '"', "1", ": "),
    ]
    whole = [
        '{"House 1": {"Name": "Eric"}}',
        '{"solution": {"House 1": {"Name": "Arnold"}}}',
        '{"Name": 1, "Name": 2}',
        '{"a": 1, "a": {"House 2": {"Name": "Peter"}}}',
        '{"a": [{"b": 1, "b": 2}], "House 1": {"Name": "Bob"}}',
    ]
    for _ in range(4000):
        response = "".join(rng.choice(pieces if rng.random() < 0.8 else whole) for _ in range(rng.randint(1, 24)))
        expected = brute_force(response)
        assert grid._last_object(response) == expected, response
        found += expected is not None
        repeated += '"Name": 1, "Name": 2' in response and expected is not None
    assert found > 500
    assert repeated > 50


def test_a_key_that_is_there_twice_is_no_answer() -> None:
    for answer in ('{"House 1": {"Name": "a", "Name": "b"}}', '{"House 1": {"Name": "a"}, "House 1": {"Name": "b"}}'):
        with pytest.raises(ValueError, match="a key is there twice"):
            grid.gold("", answer)
