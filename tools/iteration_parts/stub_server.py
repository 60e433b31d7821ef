"""A server that speaks SGLang's protocol and answers with made-up tokens at once: sockets and JSON are real."""

from __future__ import annotations

import json
import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any

from iteration_parts.made import ANSWER, END, KEY, LOGPROB, MATH, VOCAB, WORDS
from megatron_tempo.rehearsal.lengths import Lengths
from megatron_tempo.types import seed_of

_FRAGMENTS, _TOKENS = 256, 64  # answers are put together from fragments of this many tokens
_WORDS_FROM = len(MATH) + 2
_NEVER = ("\\boxed{",)  # in the body of a response
# Ends of responses: the answer, another one, and the answer in a form that a verifier has to compute.
_FORMS = ([str(ANSWER)], [str(ANSWER - 1)], ["\\frac{", str(2 * ANSWER), "}{", "2", "}"])
_ENDINGS = [[WORDS.index(word) for word in ("\\boxed{", *form, "}", END)] for form in _FORMS]


def serve(mean: float, address: Connection) -> None:
    """Send the port, then serve until the process is killed. `mean`: tokens of a response before the cut-off."""
    server = _Server(("127.0.0.1", 0), _Handler)
    _Handler.answers = Answers(mean)
    address.send(server.server_address[1])
    server.serve_forever()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """A client closed its connection, which is how they end."""


class Answers:
    """Made-up answers. The same prompt gets the same answers."""

    def __init__(self, mean: float) -> None:
        self.version = "0"
        self._lengths = Lengths(mean)
        drawn = random.Random(0)
        self._pieces = [self._encoded([_token(drawn) for _ in range(_TOKENS)], drawn) for _ in range(_FRAGMENTS)]

    def generate(self, body: dict[str, Any]) -> bytes:
        """The answer to /generate, as SGLang 0.5.23 writes it."""
        samples, longest = body["sampling_params"]["n"], body["sampling_params"]["max_new_tokens"]
        seed = seed_of(*body["input_ids"][0])
        drawn = random.Random(seed)
        lengths = self._lengths.draw(samples, longest, seed)
        return f"[{','.join(self._one(length, longest, drawn) for length in lengths)}]".encode()

    def _one(self, length: int, longest: int, drawn: random.Random) -> str:
        ending = _ENDINGS[drawn.randrange(len(_ENDINGS))]
        stopped = len(ending) <= length < longest
        body = length - (len(ending) if stopped else 0)
        whole, rest = divmod(body, _TOKENS)
        parts = [self._pieces[drawn.randrange(_FRAGMENTS)] for _ in range(whole)]
        last = [_token(drawn) for _ in range(rest)] + (ending if stopped else [])
        parts += [self._encoded(last, drawn)] if last else []
        ids, entries = (",".join(part[kind] for part in parts) for kind in range(2))
        reason = '"stop","matched":0' if stopped else f'"length","length":{longest}'
        versions = f'[{{"version":"{self.version}","start":0,"end":{length}}}]'
        return (
            f'{{"text":"","output_ids":[{ids}],"meta_info":{{"finish_reason":{{"type":{reason}}},'
            f'"output_token_logprobs":[{entries}],"completion_tokens":{length},"weight_versions":{versions}}}}}'
        )

    @staticmethod
    def _encoded(tokens: list[int], drawn: random.Random) -> tuple[str, str]:
        """Token ids and log-probabilities as the items of JSON lists."""
        ids = ",".join(map(str, tokens))
        return ids, ",".join(f"[{LOGPROB + drawn.uniform(-1e-3, 1e-3):.17g},{token},null]" for token in tokens)


def _token(drawn: random.Random) -> int:
    """A word, or every sixth time a piece of a formula."""
    if drawn.randrange(6):
        return drawn.randrange(_WORDS_FROM, VOCAB)
    token = 2 + drawn.randrange(len(MATH))
    return token if WORDS[token] not in _NEVER else _WORDS_FROM


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answers: Answers

    def do_GET(self) -> None:
        self._reply(b"{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers["authorization"] != f"Bearer {KEY}":
            self.send_error(401)
            return
        if "weight_version" in body:
            self.answers.version = body["weight_version"]
        self._reply(self.answers.generate(body) if self.path == "/generate" else b'{"success": true}')

    def _reply(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
