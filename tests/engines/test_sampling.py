"""What real servers sample with top-p, top-k, min-p, a temperature of 0, stop strings and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.training.setup import build_actor, engine_weights
from megatron_tempo.types import Completion
from tests.engines.servers import ENGINES, PROMPTS, answers, config_of, opened, write_model
from tests.support.ranks import run_ranks
from tests.support.sampled import by_transformers, logits_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

Answers = dict[int, list[Completion]]
QWEN3 = Sampling(0.6, 12, top_p=0.95, top_k=20)
TRUNCATED = [QWEN3, Sampling(1.3, 12, top_p=0.7), Sampling(0.9, 12, min_p=0.2), Sampling(1.0, 12, 0.8, 30, 0.05)]
GREEDY = Sampling(0.0, 12)
SEEDED = Sampling(1.0, 12, seeded=True)
SAMPLES = 6


def said(kind: EngineKind, model: Path, run: Path, stop: str) -> list[Answers]:
    """The answers with each sampling of `samplings`, from one server."""
    config = config_of(kind, model, run)
    config.rollout.top_p, config.rollout.stop = 0.95, [stop]
    messages: list[str] = []
    completions = []
    with opened(config, messages) as (context, engine):
        engine.load_weights(engine_weights(build_actor(context), context), 0)
        for sampling in samplings(kind, stop):
            samples = SAMPLES if sampling.temperature else 1  # vLLM refuses more of a greedy request
            requests = [Request(prompt, samples, seed=i) for i, prompt in enumerate(PROMPTS)]
            completions.append(answers(engine, requests, sampling))
    assert messages == []
    return completions


def samplings(kind: EngineKind, stop: str) -> list[Sampling]:
    seeded = [SEEDED, SEEDED] if kind is EngineKind.vllm else []  # SGLang's seeds need a GPU
    return [*TRUNCATED, GREEDY, Sampling(1.0, 40, stop=(stop,)), *seeded]


@pytest.mark.parametrize("kind", ENGINES)
def test_servers_sample_as_transformers_processors_say(tmp_path: Path, kind: EngineKind) -> None:
    folder, stop = write_model(tmp_path / "model"), " 1"  # the beginning of a token, behind another one
    (by_sampling,) = run_ranks(said, 1, tmp_path / "ranks", kind, folder, tmp_path / "run", stop, timeout=500)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ended = 0
    for sampling, by_number in zip(samplings(kind, stop), by_sampling, strict=True):
        for number, completions in by_number.items():
            for one in completions:
                logits = logits_of(model, PROMPTS[number], one)
                tokens = one.token_ids.long()
                if sampling.temperature == 0:
                    assert torch.equal(tokens, logits.argmax(1))
                    continue
                wanted = by_transformers(logits, sampling).gather(1, tokens[:, None])[:, 0]
                torch.testing.assert_close(one.logprobs, wanted, atol=1e-4, rtol=0)
                if sampling.stop:
                    assert_ends_at(stop, tokenizer, one)
                    ended += one.finish_reason == "stop" and stop in tokenizer.decode(one.token_ids.tolist())
    assert ended > len(PROMPTS), "most responses have a token that begins with 1, and end there"
    if kind is EngineKind.vllm:
        assert_repeated(*by_sampling[-2:])


def assert_ends_at(stop: str, tokenizer: Any, one: Completion) -> None:
    """The text has the string with its last token and not before, or the response ended otherwise."""
    ids = one.token_ids.tolist()
    assert stop not in tokenizer.decode(ids[:-1])
    if stop in tokenizer.decode(ids):
        assert one.finish_reason == "stop"


def assert_repeated(first: Answers, second: Answers) -> None:
    """The same seeds gave the same responses, and other ones to each sample of a prompt."""
    for number, completions in first.items():
        rows = [one.token_ids.tolist() for one in completions]
        assert rows == [one.token_ids.tolist() for one in second[number]]
        assert len({tuple(row) for row in rows}) == len(rows)
