"""Every verifier on answer forms that a person has decided: tests/fixtures/answer_forms.json.

A verifier has right and wrong forms. Of mathematics there are also those that math-verify decides otherwise than they
should be (docs/data.md has them): they are expected to fail, and the day they do not, this says so.
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

FORMS = json.loads((Path(__file__).parents[1] / "fixtures" / "answer_forms.json").read_text())
SHOULD_BE = {"right": 1.0, "wrong": 0.0, "refused though right": 1.0, "accepted though wrong": 0.0}


def cases() -> Iterator[Any]:
    for verifier, kinds in FORMS.items():
        for kind, verdict in SHOULD_BE.items():
            marks = [pytest.mark.xfail(reason=kind, strict=True)] if "though" in kind else []
            for number, (answer, response) in enumerate(kinds.get(kind, [])):
                item = Item(verifier, kinds.get("prompt", ""), response, answer)
                yield pytest.param(item, verdict, marks=marks, id=f"{verifier} {kind} {number}")


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers(workers=1, seconds=30) as verifiers:
        yield verifiers


@pytest.mark.parametrize(("item", "verdict"), cases())
def test_a_form(verifiers: Verifiers, item: Item, verdict: float) -> None:
    assert verifiers.score([item]) == [verdict]


@pytest.mark.parametrize("end", ["<|im_end|>", "</s> <|endoftext|>\n"])
def test_a_response_comes_with_the_token_that_ends_it(verifiers: Verifiers, end: str) -> None:
    """Nothing changes with it: `rollout.batches` gives a verifier all the text."""
    for verifier, kinds in FORMS.items():
        for kind in ("right", "wrong"):
            pairs = kinds[kind]
            items = [Item(verifier, kinds.get("prompt", ""), response + end, answer) for answer, response in pairs]
            scores = verifiers.score(items)
            assert [pair for pair, score in zip(pairs, scores, strict=True) if score != SHOULD_BE[kind]] == []


def test_there_are_enough_of_each_kind() -> None:
    counts = Counter(
        {verifier: sum(len(kinds.get(kind, [])) for kind in SHOULD_BE) for verifier, kinds in FORMS.items()}
    )
    assert counts.total() >= 200
    assert min(counts.values()) >= 35
    for kinds in FORMS.values():
        assert len(kinds["right"]) >= 15
        assert len(kinds["wrong"]) >= 15
