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
from tests.engines.servers import ENDING, ENGINES, config_of, opened, write_endless_models
from tests.support.ranks import run_ranks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

# A response that does not end takes longer than any sync. Its cache is rarely filled.
LONGEST, POSITIONS = 2000, 2048
ROOM = {EngineKind.sglang: ["--max-total-tokens=32768"], EngineKind.vllm: []}
PROMPTS = [(5, 7, 8), (9, 4, 1, 2, 3), (60,), tuple(range(20)), (1, 2), (6, ENDING), (1, 2)]
CANCELLED, FIRST, LAST = 2, 5, 6  # the one that is answered before the sync, and the one that is asked after it
SAMPLES = 3
Answers = dict[int, list[Completion]]


def streamed(
    kind: EngineKind, models: tuple[Path, Path], run: Path, stops: bool
) -> tuple[Answers, list[int], list[str]]:
    """Answers of a stream that is read until the first one, gets weights, and is read to its end.

    `stops`: whether generation is interrupted before. Also the requests that had no token then, and warnings.
    """
    messages: list[str] = []
    answered: Answers = {}
    config = config_of(kind, models[0], run)
    config.rollout.max_response_tokens = LONGEST
    config.rollout.servers.arguments = [*config.rollout.servers.arguments, *ROOM[kind]]
    requests = [Request(prompt, SAMPLES, seed=0) for prompt in PROMPTS]
    with opened(config, messages) as (context, engine):
        engine.load_weights(folder_weights(context), 0)
        stream = engine.stream(Sampling(1.0, LONGEST), lambda number, of: None)
        stream.add(requests[:4])
        stream.add(requests[4:LAST])
        stream.cancel([CANCELLED])
        for number, of in stream.read(lambda: bool(answered)):
            answered[number] = of
        assert list(answered) == [FIRST]
        unbegun = []
        if stops:
            stream.interrupt()
            unbegun = stream.waiting()
        config.model.path = str(models[1])
        engine.load_weights(folder_weights(context), 1)
        stream.add(requests[LAST:])
        for number, of in stream.read(lambda: len(answered) == len(PROMPTS) - 1):
            answered[number] = of
        stream.close()
    return answered, unbegun, messages


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("kind", ENGINES)
def test_responses_go_on_with_new_weights(tmp_path: Path, kind: EngineKind, stops: bool) -> None:
    """Tokens of two versions, whose caches are the same, so that all log-probabilities can be compared."""
    models = write_endless_models(tmp_path, positions=POSITIONS)
    ((answered, unbegun, messages),) = run_ranks(
        streamed, 1, tmp_path / "ranks", kind, models, tmp_path / "run", stops, timeout=500
    )
    assert messages == []
    assert sorted(answered) == [0, 1, 3, 4, FIRST, LAST]
    of_versions = {number: [[version for version, _ in one.versions] for one in of] for number, of in answered.items()}
    assert of_versions.pop(FIRST) == [[0]] * SAMPLES
    assert of_versions.pop(LAST) == [[1]] * SAMPLES
    assert all(runs in ([0, 1], [1]) for of in of_versions.values() for runs in of)
    # A request that came to the server late had no token yet.
    assert unbegun == ([number for number, of in of_versions.items() if of == [[1]] * SAMPLES] if stops else [])
    assert len(unbegun) < len(of_versions)
    references = [transformers.AutoModelForCausalLM.from_pretrained(model) for model in models]
    for number, of in answered.items():
        assert len(of) == SAMPLES
        for one in of:
            assert sum(count for _, count in one.versions) == len(one.token_ids) == len(one.logprobs) <= LONGEST
            assert one.finish_reason == "stop"
            tokens = torch.tensor([*PROMPTS[number], *one.token_ids.tolist()])
            start = len(PROMPTS[number])
            with torch.no_grad():
                logs = [reference(tokens[None]).logits[0, start - 1 : -1].log_softmax(-1) for reference in references]
            versions = torch.tensor([version for version, count in one.versions for _ in range(count)])
            wanted = torch.stack(logs)[versions, torch.arange(len(versions)), tokens[start:]]
            torch.testing.assert_close(one.logprobs, wanted, atol=1e-4, rtol=0)
