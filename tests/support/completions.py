"""Completions from plain numbers, and as plain numbers to compare."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_tempo.types import Batch, Completion, LabelledPrompt, UnlabelledPrompt

Plain = tuple[tuple[int, ...], tuple[float, ...], str, tuple[tuple[int, int], ...]]


def completion(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    reason: str = "stop",
    versions: tuple[tuple[int, int], ...] | None = None,
) -> Completion:
    """`versions`: if not given, all tokens are of version 0."""
    versions = ((0, len(tokens)),) if versions is None else versions
    floats = torch.tensor(logprobs, dtype=torch.float32)
    return Completion(torch.tensor(tokens, dtype=torch.int32), floats, reason, versions)


def plain(one: Completion) -> Plain:
    """All that a completion holds, in values that compare with `==`. Asserts the types of its tensors."""
    assert (one.token_ids.dtype, one.token_ids.ndim) == (torch.int32, 1)
    assert (one.logprobs.dtype, one.logprobs.ndim) == (torch.float32, 1)
    return tuple(one.token_ids.tolist()), tuple(one.logprobs.tolist()), one.finish_reason, one.versions


def plains(rows: Sequence[Sequence[Completion]]) -> list[list[Plain]]:
    return [[plain(one) for one in row] for row in rows]


def batch_of(
    prompts: Sequence[LabelledPrompt | UnlabelledPrompt],
    completions: Sequence[Sequence[Completion]],
    verdicts: Sequence[Sequence[float]] | None,
    classes: Sequence[Sequence[int | None]] | None = None,
) -> Batch:
    """The completions as a batch of rows, prompt after prompt, all of which are held."""
    rows = [(i, prompt, answer) for i, prompt in enumerate(prompts) for answer in completions[i]]
    runs = [(row, *run) for row, (_, _, answer) in enumerate(rows) for run in answer.versions]
    return Batch(
        prompt_ids=tuple(prompt.id for _, prompt, _ in rows),
        group=torch.tensor([i for i, _, _ in rows], dtype=torch.int64),
        prompt_tokens=torch.tensor([token for _, prompt, _ in rows for token in prompt.token_ids], dtype=torch.int32),
        prompt_lengths=torch.tensor([len(prompt.token_ids) for _, prompt, _ in rows], dtype=torch.int64),
        response_tokens=torch.cat([torch.empty(0, dtype=torch.int32), *(answer.token_ids for _, _, answer in rows)]),
        response_lengths=torch.tensor([len(answer.token_ids) for _, _, answer in rows], dtype=torch.int64),
        engine_logprobs=torch.cat([torch.empty(0), *(answer.logprobs for _, _, answer in rows)]),
        stopped=torch.tensor([answer.finish_reason == "stop" for _, _, answer in rows], dtype=torch.bool),
        versions=torch.tensor(runs, dtype=torch.int64).view(-1, 3),
        correct=None if verdicts is None else torch.tensor([v for row in verdicts for v in row]),
        answer_class=None
        if classes is None
        else torch.tensor([-1 if c is None else c for row in classes for c in row], dtype=torch.int64),
    )
