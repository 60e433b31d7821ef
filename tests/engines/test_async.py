"""Asynchronous rollouts on real servers: generation that runs on across syncs, and generation that is interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.rollout.engine import Request, Sampling
from megatron_tempo.training.setup import folder_weights
from megatron_tempo.types import Completion
from tests.engines.servers import ENGINES, config_of, opened, write_model
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

LONGEST = 200  # tokens: enough for a sync in the middle
PROMPTS = [(5, 7, 8), (9, 4, 1, 2, 3), (60,), tuple(range(20))]
SAMPLES = 3
Answers = dict[int, list[Completion]]


def streamed(kind: EngineKind, model: Path, run: Path, stops: bool) -> tuple[Answers, list[int], list[str]]:
    """Answers of a stream that is read until the first one, gets weights, and is read to its end.

    `stops`: whether generation is interrupted before. Also the requests that had no token then, and warnings.
    """
    messages: list[str] = []
    answered: Answers = {}
    with opened(config_of(kind, model, run), messages) as (context, engine):
        weights = folder_weights(context)
        engine.load_weights(weights, 0)
        stream = engine.stream(Sampling(1.0, LONGEST), lambda number, of: None)
        stream.add([Request(prompt, SAMPLES, seed=0) for prompt in PROMPTS])
        more = [Request((1, 2), SAMPLES, seed=0)]
        stream.add(more)
        stream.cancel([2])
        for number, of in stream.read(lambda: bool(answered)):
            answered[number] = of
        unbegun = []
        if stops:
            stream.interrupt()
            unbegun = stream.waiting()
        engine.load_weights(weights, 1)
        stream.add(more)
        for number, of in stream.read(lambda: len(answered) == len(PROMPTS) + 1):
            answered[number] = of
        stream.close()
    return answered, unbegun, messages


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("kind", ENGINES)
def test_responses_go_on_with_new_weights(tmp_path: Path, kind: EngineKind, stops: bool) -> None:
    """Tokens of two versions, which are the same weights, so that all log-probabilities can be compared."""
    model = write_model(tmp_path / "model")
    ((answered, unbegun, messages),) = run_ranks(
        streamed, 1, tmp_path / "ranks", kind, model, tmp_path / "run", stops, timeout=500
    )
    assert messages == []
    assert sorted(answered) == [0, 1, 3, 4, 5]
    assert unbegun == []
    versions = [one.versions for of in answered.values() for one in of]
    assert all(1 <= len(runs) <= 2 for runs in versions)
    assert any(len(runs) == 2 and [version for version, _ in runs] == [0, 1] for runs in versions)
    assert {version for one in answered[5] for version, _ in one.versions} == {1}
    prompts = dict(enumerate([*PROMPTS, (1, 2), (1, 2)]))
    reference = transformers.AutoModelForCausalLM.from_pretrained(model)
    for number, of in answered.items():
        assert len(of) == SAMPLES
        for one in of:
            assert sum(count for _, count in one.versions) == len(one.token_ids) == len(one.logprobs) <= LONGEST
            assert one.finish_reason == "stop" or len(one.token_ids) == LONGEST
            tokens = torch.tensor([*prompts[number], *one.token_ids.tolist()])
            start = len(prompts[number])
            with torch.no_grad():
                logs = reference(tokens[None]).logits[0, start - 1 : -1].log_softmax(-1)
            wanted = logs.gather(1, tokens[start:, None])[:, 0]
            torch.testing.assert_close(one.logprobs, wanted, atol=1e-4, rtol=0)
