"""A fake judge: an HTTP server on a real socket. A function determines its chat completions."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.served import served


@dataclass(frozen=True)
class Reply:
    """The judge's reply: a text, or a status with its own body."""

    text: str | None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None


@dataclass
class Judge:
    """The server. `asked`: the body of every request. `keys`: the Authorization header of every request."""

    answer: Callable[[Judge, dict[str, Any]], Reply]
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    busy: int = 0
    busiest: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def quoted(body: dict[str, Any]) -> dict[str, str]:
    """The nonce of a request, and the texts between the lines with the nonce, as a correct judge reads them."""
    prompt = body["messages"][1]["content"]
    nonce = re.findall(r"^BEGIN QUESTION ([0-9a-f]{32})$", prompt, re.MULTILINE)[0]
    parts = {"nonce": nonce}
    for name in ("QUESTION", "REFERENCE ANSWER", "RESPONSE"):
        (parts[name],) = re.findall(
            f"^BEGIN {name} {nonce}\n(.*?)\nEND {name} {nonce}$", prompt, re.DOTALL | re.MULTILINE
        )
    return parts


def honest(judge: Judge, body: dict[str, Any]) -> Reply:
    """Answers "right" if the last word of the response is the reference answer."""
    parts = quoted(body)
    right = parts["RESPONSE"].split()[-1:] == [parts["REFERENCE ANSWER"]]
    return verdict(parts["nonce"], "right" if right else "wrong")


def verdict(nonce: str, word: str) -> Reply:
    return Reply(json.dumps({"nonce": nonce, "verdict": word}))


class Server(ThreadingHTTPServer):
    # With the default of 5 waiting connections, more are reset if this process is slow to accept them.
    request_queue_size = 256
    daemon_threads = True


@contextmanager
def judge_server(answer: Callable[[Judge, dict[str, Any]], Reply] = honest) -> Iterator[Judge]:
    judge = Judge(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.asked.append(body)
                judge.keys.append(self.headers["Authorization"])
                judge.busy += 1
                judge.busiest = max(judge.busiest, judge.busy)
            try:
                assert self.path == "/v1/chat/completions"
                reply = judge.answer(judge, body)
            finally:
                with judge.lock:
                    judge.busy -= 1
            content = reply.body
            if content is None:
                content = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply.text}}]}).encode()
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = Server(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    with served(server):
        yield judge
