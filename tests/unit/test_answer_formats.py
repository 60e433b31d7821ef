"""Servers' answers as flat arrays: hand-made bodies of both engines, and what is wrong with others."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_checks import checked_completions
from megatron_tempo.rollout.answer_formats import ANSWER_FORMATS, FlatAnswers, refusal_in
from megatron_tempo.rollout.answer_reader import RawAnswers
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.replica import Ask, GenerationJob
from tests.support.answers import BODIES, Said
from tests.support.completions import plains

KINDS = list(BODIES)
TWO = [
    Said([5, 6, 150_000], [-0.5, 0.0, -3.25], [("2", 0, 1), ("3", 1, 3)]),
    Said([7], [-1.5], [("2", 0, 0), ("2", 0, 1)], "length"),
]


def body_of(kind: str, responses: list[Said], edit: Callable[[Any], object] = lambda body: None) -> bytes:
    body = BODIES[kind](responses)
    edit(body)
    return json.dumps(body).encode()


def first(kind: str, body: Any) -> Any:
    """The first response of a body."""
    return body[0] if kind == "sglang" else body["choices"][0]


def rows(answers: FlatAnswers) -> list[tuple[int, int, str, list[tuple[int, int]]]]:
    return [(row.tokens, row.logprobs, row.reason, row.versions) for row in answers.rows]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_by_hand(kind: str) -> None:
    """Runs of no tokens are left out, and all other fields are skipped."""
    answers = ANSWER_FORMATS[kind](body_of(kind, TWO))
    assert answers.tokens.tolist() == [5, 6, 150_000, 7]
    assert answers.logprobs.tolist() == [-0.5, 0.0, -3.25, -1.5]
    assert (answers.tokens.itemsize, answers.logprobs.itemsize) == (4, 4)
    assert rows(answers) == [(3, 3, "stop", [(2, 1), (3, 2)]), (1, 1, "length", [(2, 1)])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_answer_is_what_pythons_json_reads(kind: str) -> None:
    draw = random.Random(4)
    said = []
    for _ in range(3):
        tokens = [draw.randrange(2**31) for _ in range(500)]
        logprobs = [float(np.float32(-draw.expovariate(0.5))) for _ in tokens]
        said.append(Said(tokens, logprobs, [("8", 0, 500)]))
    body = body_of(kind, said)
    answers = ANSWER_FORMATS[kind](bytearray(body))
    read = json.loads(body)
    if kind == "sglang":
        tokens = [token for one in read for token in one["output_ids"]]
        logprobs = [entry[0] for one in read for entry in one["meta_info"]["output_token_logprobs"]]
    else:
        tokens = [token for one in read["choices"] for token in one["token_ids"]]
        logprobs = [entry["logprob"] for one in read["choices"] for entry in one["logprobs"]["content"]]
    assert answers.tokens.tolist() == tokens
    assert answers.logprobs.tolist() == logprobs  # they were float32, so nothing is rounded


@pytest.mark.parametrize("kind", KINDS)
def test_responses_without_tokens_and_answers_without_responses(kind: str) -> None:
    nothing = ANSWER_FORMATS[kind](body_of(kind, [Said([], [], [])]))
    assert (rows(nothing), len(nothing.tokens), len(nothing.logprobs)) == ([(0, 0, "stop", [])], 0, 0)
    assert rows(ANSWER_FORMATS[kind](body_of(kind, []))) == []


def change(kind: str, field: str, value: object) -> Callable[[Any], None]:
    """Set a field of the first response by what it is; with `...` as the value, take it out."""
    where = {
        ("sglang", "tokens"): ("output_ids",),
        ("vllm", "tokens"): ("token_ids",),
        ("sglang", "logprobs"): ("meta_info", "output_token_logprobs"),
        ("vllm", "logprobs"): ("logprobs", "content"),
        ("sglang", "logprob"): ("meta_info", "output_token_logprobs", 1, 0),
        ("vllm", "logprob"): ("logprobs", "content", 1, "logprob"),
        ("sglang", "reason"): ("meta_info", "finish_reason", "type"),
        ("vllm", "reason"): ("finish_reason",),
        ("sglang", "versions"): ("meta_info", "weight_versions"),
        ("vllm", "versions"): ("weight_versions",),
        ("sglang", "version"): ("meta_info", "weight_versions", 0, "version"),
        ("vllm", "version"): ("weight_versions", 0, "version"),
        ("sglang", "end"): ("meta_info", "weight_versions", 0, "end"),
        ("vllm", "end"): ("weight_versions", 0, "end"),
    }[kind, field]

    def edit(body: Any) -> None:
        place = first(kind, body)
        for key in where[:-1]:
            place = place[key]
        if value is ...:
            del place[where[-1]]
        else:
            place[where[-1]] = value

    return edit


WRONG = [
    ("tokens", [1, None], "Expected `int`, got `null`"),
    ("tokens", [1, 2.5], "Expected `int`, got `float`"),
    ("tokens", [1, True], "Expected `int`, got `bool`"),
    ("tokens", [1, "2"], "Expected `int`, got `str`"),
    ("tokens", [1, 2**31], "a token out of the vocabulary"),
    ("tokens", [1, -(2**70)], "a token out of the vocabulary"),
    ("tokens", "12", "Expected `array`, got `str`"),
    ("tokens", None, "Expected `array`, got `null`"),
    ("tokens", ..., "missing required field `"),
    ("logprob", None, "Expected `float`, got `null`"),
    ("logprob", "-0.5", "Expected `float`, got `str`"),
    ("logprob", [-0.5], "Expected `float`, got `array`"),
    ("logprob", float("nan"), "JSON is malformed"),
    ("logprob", float("-inf"), "JSON is malformed"),
    ("logprobs", None, "Expected `array`, got `null`"),
    ("logprobs", ..., "missing required field `"),
    ("reason", None, "Expected `str`, got `null`"),
    ("reason", ..., "missing required field `"),
    ("versions", None, "Expected `array`, got `null`"),
    ("versions", ..., "missing required field `weight_versions`"),
    ("version", "default", "weights of version 'default'"),
    ("version", "-3", "weights of version '-3'"),
    ("version", "9" * 5000, "weights of version '9999999999"),
    ("version", "\u0663", "weights of version '\u0663'"),
    ("version", 2.0, "Expected `int | str`, got `float`"),
    ("end", -1, "-1 tokens of version 2"),
    ("end", 10**30, "tokens of version 2"),
    ("end", None, "Expected `int`, got `null`"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("field", "value", "words"), WRONG, ids=[f"{f} {str(v)[:20]}" for f, v, _ in WRONG])
def test_what_is_wrong_with_an_answer_is_said(kind: str, field: str, value: object, words: str) -> None:
    body = body_of(kind, TWO, change(kind, field, value))
    with pytest.raises(Exception, match="^" + r"[\s\S]*" + re.escape(words)):
        ANSWER_FORMATS[kind](body)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_is_cut_short_or_another_value_is_refused(kind: str) -> None:
    body = body_of(kind, TWO)
    for wrong in (body[:-1], body[: len(body) // 2], b"", b"null", b"3", b"<html>", b"\xff", b"[" * 100_000):
        with pytest.raises(Exception, match=r"JSON|truncated|Expected|recursion"):
            ANSWER_FORMATS[kind](wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_may_be_whole_or_beyond_float32(kind: str) -> None:
    for value, seen in ((0, 0.0), (-2, -2.0), (-1e300, float("-inf"))):
        answers = ANSWER_FORMATS[kind](body_of(kind, TWO, change(kind, "logprob", value)))
        assert answers.logprobs[1] == seen
    version = ANSWER_FORMATS[kind](body_of(kind, TWO, change(kind, "version", 2)))
    assert version.rows[0].versions == [(2, 1), (3, 2)]


def test_a_refusal_with_status_200() -> None:
    assert refusal_in(b'{"success": false, "message": "no weights", "more": [1]}') == "no weights"
    assert refusal_in(b'{"success": false}') == "None"
    for other in (
        b'{"success": true}',
        b"[]",
        b"{",
        b'{"success": 1}',
        b'{"success": false, "x": "%b"}' % (b"y" * 10**4),
    ):
        assert refusal_in(other) is None


def test_the_parsing_process_imports_no_torch() -> None:
    code = (
        "import megatron_tempo.rollout.answer_worker, sys; print({'torch', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# The checks of content


ASK = Ask(GenerationJob(), 0, Request((1,), samples=2, seed=0), Sampling(1.0, max_tokens=4), oldest=2)


def raw(kind: str, responses: list[Said]) -> RawAnswers:
    answers = ANSWER_FORMATS[kind](body_of(kind, responses))
    return RawAnswers(answers.rows, np.array(answers.tokens), np.array(answers.logprobs), received=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_completions_are_views_of_the_answer(kind: str) -> None:
    answers = raw(kind, [TWO[0], Said([7, 8], [1e-6, -2.0], [("2", 0, 2)], "length")])
    completions = checked_completions(answers, ASK, 200_000, newest=3)
    assert plains([completions]) == [
        [
            ((5, 6, 150_000), (-0.5, 0.0, -3.25), "stop", ((2, 1), (3, 2))),
            ((7, 8), (0.0, -2.0), "length", ((2, 2),)),  # 1e-6 is rounding
        ]
    ]
    assert completions[1].token_ids.data_ptr() == answers.tokens[3:].ctypes.data


DOUBTS = [
    (Said([5], [-0.5], [("2", 0, 1)], "abort"), "ended by abort"),
    (Said([], [], []), "0 tokens of at most 4"),
    (Said([5] * 5, [-0.5] * 5, [("2", 0, 5)]), "5 tokens of at most 4"),
    (Said([5, -1], [-0.5] * 2, [("2", 0, 2)]), "a token out of the vocabulary"),
    (Said([5, 200_000], [-0.5] * 2, [("2", 0, 2)]), "a token out of the vocabulary"),
    (Said([5, 6], [-0.5, -9999.0], [("2", 0, 2)]), "a log-probability that is none"),
    (Said([5, 6], [-0.5, -1e300], [("2", 0, 2)]), "a log-probability that is none"),
    (Said([5, 6], [-0.5, 0.5], [("2", 0, 2)]), "a log-probability that is none"),
    (Said([5, 6], [-0.5] * 2, [("1", 0, 2)]), "weights of version [(1, 2)], not 2 to 3"),
    (Said([5, 6], [-0.5] * 2, [("2", 0, 1), ("4", 1, 2)]), "weights of version [(2, 1), (4, 1)], not 2 to 3"),
    (Said([5, 6], [-0.5] * 2, [("2", 0, 1)]), "versions [(2, 1)] of 2 tokens"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("said", "words"), DOUBTS, ids=[words for _, words in DOUBTS])
def test_a_response_that_makes_no_sense_is_refused(kind: str, said: Said, words: str) -> None:
    with pytest.raises(EngineError) as caught:
        checked_completions(raw(kind, [TWO[0], said]), ASK, 200_000, newest=3)
    assert str(caught.value) == f"gave a response that makes no sense: {words}"


def test_a_nan_a_missing_logprob_and_another_number_of_responses_are_refused() -> None:
    answers = raw("vllm", TWO)
    answers.logprobs[1] = np.nan
    with pytest.raises(EngineError, match="a log-probability that is none"):
        checked_completions(answers, ASK, 200_000, newest=3)
    answers = raw("sglang", TWO)
    answers.rows[1].logprobs, answers.rows[0].logprobs = 0, 4
    with pytest.raises(EngineError, match="4 log-probabilities of 3 tokens"):
        checked_completions(answers, ASK, 200_000, newest=3)
    with pytest.raises(EngineError, match="gave 1 responses where 2 were asked for"):
        checked_completions(raw("vllm", TWO[:1]), ASK, 200_000, newest=3)
