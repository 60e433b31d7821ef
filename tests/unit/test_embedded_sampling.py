"""Top-p, top-k, min-p, greedy and stop strings of the embedded engine, against transformers' own processors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from megatron_tempo.data.tokenizer import check_stop_strings, load_tokenizer
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.responses import View
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.rollout.partial_requests import is_unfinished
from megatron_tempo.rollout.stop_strings import StopStrings
from megatron_tempo.rollout.verification import responses_of
from megatron_tempo.types import Completion, UnlabelledPrompt
from tests.support.sampled import by_transformers, logits_of
from tests.support.tiny import VOCAB, WORDS, write_model
from tests.unit.test_embedded import END, PROMPTS, chi_square, engine_of, flat, generate, model_of, requests_of

SAMPLINGS = [
    Sampling(0.6, 16, top_p=0.95, top_k=20),
    Sampling(1.3, 16, top_p=0.7),
    Sampling(0.9, 16, min_p=0.2),
    Sampling(1.0, 16, top_k=3),
    Sampling(1.0, 16, top_p=0.8, top_k=30, min_p=0.05),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), layers=2)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@torch.no_grad()
def test_logprobs_are_those_of_transformers_processors(folder: Path, sampling: Sampling) -> None:
    model = model_of(folder)
    for prompt, row in zip(PROMPTS, generate(engine_of(folder), requests_of(PROMPTS), sampling), strict=True):
        for completion in row:
            tokens = completion.token_ids.long()
            wanted = by_transformers(logits_of(model, prompt, completion), sampling).gather(1, tokens[:, None])[:, 0]
            torch.testing.assert_close(completion.logprobs, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@torch.no_grad()
def test_tokens_follow_the_truncated_distribution(folder: Path, sampling: Sampling) -> None:
    prompt = (3, 14, 15)
    one_token = replace(sampling, max_tokens=1)
    (answers,) = generate(engine_of(folder), [Request(prompt, 6_000, 11)], one_token)
    firsts = torch.stack([answer.token_ids[0] for answer in answers]).bincount(minlength=VOCAB)
    wanted = by_transformers(model_of(folder)(torch.tensor([prompt])).logits[0, -1:], sampling).exp()[0]
    assert not firsts[wanted == 0].any(), "a token that is not left was drawn"
    assert abs(chi_square(firsts[wanted > 0], wanted[wanted > 0])) < 4
    assert (wanted > 0).sum() < VOCAB


@torch.no_grad()
def test_greedy_takes_the_most_probable_token(folder: Path) -> None:
    model = model_of(folder)
    answers = generate(engine_of(folder), requests_of(PROMPTS, 2), Sampling(0.0, 20))
    for prompt, row in zip(PROMPTS, answers, strict=True):
        assert row[0].token_ids.tolist() == row[1].token_ids.tolist()
        logits = logits_of(model, prompt, row[0])
        assert torch.equal(row[0].token_ids.long(), logits.argmax(1))
        torch.testing.assert_close(row[0].logprobs, logits.log_softmax(1).amax(1), atol=1e-4, rtol=0)


def test_a_response_ends_with_the_token_that_completes_a_stop_string(folder: Path) -> None:
    """ " 1" begins a token behind another one; "9 2" is two tokens, or the ends of longer ones."""
    strings, tokenizer, engine = (" 1", "9 2"), load_tokenizer(folder), engine_of(folder)
    free = generate(engine, requests_of(PROMPTS, 8), Sampling(1.5, 20))
    stopped = generate(engine, requests_of(PROMPTS, 8), Sampling(1.5, 20, stop=strings))
    prompts = [prompt for prompt in PROMPTS for _ in range(8)]
    ends = 0
    for prompt, without, one in zip(prompts, flat(free), flat(stopped), strict=True):
        ids = one.token_ids.tolist()
        assert ids == without.token_ids.tolist()[: len(ids)], "a stop string changes nothing before it"
        # This tokenizer writes a space between tokens, also behind the prompt.
        first = len(tokenizer.decode(list(prompt)))
        text, before = (tokenizer.decode([*prompt, *own])[first:] for own in (ids, ids[:-1]))
        assert not any(string in before for string in strings)
        if any(string in text for string in strings):
            assert one.finish_reason == "stop"
            assert len(one.logprobs) == len(ids)
            ends += 1
        else:
            assert one.finish_reason == ("stop" if ids[-1] == END else "length")
    assert ends > 10


def test_a_stop_string_that_began_before_a_pause_is_found(folder: Path) -> None:
    engine, sampling = engine_of(folder), Sampling(1.5, 20, stop=(" 1", "9 2"))
    whole = generate(engine, requests_of(PROMPTS[:2], 8), sampling)
    parts = []
    for request in requests_of(PROMPTS[:2], 8):
        (row,) = generate(engine, [replace(request, pause_after=1)], sampling)
        while is_unfinished(row):
            (row,) = generate(engine, [replace(request, pause_after=1, begun=tuple(row))], sampling)
        parts.append(row)
    for one, other in zip(flat(parts), flat(whole), strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.finish_reason == other.finish_reason


def test_a_stop_string_is_found_over_pieces_of_characters_and_tokens(tmp_path: Path) -> None:
    """Byte by byte: a character is text once its last byte is there."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    ids = tokenizer.encode("x é</ä>é").ids
    for string, at in (("é", 3), ("</ä>", 8), ("ä>é", 10), ("no", None)):
        text = StopStrings(tmp_path, [string]).texts([tokenizer.encode("</").ids])[0]
        found = [text.ends_with(token) for token in ids]
        assert found.index(True) == at if at is not None else not any(found), string
    assert check_stop_strings(load_tokenizer(tmp_path), tmp_path, ["é</ä>"], "rollout.stop") is None


