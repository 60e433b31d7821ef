"""Rollouts on disk: written for people and for replay, one JSONL file an iteration, one line a response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_tempo.errors import InputError
from megatron_tempo.files import atomic_write, read_text
from megatron_tempo.rollout.arrays import logprob_tensor, token_tensor
from megatron_tempo.rollout.batches import batch_of
from megatron_tempo.types import Batch, Completion, LabelledPrompt, UnlabelledPrompt


def path_of(folder: Path, stage: str, iteration: int) -> Path:
    return folder / f"{stage}-{iteration:06d}.jsonl"


def write(path: Path, labelled: Batch | None, unlabelled: Batch | None, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write an iteration's rollouts. The text is for people; replay reads the tokens. Answers are not written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, fsync=True) as file:
        for batch in (labelled, unlabelled):
            for line in [] if batch is None else _lines(batch, tokenizer):
                file.write(json.dumps(line).encode() + b"\n")


def _lines(batch: Batch, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, object]]:
    logprobs = batch.engine_logprobs.split(batch.response_lengths.tolist())
    versions = batch.versions.split(batch.response_lengths.tolist())
    return [
        {
            "prompt_id": batch.prompt_ids[i],
            "prompt_tokens": prompt.tolist(),
            "response": tokenizer.decode(response),
            "response_tokens": response.tolist(),
            "logprobs": logprobs[i].tolist(),
            "versions": [list(span) for span in _spans(versions[i])],
            "stopped": bool(batch.stopped[i]),
            "correct": None if batch.correct is None else float(batch.correct[i]),
            **({} if batch.answer_class is None else {"answer_class": int(batch.answer_class[i])}),
        }
        for i, (prompt, response) in enumerate(zip(batch.prompts(), batch.responses(), strict=True))
    ]


def _spans(versions: Tensor) -> list[tuple[int, int]]:
    """(version, number of tokens) in order."""
    values, counts = torch.unique_consecutive(versions, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


def read(
    path: Path,
    labelled: Sequence[LabelledPrompt],
    unlabelled: Sequence[UnlabelledPrompt],
    samples: int,
    *,
    classes: bool = False,
) -> tuple[Batch | None, Batch | None]:
    """The rollouts that were written for these prompts, as batches. `classes`: of unlabelled answers too.

    Raises InputError with file and line if the file does not have `samples` responses to each of these prompts.
    """
    if not path.exists():
        raise InputError(f"rollout.replay: {path} is not there; the run it was written by did not come so far")
    lines = read_text(path).splitlines()
    prompts: list[LabelledPrompt | UnlabelledPrompt] = [*labelled, *unlabelled]
    if len(lines) != len(prompts) * samples:
        raise InputError(f"rollout.replay: {path} has {len(lines)} responses, this run needs {len(prompts) * samples}")
    rows = [_response(f"{path}, line {i + 1}", line, prompts[i // samples]) for i, line in enumerate(lines)]
    completions = [[completion for completion, _ in rows[i : i + samples]] for i in range(0, len(rows), samples)]
    verdicts = [[correct for _, correct in rows[i : i + samples]] for i in range(0, len(labelled) * samples, samples)]
    n = len(labelled)
    classed = None
    if classes:
        classed = [[_class(f"{path}, line {i + 1}", lines[i]) for i in range(n * samples, len(lines))]]
    return (
        batch_of(labelled, completions[:n], verdicts) if labelled else None,
        batch_of(unlabelled, completions[n:], None, classed) if unlabelled else None,
    )


def _class(where: str, text: str) -> int | None:
    """The class of an unlabelled response's answer."""
    answer_class = json.loads(text).get("answer_class")
    if type(answer_class) is not int or answer_class < -1:
        raise InputError(
            f"rollout.replay: {where} has the answer_class {answer_class!r}; this stage's method compares answers, and "
            "replays what such a method recorded"
        )
    return None if answer_class == -1 else answer_class


def _response(where: str, text: str, prompt: LabelledPrompt | UnlabelledPrompt) -> tuple[Completion, float]:
    """One line as a completion and its verdict. The verdict of an unlabelled prompt is ignored."""
    try:
        line = json.loads(text)
        recorded, asked = line["prompt_id"], tuple(line["prompt_tokens"])
        tokens, logprobs = line["response_tokens"], line["logprobs"]
        reason, correct = "stop" if line["stopped"] else "length", line["correct"]
        versions = tuple((int(version), int(count)) for version, count in line.get("versions", [[-1, len(tokens)]]))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"rollout.replay: {where} is not a recorded response ({error!r})") from error
    completion = _completion(where, tokens, logprobs, reason, versions)
    if asked != prompt.token_ids:
        raise InputError(
            f"rollout.replay: {where} answers {recorded!r}, this run asks {prompt.id!r}: the data, run.seed or the "
            "stage's counts differ from the recorded run's"
        )
    if not len(tokens) or len(tokens) != len(logprobs):
        raise InputError(f"rollout.replay: {where} has {len(tokens)} response tokens and {len(logprobs)} logprobs")
    if sum(count for _, count in versions) != len(tokens):
        raise InputError(f"rollout.replay: {where} has {len(tokens)} response tokens, its versions others: {versions}")
    if isinstance(prompt, UnlabelledPrompt):
        return completion, 0.0
    if not isinstance(correct, int | float) or not 0 <= correct <= 1:
        raise InputError(f"rollout.replay: {where} has the verdict {correct!r}; a labelled prompt's is from 0.0 to 1.0")
    return completion, float(correct)


def _completion(
    where: str, tokens: object, logprobs: object, reason: str, versions: tuple[tuple[int, int], ...]
) -> Completion:
    try:
        token_ids = token_tensor(tokens)
    except ValueError as error:
        raise InputError(f"rollout.replay: {where} has response_tokens that are no token ids ({error})") from error
    if len(token_ids) and int(token_ids.min()) < 0:
        raise InputError(f"rollout.replay: {where} has response_tokens that are no token ids")
    try:
        return Completion(token_ids, logprob_tensor(logprobs), reason, versions)
    except ValueError as error:
        raise InputError(f"rollout.replay: {where} has logprobs that are no numbers ({error})") from error
