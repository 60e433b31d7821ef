"""The output of the eval command: every response, and the scores of a set with their 95% intervals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_tempo.evaluation.evaluator import ScoredResponses
from megatron_tempo.evaluation.scores import (
    avg_at_k,
    avg_at_k_se,
    pass_at_k,
    pass_at_k_se,
    share_interval,
    vote_accuracy,
)


def response_records(
    name: str, scored: ScoredResponses, keys: Mapping[str, str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, Any]]:
    """Every response to the set `name`, as the lines of responses.jsonl, on a rank that holds all rows.

    `keys`: the questions' keys by id.
    """
    samples, batch = scored.correct.shape[1], scored.batch
    for row, tokens in enumerate(batch.responses()):
        question, sample = divmod(row, samples)
        prompt = scored.prompts[question]
        yield {
            "set": name,
            "id": prompt.id,
            "question": keys[prompt.id],
            "sample": sample,
            "text": tokenizer.decode(tokens.tolist()),
            "correct": int(scored.correct[question, sample]),
            "tokens": len(tokens),
            "finish": "stop" if batch.stopped[row] else "length",
        }


def result(scored: ScoredResponses) -> dict[str, Any]:
    """A set's part of results.json: avg@n, and pass@k for every k from 1 to n, for n responses per question.

    Each score has `se`, its standard error over questions, and `low` and `high`, the 95% interval
    (`scores.share_interval`). They are null for a single question.
    """
    correct = scored.correct
    questions, samples = correct.shape
    lengths, stopped = scored.batch.response_lengths.double(), scored.batch.stopped

    def score(value: float, error: float | None) -> dict[str, float | None]:
        low, high = share_interval(value, error, questions) or (None, None)
        return {"value": value, "se": error, "low": low, "high": high}

    return {
        "questions": questions,
        "samples": samples,
        "avg": score(avg_at_k(correct), avg_at_k_se(correct)),
        "pass": {str(k): score(pass_at_k(correct, k), pass_at_k_se(correct, k)) for k in range(1, samples + 1)},
        "response_length": {"mean": float(lengths.mean()), "max": int(lengths.max())},
        "truncated": 1.0 - float(stopped.double().mean()),
        **({} if scored.classes is None else {"vote": vote_accuracy(scored.classes, correct)}),
        "verifiers": sorted({prompt.verifier for prompt in scored.prompts}),
    }
