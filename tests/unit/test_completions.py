"""Completions: what is converted to tensors, and what crosses processes of a view of a large array."""

from __future__ import annotations

import json
import pickle

import pytest
import torch

from megatron_tempo.rollout.arrays import logprob_tensor, run_tuples, token_tensor
from megatron_tempo.types import Completion
from tests.support.completions import plain


def test_a_pickled_completion_carries_its_own_tokens_alone() -> None:
    tokens, logprobs = torch.arange(100_000, dtype=torch.int32), torch.arange(100_000) * -0.5
    one = Completion(tokens[7:10], logprobs[7:10], "stop", ((3, 1), (4, 2)))
    pickled = pickle.dumps(one)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert plain(again) == plain(one) == ((7, 8, 9), (-3.5, -4.0, -4.5), "stop", ((3, 1), (4, 2)))
    again.token_ids[0] = 1  # its memory is its own, and writable
    assert tokens[7] == 7


def test_converted_tensors_have_memory_of_their_own() -> None:
    tokens, logprobs = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([-0.5, -0.25])
    assert torch.equal(token_tensor(tokens), tokens)
    assert torch.equal(logprob_tensor(logprobs), logprobs)
    assert token_tensor(tokens).data_ptr() != tokens.data_ptr()
    assert logprob_tensor(logprobs).data_ptr() != logprobs.data_ptr()


def test_no_tokens_are_tokens() -> None:
    assert token_tensor([]).dtype == torch.int32
    assert logprob_tensor(()).dtype == torch.float32
    assert len(token_tensor([])) == len(logprob_tensor(())) == 0


@pytest.mark.parametrize("text", ["[1, true]", "[1, null]", "[1, 2.0]", '"12"', "[1, [2]]", "{}", "3", "null", "1e2"])
def test_what_json_may_hold_in_place_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^token_ids (is|has) "):
        token_tensor(json.loads(text))


@pytest.mark.parametrize("text", ["[-1, true]", "[-1, null]", '["-1"]', "[[-1]]", "{}", "-1.5", "null"])
def test_what_json_may_hold_in_place_of_logprobs_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^logprobs (is|has) "):
        logprob_tensor(json.loads(text))


def test_numbers_at_the_limits() -> None:
    assert token_tensor([2**31 - 1, -(2**31)]).tolist() == [2**31 - 1, -(2**31)]
    for beyond in (2**31, -(2**31) - 1, 2**63):
        with pytest.raises(ValueError, match="a token out of the vocabulary"):
            token_tensor([beyond])
    with pytest.raises(ValueError, match="token_ids has numbers that are too large"):
        token_tensor([2**70])
    assert logprob_tensor([-1e300, float("nan"), -1e-300]).tolist() == pytest.approx(
        [float("-inf"), float("nan"), 0.0], nan_ok=True
    )


@pytest.mark.parametrize("versions", [None, 3, [3], [(3, 2.0)], [("3", 2)], [(3, 2, 1)], [(3, -1)]])
def test_versions_that_are_no_runs_are_refused(versions: object) -> None:
    with pytest.raises(ValueError, match=r"^versions "):
        run_tuples(versions)
