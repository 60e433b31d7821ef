"""Requests whose responses have begun, and what they and their continuations are together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_tempo.rollout.engine import Request
from megatron_tempo.rollout.experts import continued, first_unread
from megatron_tempo.rollout.replica import Ask
from megatron_tempo.types import UNFINISHED, Completion, seed_of


def is_unfinished(completions: Sequence[Completion]) -> bool:
    """Whether one of the responses is to continue."""
    return any(one.finish_reason == UNFINISHED for one in completions)


def parts_of(ask: Ask) -> list[Ask]:
    """What a server is asked: the request, or for each unfinished response one whose prompt has its tokens too."""
    request, sampling = ask.request, ask.sampling
    if not request.begun:
        return [ask]
    parts = []
    for sample, one in enumerate(request.begun):
        if one.finish_reason == UNFINISHED:
            tokens = one.token_ids.tolist()
            # A seed of its own: neither another sample's, nor that of the tokens so far.
            rest = Request(
                (*request.token_ids, *tokens),
                1,
                seed_of(request.seed, sample, len(tokens)),
                experts_from=first_unread(len(request.token_ids), one),
            )
            left = replace(sampling, max_tokens=sampling.max_tokens - len(tokens))
            parts.append(replace(ask, request=rest, sampling=left))
    return parts


def joined(request: Request, answers: Sequence[Sequence[Completion]]) -> list[Completion]:
    """The responses to a request, given the answers to its parts."""
    if not request.begun:
        return list(answers[0])
    more = iter(answers)
    prompt = len(request.token_ids)
    return [_longer(prompt, one, next(more)[0]) if one.finish_reason == UNFINISHED else one for one in request.begun]


def grown(begun: Completion | None, version: int, tokens: int) -> tuple[tuple[int, int], ...]:
    """The versions of a response that has `tokens` tokens now, the new ones by `version`."""
    before = () if begun is None else begun.versions
    return _runs(before, ((version, tokens - sum(count for _, count in before)),))


def _longer(prompt: int, begun: Completion, more: Completion) -> Completion:
    return Completion(
        torch.cat([begun.token_ids, more.token_ids]),
        torch.cat([begun.logprobs, more.logprobs]),
        more.finish_reason,
        _runs(begun.versions, more.versions),
        continued(prompt, begun, more.experts),
    )


def _runs(first: Sequence[tuple[int, int]], second: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Both, one after the other, without empty runs and with neighbours of one version joined."""
    runs: list[tuple[int, int]] = []
    for version, tokens in [*first, *second]:
        if runs and runs[-1][0] == version:
            runs[-1] = (version, runs[-1][1] + tokens)
        elif tokens:
            runs.append((version, tokens))
    return tuple(runs)
