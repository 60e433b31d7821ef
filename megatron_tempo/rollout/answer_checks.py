"""Checks of servers' answers: status, form and content of responses, checksums of weights."""

from __future__ import annotations

import math
from dataclasses import replace

import httpx

from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.arrays import logprob_tensor, run_tuples, token_tensor
from megatron_tempo.rollout.replica import Ask
from megatron_tempo.rollout.server_adapter import Answer, Call, ServerAdapter
from megatron_tempo.types import Completion

# Nats: a token this unlikely is never sampled. vLLM returns -9999 instead of NaN.
_LEAST = -1000.0


class CannotAnswer(EngineError):
    """A request that no server would answer."""


def checked(response: httpx.Response, call: Call) -> httpx.Response:
    """The response of a successful call. Raises EngineError for any other."""
    if response.status_code != 200:
        kind = CannotAnswer if response.status_code in (400, 413, 422) else EngineError
        raise kind(f"answered {call.path} with {response.status_code}: {response.text[:500]}")
    if response.headers.get("content-type", "").startswith("application/json"):
        body = response.json() if len(response.content) < 10_000 else None
        if isinstance(body, dict) and body.get("success") is False:
            raise EngineError(f"refused {call.path}: {body.get('message')}")
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
    response: httpx.Response, ask: Ask, adapter: ServerAdapter, vocab: int, newest: int
) -> list[Completion]:
    """The completions of a response. They are checked first: an invalid response would be trained on unnoticed.

    `newest` is the version of the latest weights. Raises EngineError.
    """
    try:
        answers = [_completion(answer, ask, vocab, newest) for answer in adapter.answers(response.json())]
    except (ValueError, LookupError, TypeError) as error:  # of another form, or null instead of a number
        raise EngineError(f"gave a response that makes no sense: {error!r}") from error
    if len(answers) != ask.request.samples:
        raise EngineError(f"gave {len(answers)} responses where {ask.request.samples} were asked for")
    return answers


def _completion(answer: Answer, ask: Ask, vocab: int, newest: int) -> Completion:
    versions = run_tuples([(int(version), count) for version, count in answer.versions if count])
    completion = Completion(token_tensor(answer.token_ids), logprob_tensor(answer.logprobs), answer.reason, versions)
    if wrong := doubts(completion, ask.sampling.max_tokens, vocab, range(ask.job.oldest, newest + 1)):
        raise EngineError(f"gave a response that makes no sense: {'; '.join(wrong)}")
    return without_rounding(completion)


def without_rounding(completion: Completion) -> Completion:
    """The completion with log-probabilities clipped to at most 0: rounding can lift that of a certain token above 0."""
    return replace(completion, logprobs=completion.logprobs.clamp(max=0.0))


def doubts(completion: Completion, longest: int, vocab: int, versions: range) -> list[str]:
    """What is invalid in a response of at most `longest` tokens by weights of these `versions`."""
    tokens, logprobs, spans = completion.token_ids.numpy(), completion.logprobs.numpy(), list(completion.versions)
    checks = [
        (completion.finish_reason not in ("stop", "length"), f"ended by {completion.finish_reason}"),
        (not 1 <= len(tokens) <= longest, f"{len(tokens)} tokens of at most {longest}"),
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
