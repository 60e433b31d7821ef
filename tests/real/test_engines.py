"""Real servers with the published model: what they say after each weight sync, and which tokens end it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.config.schema import DatasetConfig
from megatron_tempo.data.dataset import load_unlabelled
from megatron_tempo.data.tokenizer import end_tokens, load_tokenizer
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.training.setup import build_actor, engine_weights
from megatron_tempo.types import Completion
from tests.engines.servers import answers, config_of, opened
from tests.real.test_weights import QUESTIONS
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.real, pytest.mark.engine, pytest.mark.timeout(900)]
SCALES = (1.0, 1.02)  # of all weights, by version: the second model says something else
PROMPTS, SAMPLES, TOKENS, TEMPERATURE = 4, 2, 12, 1.0


def requests_of(model: Path) -> list[Request]:
    dataset = DatasetConfig(path=str(QUESTIONS), limit=PROMPTS, suffix=" Answer with the number only.")
    prompts = load_unlabelled(dataset, load_tokenizer(model), 64)
    return [Request(prompt.token_ids, SAMPLES, seed=i) for i, prompt in enumerate(prompts)]


def said(kind: EngineKind, model: Path, run: Path) -> tuple[list[Any], list[str]]:
    """The completions after each of two syncs, and the engine's warnings."""
    config = config_of(kind, model, run)
    config.parallel.bucket_mb = 64
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 64, TOKENS
    config.rollout.servers.start_seconds, config.rollout.servers.update_seconds = 400.0, 120.0
    config.rollout.servers.hang_seconds = 120.0
    messages: list[str] = []
    completions = []
    with opened(config, messages) as (context, engine):
        actor = build_actor(context)
        for version, scale in enumerate(SCALES):
            with torch.no_grad():
                for parameter in actor.model.net.parameters():
                    parameter.mul_(scale)
            engine.load_weights(engine_weights(actor, context), version)
            completions.append(answers(engine, requests_of(model), Sampling(TEMPERATURE, TOKENS)))
    return completions, messages


@pytest.mark.parametrize("kind", [EngineKind.vllm, EngineKind.sglang])
@pytest.mark.usefixtures("warm")
def test_after_each_sync_it_speaks_with_the_new_weights(model: Path, tmp_path: Path, kind: EngineKind) -> None:
    ((completions, messages),) = run_ranks(said, 1, tmp_path / "ranks", kind, model, tmp_path / "run", timeout=800)
    assert messages == []
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    ends, prompts = end_tokens(model), requests_of(model)
    for version, scale in enumerate(SCALES):
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(scale)
        assert sorted(completions[version]) == list(range(PROMPTS))
        for number, of_prompt in completions[version].items():
            for completion in of_prompt:
                assert completion.versions == ((version, len(completion.token_ids)),)
                assert_said(reference, prompts[number].token_ids, completion, ends)


def assert_said(reference: Any, prompt: tuple[int, ...], completion: Completion, ends: list[int]) -> None:
    """The response ends at its first end token, and has transformers' log-probabilities."""
    said = completion.token_ids.tolist()
    assert not any(token in ends for token in said[:-1])
    assert (said[-1] in ends) == (completion.finish_reason == "stop")
    tokens = torch.tensor([*prompt, *said])
    with torch.no_grad():
        logs = (reference(tokens[None]).logits[0, len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
    wanted = logs.gather(1, tokens[len(prompt) :, None])[:, 0]
    torch.testing.assert_close(completion.logprobs, wanted, atol=2e-3, rtol=0)
