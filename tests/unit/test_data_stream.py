"""The shuffled, resumable stream of prompts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tempo.data.stream import PromptStream
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt


def make(count: int) -> list[UnlabelledPrompt]:
    return [UnlabelledPrompt(f"p{number}", "text", (number,)) for number in range(count)]


def ids(prompts: list[UnlabelledPrompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    prompts = make(50)
    stream = PromptStream(prompts, seed=0, name="labelled")
    epochs = [ids(stream.take(50)) for _ in range(4)]
    assert all(sorted(epoch) == sorted(ids(prompts)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert ids(prompts) not in epochs


def test_order_follows_seed_and_name_and_nothing_else() -> None:
    def order(seed: int, name: str) -> list[str]:
        return ids(PromptStream(make(50), seed, name).take(120))

    first = order(0, "labelled")
    np.random.seed(3)
    assert order(0, "labelled") == first
    assert len({tuple(o) for o in (first, order(1, "labelled"), order(0, "unlabelled"), order(-1, "labelled"))}) == 4


def test_another_process_draws_the_same() -> None:
    code = (
        "from megatron_tempo.data.stream import PromptStream; from megatron_tempo.types import UnlabelledPrompt as U;"
        "s = PromptStream([U(f'p{i}', 'text', (i,)) for i in range(20)], 7, 'labelled');"
        "print(' '.join(p.id for p in s.take(45)))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert there == ids(PromptStream(make(20), 7, "labelled").take(45))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 12), min_size=1, max_size=20), st.integers(0, 2**40))
def test_takes_have_no_prompt_twice_and_epochs_are_whole(size: int, counts: list[int], seed: int) -> None:
    stream = PromptStream(make(size), seed, "x")
    seen = Counter({f"p{number}": 0 for number in range(size)})
    for count in counts:
        taken = ids(stream.take(count))
        assert len(taken) == count
        if count <= size:
            assert len(set(taken)) == count
        seen.update(taken)
        assert max(seen.values()) - min(seen.values()) <= 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(0, 30), min_size=1, max_size=12), st.data())
def test_resumed_stream_goes_on_exactly(size: int, counts: list[int], data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, len(counts)))
    whole = PromptStream(make(size), 5, "x")
    expected = [ids(whole.take(count)) for count in counts]

    first = PromptStream(make(size), 5, "x")
    for count in counts[:stop]:
        first.take(count)
    second = PromptStream(make(size), 5, "x")
    second.restore(json.loads(json.dumps(first.state())))
    assert [ids(second.take(count)) for count in counts[stop:]] == expected[stop:]
    assert second.state() == whole.state()
    assert second.state()["drawn"] == sum(counts)


def test_restore_into_a_used_stream() -> None:
    stream = PromptStream(make(10), 0, "x")
    state = stream.state()
    expected = ids(stream.take(25))
    stream.restore(state)
    assert ids(stream.take(25)) == expected


@pytest.mark.parametrize("change", [{"answer": "6"}, {"token_ids": (9,)}, {"id": "other"}, {"verifier": "countdown"}])
def test_other_prompts_are_refused(change: dict[str, object]) -> None:
    prompts = [LabelledPrompt(f"p{i}", "text", (i,), "5", "math") for i in range(4)]
    state = PromptStream(prompts, 0, "labelled").state()
    changed = [*prompts[:3], replace(prompts[3], **change)]
    for others in (changed, prompts[:3], prompts[::-1]):
        with pytest.raises(ValueError, match="labelled prompts are not those of the checkpoint: the file"):
            PromptStream(others, 0, "labelled").restore(state)


def test_another_seed_is_refused() -> None:
    state = PromptStream(make(4), 0, "labelled").state()
    with pytest.raises(ValueError, match=r"saved with run\.seed=0, now it is 1"):
        PromptStream(make(4), 1, "labelled").restore(state)


def test_no_prompts() -> None:
    with pytest.raises(ValueError, match="the labelled set has no prompts"):
        PromptStream([], 0, "labelled")
