"""Log-probabilities of truncated sampling: the trainer's, on tensor ranks, are those of transformers' processors."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_tempo.config.choices import Logits
from megatron_tempo.config.schema import Config
from megatron_tempo.kernels.truncation import Truncation
from megatron_tempo.observability.records import read_evaluations, read_metrics
from megatron_tempo.training.context import open_context
from megatron_tempo.training.jobs import train
from megatron_tempo.training.setup import build_actor
from tests.support.project import config_of, write_project
from tests.support.ranks import run_ranks
from tests.support.tiny import ragged_batch, write_model

TEMPERATURE = 0.8
CHOICES = [Truncation(0.9), Truncation(0.95, 20), Truncation(0.9, 40, 0.005)]


def logprobs_by_kind(model: Path) -> dict[str, Tensor]:
    """The actor's log-probabilities of random responses, from tensor ranks, by truncation and kind of logits."""
    config = Config()
    config.model.path, config.rollout.temperature = str(model), TEMPERATURE
    config.rollout.top_p, config.parallel.tensor = CHOICES[0].top_p, 2
    with open_context(config) as context:
        actor = build_actor(context)
        net = actor.model.net
        assert net.truncation == CHOICES[0]
        measured = {}
        for truncation in CHOICES:
            for kind in Logits:
                net.truncation, net.logits = truncation, kind
                measured[f"{CHOICES.index(truncation)}/{kind.name}"] = actor.logprobs(ragged_batch(6))
        measured["certainty"] = actor.self_certainty(ragged_batch(6))
        measured["afterwards"] = actor.logprobs(ragged_batch(6))
        return measured


def expected(model: Path, truncation: Truncation) -> Tensor:
    """By transformers' processors. A random token that they do not leave is kept with all that are more probable."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    warpers = [TemperatureLogitsWarper(TEMPERATURE)]
    warpers += [MinPLogitsWarper(truncation.min_p)] if truncation.min_p else []
    warpers += [TopKLogitsWarper(truncation.top_k)] if truncation.top_k else []
    warpers += [TopPLogitsWarper(truncation.top_p)]
    batch, logprobs = ragged_batch(6), []
    for prompt, response in zip(batch.prompts(), batch.responses(), strict=True):
        with torch.no_grad():
            logits = reference(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        left = LogitsProcessorList(warpers)(torch.zeros(len(logits), 0, dtype=torch.int64), logits.clone()).isfinite()
        left |= logits >= logits.gather(1, response[:, None].long())
        row = (logits / TEMPERATURE).masked_fill(~left, -torch.inf).log_softmax(1)
        logprobs.append(row.gather(1, response[:, None].long())[:, 0])
    return torch.cat(logprobs)


def certainty(model: Path) -> Tensor:
    """KL(U || p) of each response token in float64, p over the whole vocabulary."""
    reference = transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")
    batch, rows = ragged_batch(6), []
    for prompt, response in zip(batch.prompts(), batch.responses(), strict=True):
        with torch.no_grad():
            logits = reference(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logs = (logits.double() / TEMPERATURE).log_softmax(1)
        rows.append(-math.log(logs.shape[1]) - logs.mean(1))
    return torch.cat(rows).float()


def test_logprobs_are_over_what_transformers_processors_leave(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    ranks = run_ranks(logprobs_by_kind, 2, tmp_path / "ranks", model)
    for number, truncation in enumerate(CHOICES):
        wanted = expected(model, truncation)
        for measured in ranks:
            for kind in Logits:
                torch.testing.assert_close(measured[f"{number}/{kind.name}"], wanted, atol=1e-4, rtol=1e-4)
    for measured in ranks:
        assert torch.equal(measured["afterwards"], measured[f"{len(CHOICES) - 1}/{kind.name}"])
        torch.testing.assert_close(measured["certainty"], certainty(model), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An iteration of TEMPO on two tensor ranks: truncated sampling, a stop string, and greedy evaluations."""
    out = tmp_path_factory.mktemp("run")
    config = config_of(write_project(out / "project"), out / "run")
    config.parallel.tensor = 2
    config.rollout.top_p, config.rollout.min_p, config.rollout.stop, config.rollout.dump = 0.9, 0.01, ["-"], True
    config.evaluation.temperature, config.evaluation.samples, config.evaluation.pass_k = 0.0, 1, [1]
    run_ranks(train, 2, out / "ranks", config)
    return out / "run"


def test_engine_and_trainer_agree_in_a_run(run: Path) -> None:
    (record,) = read_metrics(run)
    assert record["engine/logprob_gap_max"] < 1e-4
    assert record["actor/skipped"] == 0
    assert all(line["avg_k"] == 1 for line in read_evaluations(run))


def test_responses_of_a_run_end_at_the_stop_string(run: Path) -> None:
    (path,) = (run / "rollouts").rglob("*.jsonl")
    texts = [(line["response"], line["stopped"]) for line in map(json.loads, path.read_text().splitlines())]
    assert any(text.rstrip().endswith("-") for text, _ in texts), texts[:5]
    for text, stopped in texts:
        assert "-" not in text.rstrip()[:-1], "nothing follows the stop string"
        assert stopped or not text.rstrip().endswith("-")
