"""Servers' answers as SGLang and vLLM write them, and a server on a real socket whose answers a function determines."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.served import served

Spans = Sequence[tuple[str, int, int]]  # version, first token, token behind the last


@dataclass(frozen=True)
class Said:
    """One response of a server."""

    tokens: Sequence[int]
    logprobs: Sequence[float | None]
    spans: Spans
    reason: str = "stop"
    experts: NDArray[Any] | None = None  # [tokens, layers, k]


def sglang_body(responses: Sequence[Said]) -> list[dict[str, Any]]:
    """The answer of SGLang 0.5.23 to /generate with log-probabilities (srt/managers/tokenizer_manager.py)."""

    def experts(one: Said) -> dict[str, str]:
        """Left out where they are not asked for (srt/state_capturer/routed_experts.py)."""
        return {} if one.experts is None else {"routed_experts": _base64(one.experts.astype(np.int32).tobytes())}

    return [
        {
            "text": "word \u00e9 " * len(one.tokens),
            "output_ids": list(one.tokens),
            "meta_info": {
                "id": "5f3b",
                "finish_reason": {"type": one.reason, "matched": 7},
                "prompt_tokens": 3,
                "weight_version": "9",
                "input_token_logprobs": [[None, 1, None], [-0.5, 2, None]],
                "output_token_logprobs": [[p, t, None] for p, t in zip(one.logprobs, one.tokens, strict=True)],
                "output_token_logprobs_length": len(one.tokens),
                "completion_tokens": len(one.tokens),
                "e2e_latency": 1.25,
                "weight_versions": _spans(one),
                **experts(one),
            },
        }
        for one in responses
    ]


def vllm_body(responses: Sequence[Said]) -> dict[str, Any]:
    """The answer of vLLM 0.32 to /inference/v1/generate (entrypoints/scale_out/token_in_token_out/protocol.py)."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        sampled = {"token_id": token, "logprob": logprob, "rank": 1}
        return {**sampled, "top_logprobs": [sampled]}

    choices = [
        {
            "index": i,
            "finish_reason": one.reason,
            "stop_reason": None,
            "token_ids": list(one.tokens),
            "routed_experts": None
            if one.experts is None
            else _npy(one.experts.astype(np.min_scalar_type(one.experts.max()))),
            "sampling_mask": None,
            "weight_versions": _spans(one),
            "logprobs": {"content": [entry(t, p) for t, p in zip(one.tokens, one.logprobs, strict=True)]},
        }
        for i, one in enumerate(responses)
    ]
    usage = {"prompt_tokens": 3, "completion_tokens": sum(len(one.tokens) for one in responses)}
    return {"request_id": "5f3b", "created": 1, "model": "m", "choices": choices, "usage": usage, "metrics": None}


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _npy(array: NDArray[Any]) -> str:
    """As vLLM's `numpy2base64` (utils/serial_utils.py)."""
    file = io.BytesIO()
    np.save(file, array)
    return _base64(file.getvalue())


def _spans(one: Said) -> list[dict[str, Any]]:
    return [{"version": version, "start": start, "end": end} for version, start, end in one.spans]


BODIES: dict[str, Callable[[Sequence[Said]], Any]] = {"sglang": sglang_body, "vllm": vllm_body}


@dataclass
class Answer:
    """`cut`: the connection is closed after this many bytes of the content."""

    content: bytes
    status: int = 200
    cut: int | None = None


@dataclass
class AnsweringServer:
    """`requests`: path, Authorization header and body of each."""

    url: str = ""
    requests: list[tuple[str, str | None, Any]] = field(default_factory=list)


@contextmanager
def answering(answer: Callable[[str, Any], Answer]) -> Iterator[AnsweringServer]:
    """A server. `answer` gets path and body of each request, in a thread of its own, and may block it."""
    server = AnsweringServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, self.headers["Authorization"], body))
            given = answer(self.path, body)
            self.send_response(given.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(given.content)))
            self.end_headers()
            self.wfile.write(given.content[: given.cut])
            self.close_connection = given.cut is not None

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listener = _Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    with served(listener):
        yield server


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that is gone is no error here."""
