"""The forms of servers' answers, and how they become flat arrays. No torch: `answer_worker.py` runs this.

msgspec makes objects of the named fields alone and skips all others: a token costs 0.12 us (SGLang) and 0.16 us (vLLM)
of a processor, where orjson takes 0.35 and 1.8 us, and Python's json 0.5 and 2.4 us. The classes below have `gc=False`:
the collector of cyclic garbage need not look at millions of objects that cannot form cycles.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
from msgspec import Struct

from megatron_tempo.rollout.answer_experts import RoutingForm, from_npy, from_sglang

_MOST = 2**31  # above all versions and numbers of tokens


class AnswerRow(Struct, array_like=True, gc=False):
    """One response of a server: how many of the flat tokens and log-probabilities are its own, in order."""

    tokens: int
    logprobs: int
    reason: str
    versions: list[tuple[int, int]]  # (version, number of tokens)
    routed: int | None = None  # tokens whose experts were returned; None: the answer has no such field


@dataclass(slots=True)
class FlatAnswers:
    """The responses to one request, unchecked but for their form."""

    rows: list[AnswerRow] = field(default_factory=list)
    tokens: array[int] = field(default_factory=lambda: array("i"))  # of all rows
    logprobs: array[float] = field(default_factory=lambda: array("f"))
    experts: list[bytes] = field(default_factory=list)  # of all rows, as `config.routing` stores them

    def add(
        self,
        token_ids: list[int],
        logprobs: list[float],
        reason: str,
        spans: Iterable[_Span],
        experts: tuple[int, bytes] | None = None,
    ) -> None:
        """Append a response. `experts`: of how many tokens, and which. Raises ValueError if numbers fit no response."""
        try:
            self.tokens.fromlist(token_ids)
        except OverflowError:
            raise ValueError("a token out of the vocabulary") from None
        self.logprobs.fromlist(logprobs)
        versions = [_run(span) for span in spans if span.end != span.start]
        routed = None
        if experts is not None:
            routed = experts[0]
            self.experts.append(experts[1])
        self.rows.append(AnswerRow(len(token_ids), len(logprobs), reason, versions, routed))


class _Span(Struct, gc=False):
    version: str | int
    start: int
    end: int


def _run(span: _Span) -> tuple[int, int]:
    version, tokens = str(span.version), span.end - span.start
    if not (version.isascii() and version.isdecimal() and len(version) < 11 and int(version) < _MOST):
        raise ValueError(f"weights of version {version[:40]!r}")
    if not 0 < tokens < _MOST:
        raise ValueError(f"{str(tokens)[:40]} tokens of version {version}")
    return int(version), tokens


# SGLang 0.5.23: a list of responses. A token's entry is [log-probability, token, text].


class _SglangEntry(Struct, array_like=True, gc=False):
    logprob: float


class _SglangReason(Struct, gc=False):
    type: str


class _SglangMeta(Struct, gc=False):
    output_token_logprobs: list[_SglangEntry]
    finish_reason: _SglangReason
    weight_versions: list[_Span]
    routed_experts: bytes | None = None


class _SglangResponse(Struct, gc=False):
    output_ids: list[int]
    meta_info: _SglangMeta


_SGLANG = msgspec.json.Decoder(list[_SglangResponse])


def sglang_answers(body: bytes | bytearray, routing: RoutingForm | None = None) -> FlatAnswers:
    answers = FlatAnswers()
    for one in _SGLANG.decode(body):
        meta = one.meta_info
        logprobs = [entry.logprob for entry in meta.output_token_logprobs]
        experts = None
        if routing is not None and meta.routed_experts is not None:
            experts = from_sglang(meta.routed_experts, routing)
        answers.add(one.output_ids, logprobs, meta.finish_reason.type, meta.weight_versions, experts)
    return answers


# vLLM 0.32.


class _VllmEntry(Struct, gc=False):
    logprob: float


class _VllmLogprobs(Struct, gc=False):
    content: list[_VllmEntry]


class _VllmChoice(Struct, gc=False):
    token_ids: list[int]
    logprobs: _VllmLogprobs
    finish_reason: str
    weight_versions: list[_Span]
    routed_experts: bytes | None = None


class _VllmResponse(Struct, gc=False):
    choices: list[_VllmChoice]


_VLLM = msgspec.json.Decoder(_VllmResponse)


def vllm_answers(body: bytes | bytearray, routing: RoutingForm | None = None) -> FlatAnswers:
    answers = FlatAnswers()
    for one in _VLLM.decode(body).choices:
        logprobs = [entry.logprob for entry in one.logprobs.content]
        experts = None
        if routing is not None and one.routed_experts is not None:
            experts = from_npy(one.routed_experts, routing)
        answers.add(one.token_ids, logprobs, one.finish_reason, one.weight_versions, experts)
    return answers


class Parse(Protocol):
    def __call__(self, body: bytes | bytearray, routing: RoutingForm | None = None) -> FlatAnswers:
        """The responses of an answer. `routing`: the form of the experts that are read; None: they are skipped.

        Raises ValueError or msgspec.MsgspecError.
        """
        ...


# By `ServerAdapter.answer_format`.
ANSWER_FORMATS: dict[str, Parse] = {
    "sglang": sglang_answers,
    "vllm": vllm_answers,
}


class _Refusal(Struct, gc=False):
    success: bool
    message: str | None = None


def refusal_in(body: bytes | bytearray) -> str | None:
    """The message of a short answer {"success": false, "message": ...}; None for any other answer."""
    try:
        refusal = msgspec.json.decode(body, type=_Refusal) if len(body) < 10_000 else None
    except msgspec.MsgspecError:
        return None
    return None if refusal is None or refusal.success else str(refusal.message)


class _Error(Struct, gc=False):
    type: str


class _Unavailable(Struct, gc=False):
    error: _Error


# vLLM 0.33: a request that came while generation is paused, or that failed without harm to the server; a full queue.
# Its code "engine_paused" stays inside the server (vllm/entrypoints/serve/exception_handling/error_response.py).
_TO_RETRY = ("ServiceUnavailableError", "Service Unavailable")


def is_unavailable(text: str) -> bool:
    """Whether an answer with status 503 asks to try later, as vLLM 0.33 says it; others mean a faulty server."""
    try:
        return msgspec.json.decode(text, type=_Unavailable).error.type in _TO_RETRY
    except msgspec.MsgspecError:
        return False
