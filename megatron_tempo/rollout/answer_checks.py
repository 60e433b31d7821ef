"""Checks of servers' answers: status, form and content of responses, checksums of weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import httpx
import numpy as np
import torch
from torch import Tensor

from megatron_tempo.config.routing import RoutingFormat
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.answer_reader import CannotAnswer, RawAnswers, refusal
from megatron_tempo.rollout.experts import DTYPES
from megatron_tempo.rollout.replica import Ask
from megatron_tempo.rollout.server_adapter import Call
from megatron_tempo.types import UNFINISHED, Completion

# Nats: a token this unlikely is never sampled. vLLM returns -9999 instead of NaN.
_LEAST = -1000.0


def checked(response: httpx.Response, call: Call) -> httpx.Response:
    """The response of a successful call. Raises EngineError for any other."""
    if response.status_code != 200:
        raise refusal(response.status_code, call.path, response.text)
    if response.headers.get("content-type", "").startswith("application/json"):
        body = response.json() if len(response.content) < 10_000 else None
        if isinstance(body, dict) and body.get("success") is False:
            raise EngineError(f"refused {call.path}: {body.get('message')}")
        if call.expects and not (isinstance(body, dict) and call.expects.items() <= body.items()):
            raise EngineError(f"answered {call.path} with {body}, not with {call.expects}")
    elif call.expects:
        raise EngineError(f"answered {call.path} without JSON, not with {call.expects}")
    return response


def differing(expected: dict[str, tuple[str, float]], held: dict[str, tuple[str, float]]) -> list[tuple[str, float]]:
    """Names whose checksums differ, or that only one side has, the worst first, with the relative difference in size.

    The difference is NaN if only the checksums are known, infinite if a tensor is missing; those come first.
    """
    differences = []
    for name in expected.keys() | held.keys():
        ours, theirs = expected.get(name), held.get(name)
        if ours is None or theirs is None:
            differences.append((name, math.inf))
        elif ours[0] != theirs[0]:
            differences.append((name, abs(ours[1] - theirs[1]) / max(ours[1], 1e-30)))
    return sorted(differences, key=lambda item: (-item[1] if not math.isnan(item[1]) else 0.0, item[0]))


def reason(error: Exception) -> str:
    if isinstance(error, EngineError):
        return str(error)
    return f"did not answer: {type(error).__name__} {error}".rstrip()


def checked_completions(
    answers: RawAnswers, ask: Ask, vocab: int, newest: int, routing: RoutingFormat | None = None
) -> list[Completion]:
    """The completions of an answer, as views of its arrays. An invalid response would be trained on unnoticed.

    `newest` is the version of the latest weights. `routing`: of the experts that servers return. Raises EngineError.
    """
    if len(answers.rows) != ask.request.samples:
        raise EngineError(f"gave {len(answers.rows)} responses where {ask.request.samples} were asked for")
    tokens = torch.from_numpy(answers.tokens).split([row.tokens for row in answers.rows])
    logprobs = torch.from_numpy(answers.logprobs).split([row.logprobs for row in answers.rows])
    reasons = {"abort": UNFINISHED} if ask.job.is_paused else {}
    experts: Sequence[Tensor | None] = [None] * len(answers.rows)
    if routing is not None and ask.sampling.with_experts:
        experts = _experts(answers, routing)
    completions = [
        Completion(tokens[i], logprobs[i], reasons.get(row.reason, row.reason), tuple(row.versions), experts[i])
        for i, row in enumerate(answers.rows)
    ]
    versions = range(ask.oldest, newest + 1)
    for completion in completions:
        if wrong := doubts(completion, ask.sampling.max_tokens, vocab, versions, paused=ask.job.is_paused):
            raise EngineError(f"gave a response that makes no sense: {'; '.join(wrong)}")
        if routing is not None and ask.sampling.with_experts:
            _check_experts(completion, ask)
    np.minimum(answers.logprobs, 0.0, out=answers.logprobs)  # as `without_rounding`
    return completions


def _experts(answers: RawAnswers, routing: RoutingFormat) -> list[Tensor | None]:
    """The experts of each response, as views of the answer's array; None where there are none."""
    tokens = len(answers.experts) // routing.bytes_per_token
    flat = torch.from_numpy(answers.experts).view(DTYPES[routing.itemsize])
    flat = flat.view(tokens, routing.layers, routing.per_token)
    parts = iter(flat.split([row.routed for row in answers.rows if row.routed is not None]))
    return [None if row.routed is None else next(parts) for row in answers.rows]


def _check_experts(completion: Completion, ask: Ask) -> None:
    """Raise CannotAnswer if a server returns no experts, and EngineError if it returns those of other tokens.

    What has no forward pass before it is interrupted has none.
    """
    if completion.experts is None:
        if completion.finish_reason == UNFINISHED:
            return
        raise CannotAnswer(
            "a server did not return the experts that its routers chose; if you start it yourself, give it "
            "--enable-return-routed-experts, or set model.router_replay=off"
        )
    wanted = len(ask.request.token_ids) + len(completion.token_ids) - 1 - ask.request.experts_from
    found = len(completion.experts)
    if found != wanted and (completion.finish_reason != UNFINISHED or found > wanted + 1):
        raise EngineError(f"gave a response that makes no sense: experts of {found} tokens, not of {wanted}")


def without_rounding(completion: Completion) -> Completion:
    """The completion with log-probabilities clipped to at most 0: rounding can lift that of a certain token above 0."""
    return replace(completion, logprobs=completion.logprobs.clamp(max=0.0))


def doubts(completion: Completion, longest: int, vocab: int, versions: range, *, paused: bool = False) -> list[str]:
    """What is invalid in a response of at most `longest` tokens by weights of these `versions`.

    `paused`: whether it may be unfinished. Then it may have no token yet.
    """
    unfinished = paused and completion.finish_reason == UNFINISHED
    tokens, logprobs, spans = completion.token_ids.numpy(), completion.logprobs.numpy(), list(completion.versions)
    checks = [
        (completion.finish_reason not in ("stop", "length") and not unfinished, f"ended by {completion.finish_reason}"),
        (not (0 if unfinished else 1) <= len(tokens) <= longest, f"{len(tokens)} tokens of at most {longest}"),
        (len(logprobs) != len(tokens), f"{len(logprobs)} log-probabilities of {len(tokens)} tokens"),
        (len(tokens) > 0 and not 0 <= tokens.min() <= tokens.max() < vocab, "a token out of the vocabulary"),
        # The extremes of an array with a NaN are NaN, which is in no range.
        (len(logprobs) > 0 and not _LEAST < logprobs.min() <= logprobs.max() < 1e-3, "a log-probability that is none"),
        (
            any(version not in versions for version, _ in spans),
            f"weights of version {spans}, not {versions.start} to {versions.stop - 1}",
        ),
        (sum(count for _, count in spans) != len(tokens), f"versions {spans} of {len(tokens)} tokens"),
    ]
    return [words for is_wrong, words in checks if is_wrong]
