"""Every verifier on answer forms that a person has decided.

tests/fixtures/answer_forms.json has right and wrong forms of each verifier; tests/fixtures/answer_kinds.json those of
docs/data.md's rules, kind by kind: what is right by a gold answer, and what looks like it and is wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers

FIXTURES = Path(__file__).parents[1] / "fixtures"
FORMS = json.loads((FIXTURES / "answer_forms.json").read_text(encoding="utf-8"))
KINDS = json.loads((FIXTURES / "answer_kinds.json").read_text(encoding="utf-8"))
SHOULD_BE = {"right": 1.0, "wrong": 0.0}
# By a gold answer of 0.4, 40% is right and 40 is not; of the votes, 40% goes with 40 (docs/data.md).
AMBIGUOUS = {"per cent", "degrees"}


def cases() -> Iterator[Any]:
    for verifier, kinds in FORMS.items():
        for kind, verdict in SHOULD_BE.items():
            for number, (answer, response) in enumerate(kinds.get(kind, [])):
                item = Item(verifier, kinds.get("prompt", ""), response, answer)
                yield pytest.param(item, verdict, id=f"{verifier} {kind} {number}")


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers(workers=1, seconds=30) as verifiers:
        yield verifiers


@pytest.mark.parametrize(("item", "verdict"), cases())
def test_a_form(verifiers: Verifiers, item: Item, verdict: float) -> None:
    assert verifiers.score([item]) == [verdict]


@pytest.mark.parametrize("kind", KINDS, ids=[f"{kind['kind']}: {kind['gold']}" for kind in KINDS])
@pytest.mark.parametrize("verdict", SHOULD_BE)
def test_a_kind(verifiers: Verifiers, kind: dict[str, Any], verdict: str) -> None:
    responses = kind[verdict]
    scores = verifiers.score([Item(kind["verifier"], kind.get("prompt", ""), r, kind["gold"]) for r in responses])
    assert [r for r, score in zip(responses, scores, strict=True) if score != SHOULD_BE[verdict]] == []


AROUND = (
    ("", "<|im_end|>"),
    ("", "</s> <|endoftext|>\n"),
    ("", "<｜end▁of▁sentence｜>"),
    ("<think>Is it \\boxed{7}, \\boxed{B} or \\boxed{True}? Answer: 7.</think>", ""),
    ("Is it \\boxed{C}?</think>", "<|eot_id|>"),
)


@pytest.mark.parametrize("verdict", SHOULD_BE)
def test_a_thought_before_a_response_and_end_tokens_behind_it_change_nothing(
    verifiers: Verifiers, verdict: str
) -> None:
    for verifier, kinds in FORMS.items():
        pairs = kinds[verdict]
        around = [AROUND[number % len(AROUND)] for number in range(len(pairs))]
        items = [
            Item(verifier, kinds.get("prompt", ""), before + response + behind, answer)
            for (answer, response), (before, behind) in zip(pairs, around, strict=True)
        ]
        scores = verifiers.score(items)
        assert [pair for pair, score in zip(pairs, scores, strict=True) if score != SHOULD_BE[verdict]] == []


def test_a_thought_that_does_not_end_is_read_where_that_is_wanted() -> None:
    items = [
        Item("choice", "", "<think>Answer: B", "B"),
        Item("choice", "", "<think>Answer: A</think>Answer: B", "B"),
        Item("text", "", "Answer: so\n<think>", "so"),
    ]
    with Verifiers(read_unfinished_thoughts=True) as lenient, Verifiers() as strict:
        assert lenient.score(items[:2]) == [1.0, 1.0]
        assert strict.score(items) == [0.0, 1.0, 0.0]
        assert lenient.classes("choice", "", [item.response for item in items[:2]]) == [0, 0]
        assert strict.classes("choice", "", [item.response for item in items[:2]]) == [None, 0]


def test_votes_for_a_right_answer_are_not_counted_for_a_wrong_one(verifiers: Verifiers) -> None:
    mixed = []
    for kind in KINDS:
        if kind["kind"] in AMBIGUOUS or kind["verifier"] != "math":
            continue
        responses = kind["right"] + kind["wrong"]
        classes = verifiers.classes("math", "", responses)
        right = {number for number in classes[: len(kind["right"])] if number is not None}
        of_wrong = zip(classes[len(kind["right"]) :], kind["wrong"], strict=True)
        mixed += [(kind["gold"], response) for number, response in of_wrong if number in right]
    assert mixed == []


def test_there_are_enough_of_each_kind() -> None:
    counts = Counter(
        {verifier: sum(len(kinds.get(kind, [])) for kind in SHOULD_BE) for verifier, kinds in FORMS.items()}
    )
    assert counts.total() >= 200
    assert min(counts.values()) >= 35
    for kinds in FORMS.values():
        assert len(kinds["right"]) >= 15
        assert len(kinds["wrong"]) >= 15
    for verdict in SHOULD_BE:
        assert len({(kind["gold"], response) for kind in KINDS for response in kind[verdict]}) >= 300
