"""An evaluation: the engine answers a set's questions. Verdicts give the scores and the critic's calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tempo.config.schema import EvaluationConfig
from megatron_tempo.config.updates import CriticTargets
from megatron_tempo.evaluation.calibration import calibration_record, prefixes_of
from megatron_tempo.evaluation.scores import avg_at_k, avg_at_k_se, pass_at_k, pass_at_k_se, vote_accuracy
from megatron_tempo.evaluation.token_texts import token_texts
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.batches import ask, collect, receive
from megatron_tempo.rollout.engine import Engine, Sampling
from megatron_tempo.types import Batch, LabelledPrompt

SHOWN = 12  # responses kept for the report: the first sample of this many questions
ANSWER_CHARS = 20_000  # of an answer in the report: tests of programs can be megabytes

# The critic's values after given numbers of tokens of each response, int64 [n, k] -> float32 [n, k], on every rank.
ValuesAt = Callable[[Batch, Tensor], Tensor]


class RowDivision(Protocol):
    """Says which rows the critic's ranks compute (`training.row_owners.RowOwners`)."""

    def of_batch(self, batch: Batch) -> Batch:
        """The batch with owners."""
        ...

    def held(self, batch: Batch) -> Tensor:
        """The rows of such a batch that this rank needs: int64, ascending."""
        ...


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Evaluates the sets of a job. All methods are collective and return the same on every rank.

    `values` returns the critic's values; None if there is no critic. `rows` says which rows it needs. `seed` seeds the
    sampling. It is the same at every evaluation of a run, so the points of a curve differ only by the weights. `keys`
    are the keys of each set's questions, by id. With `keeps_all` the first rank holds all responses; otherwise it holds
    those that are shown, as every rank does.
    """

    engine: Engine
    verifiers: Verifiers
    tokenizer: PreTrainedTokenizerBase
    sets: dict[str, list[LabelledPrompt]]
    keys: dict[str, dict[str, str]]
    config: EvaluationConfig
    max_tokens: int
    seed: int
    values: ValuesAt | None
    rows: RowDivision
    keeps_all: bool = False

    def evaluate(self, name: str, targets: CriticTargets, *, show: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A set's scores and a few responses: the fields of lines of evaluations.jsonl and samples.jsonl."""
        return self.measure(name, self.answer(name), targets, show=show)

    def reads_values(self, name: str, *, show: bool) -> bool:
        """Whether `measure` lets the critic compute."""
        return self.values is not None and (show or name == self.config.calibration_set)

    def measure(
        self, name: str, scored: ScoredResponses, targets: CriticTargets, *, show: bool
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """As `evaluate`, for responses that are verified already."""
        calibration = None
        if self.values is not None and name == self.config.calibration_set:
            calibration = calibrate(scored, self.values, targets)
        samples = shown(scored, self.tokenizer, self.values) if show else []
        questions = by_question(scored, self.keys[name])
        return scores(scored, self.config) | {"set": name, "calibration": calibration, **questions}, samples

    def answer(self, name: str) -> ScoredResponses:
        """Let the engine answer every question of a set `config.samples` times, and verify the responses."""
        prompts, config = self.sets[name], self.config
        sampling = Sampling.of(config, config.max_response_tokens or self.max_tokens)
        seed = f"{self.seed}/evaluation/{name}"
        asked = ask(self.engine, prompts, config.samples, sampling, seed)
        by = self._votes_by(prompts)
        collected = collect(asked, self.verifiers, self.tokenizer, by, labelled_too=by is not None)
        collected = collected.take(0, len(prompts), verdicts=True, classes=by is not None)
        columns = self.rows.of_batch(collected.columns)
        held = torch.zeros(len(columns), dtype=torch.bool)
        held[self.rows.held(columns)] = True
        held[_shown_rows(len(prompts), config.samples)] = True
        held |= self.keeps_all and dist.get_rank() == 0
        batch = receive(replace(collected, columns=columns), held.nonzero().flatten())
        assert batch.correct is not None
        shape = len(prompts), config.samples
        classes = None if batch.answer_class is None else batch.answer_class.view(shape).numpy()
        return ScoredResponses(prompts, batch, batch.correct.double().view(shape).numpy(), classes)

    def _votes_by(self, prompts: Sequence[LabelledPrompt]) -> str | None:
        """The verifier that compares answers for `config.votes`. None: no votes, or several verifiers, or a judge."""
        names = {prompt.verifier for prompt in prompts}
        return names.pop() if self.config.votes and len(names) == 1 and names != {"judge"} else None


@dataclass(frozen=True, slots=True)
class ScoredResponses:
    """The questions of a set, each with `samples` verified responses. `correct`: float64 [questions, samples].

    `classes`: int64 [questions, samples], equal numbers for equal answers; None: answers were not compared.
    """

    prompts: Sequence[LabelledPrompt]
    batch: Batch
    correct: np.ndarray
    classes: np.ndarray | None = None


def scores(scored: ScoredResponses, config: EvaluationConfig) -> dict[str, Any]:
    """avg@k and pass@k with their standard errors over questions: the fields of a line of evaluations.jsonl."""
    correct = scored.correct
    return {
        "avg": avg_at_k(correct),
        "avg_se": avg_at_k_se(correct),
        "avg_k": config.samples,
        "pass": {str(k): pass_at_k(correct, k) for k in config.pass_k},
        "pass_se": {str(k): pass_at_k_se(correct, k) for k in config.pass_k},
        "questions": len(scored.prompts),
        "response_length": float(scored.batch.response_lengths.float().mean()),
        "truncated": 1.0 - float(scored.batch.stopped.float().mean()),
        **({} if scored.classes is None else {"vote": vote_accuracy(scored.classes, correct)}),
    }


def by_question(scored: ScoredResponses, keys: Mapping[str, str]) -> dict[str, Any]:
    """What pairs two evaluations: the fields `right` and `questions_hash` of a line of evaluations.jsonl.

    `right` counts the correct responses of each question, in the order of the questions' keys. The hash is equal where
    questions, answers and verifiers are the same, whatever their order in the file.
    """
    named = [(keys[prompt.id], prompt.answer, prompt.verifier) for prompt in scored.prompts]
    order = sorted(range(len(named)), key=named.__getitem__)
    text = json.dumps([named[place] for place in order])
    counts = scored.correct.sum(axis=1).astype(int)
    return {
        "right": [int(counts[place]) for place in order],
        "questions_hash": hashlib.sha256(text.encode()).hexdigest()[:32],
    }


def calibrate(scored: ScoredResponses, values: ValuesAt, targets: CriticTargets) -> dict[str, Any]:
    """The critic's calibration on these responses: the `calibration` field. Collective."""
    positions = torch.from_numpy(prefixes_of(scored.batch.response_lengths.numpy()))
    table = values(scored.batch, positions)
    if targets is CriticTargets.plus_minus_one:
        table = (table + 1) / 2
    return calibration_record(table.numpy(), scored.correct)


def _shown_rows(questions: int, samples: int) -> Tensor:
    """The first response to each of the first questions: int64."""
    return torch.arange(0, min(SHOWN, questions) * samples, samples)


def shown(scored: ScoredResponses, tokenizer: PreTrainedTokenizerBase, values: ValuesAt | None) -> list[dict[str, Any]]:
    """A few responses in full, with their token values: the fields of lines of samples.jsonl. Collective."""
    batch = scored.batch.select(_shown_rows(*scored.correct.shape))
    by_row: list[list[float]] | None = None
    if values is not None and len(batch):
        lengths = batch.response_lengths
        positions = torch.arange(int(lengths.max()) + 1).clamp(max=lengths[:, None])
        table = values(batch, positions)
        by_row = [row[: length + 1].tolist() for row, length in zip(table, lengths.tolist(), strict=True)]
    return [
        {
            "prompt": prompt.text,
            "tokens": token_texts(tokenizer, response.tolist()),
            "values": None if by_row is None else by_row[i],
            "correct": int(scored.correct[i, 0]),
            "answer": prompt.answer if len(prompt.answer) <= ANSWER_CHARS else f"{prompt.answer[:ANSWER_CHARS]}...",
            "verifier": prompt.verifier,
        }
        for i, (prompt, response) in enumerate(zip(scored.prompts[:SHOWN], batch.responses(), strict=True))
    ]