def test_a_stop_string_that_the_tokenizer_cannot_write_is_an_error(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    check_stop_strings(tokenizer, folder, ["+ -", "12"], "rollout.stop")
    with pytest.raises(InputError, match=r"rollout.stop='</answer>': the tokenizer of .* writes it as"):
        check_stop_strings(tokenizer, folder, ["</answer>"], "rollout.stop")


def test_a_stop_string_without_a_token_is_an_error(tmp_path: Path) -> None:
    """A vocabulary of words without one for unknown words, as the quickstart's."""
    words = Tokenizer(WordLevel({"+": 0, "1": 1}))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"evaluation.stop='zz': the tokenizer .* cannot write it \(WordLevel"):
        check_stop_strings(load_tokenizer(tmp_path), tmp_path, ["+", "zz"], "evaluation.stop")


def test_verifiers_see_the_whole_of_a_stop_string() -> None:
    """The token at which a response ended is cut only if it is an end token."""

    class Words:
        def decode(self, tokens: Any) -> str:
            return " ".join(WORDS[token] for token in tokens)

    def said(tokens: list[int], reason: str) -> Completion:
        row = torch.tensor(tokens, dtype=torch.int32)
        return Completion(row, torch.zeros(len(row)), reason, ((0, len(row)),))

    completions = [said([4, 2, END], "stop"), said([4, 2], "stop"), said([4, 2], "length")]
    prompt = UnlabelledPrompt("a", "?", (1,))
    texts = responses_of(prompt, completions, "math", frozenset([END])).texts(Words(), View.response)
    assert [*texts] == ["4 2", "4 2", "4 2"]
    assert responses_of(prompt, completions, "math").stopped == (True, True, False), "without stop strings"
    packed = responses_of(prompt, completions, "math", frozenset([END]))
    assert packed.stopped == (True, False, False)
    assert np.array_equal(packed.tokens, [4, 2, END, 4, 2, 4, 2])


def test_seeds_decide_and_samples_differ(folder: Path) -> None:
    engine, sampling = engine_of(folder), Sampling(1.5, 20, top_p=0.9)
    first, second = (generate(engine, requests_of(PROMPTS), sampling) for _ in range(2))
    for row, again in zip(first, second, strict=True):
        assert [one.token_ids.tolist() for one in row] == [one.token_ids.tolist() for one in again]
        assert len({tuple(one.token_ids.tolist()) for one in row}) > 1
