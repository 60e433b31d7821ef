"""A stand-in for a vLLM server that sleeps: it has vLLM's states, and says what a GPU would have punished.

`python` is a program that is given as `rollout.servers.python`. It starts in a tenth of a second and answers with
made-up tokens. The states are those of vLLM 0.32 (`v1/executor/abstract.py`, `v1/engine/core.py`): tests/engines
compares them with the real ones. Beyond these, its memory is lost in a level-2 sleep, as on a GPU, and a call that
would read or write memory that is not there is noted as a `fault` in the journal.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

TAGS = ("weights", "kv_cache")


def python(folder: Path) -> Path:
    """A program that takes the place of the interpreter of vLLM's environment."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {Path(__file__).resolve()} "$@"\n')
    program.chmod(0o700)
    return program


def journal(folder: Path) -> list[dict[str, Any]]:
    """What happened to all servers whose `--journal` is in this folder, in the order of time."""
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["time"])


class Refused(Exception):
    """A call that the server answers with 500."""


class Engine:
    """The state of a server."""

    def __init__(self, folder: Path, number: int, troubles: list[str]) -> None:
        """`troubles`: `NAME@SERVER:N`, the N-th call at which a server has trouble in its first life; with `!`, also in
        later ones, from the first call on.

        `sleep`: refuses. `gone`: ends once it has fallen asleep. `wake`: has no memory
        for the KV cache. `load`: refuses a bucket. `crash`: ends instead of an answer to generate.
        """
        self.folder, self.number, self.lock = folder, number, Lock()
        self.sleeping: set[str] = set()
        self.paused, self.updating, self.version = False, False, "default"
        self.memory = {"weights": "dummy", "kv_cache": "clean"}
        again = (folder / f"born_{number}").exists()
        (folder / f"born_{number}").touch()
        self.ends = False  # once the call is answered
        self.left: dict[str, int] = {}  # calls before each trouble
        for one in troubles:
            (name, server), (count, *_) = one.split(":")[0].split("@"), one.split(":")[1].split("!")
            if int(server) == number and (one.endswith("!") or not again):
                self.left[name] = 1 if again else int(count)
        self.note("born")

    def trouble(self, name: str) -> bool:
        """Whether this call of a kind has its trouble. From then on all have."""
        self.left[name] = self.left.get(name, 1_000_000) - 1
        return self.left[name] < 1

    def note(self, what: str, **more: Any) -> None:
        line = {"time": time.time(), "server": self.number, "what": what, **more}
        with (self.folder / f"{self.number}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def fault(self, why: str) -> None:
        self.note("fault", why=why)
        raise Refused(why)

    # Calls

    def sleep(self, level: int) -> dict[str, Any]:
        if self.trouble("sleep"):
            raise Refused("memory usage increased after sleeping")
        self.paused = True
        if "weights" not in self.sleeping:
            self.sleeping |= set(TAGS)
            if level == 2:
                self.memory["weights"] = "lost"
            self.memory["kv_cache"] = "clean"
        self.ends = self.trouble("gone")
        return {"status": "sleeping", "level": level}

    def wake_up(self, tags: list[str]) -> dict[str, Any]:
        if "kv_cache" in tags and self.trouble("wake"):
            raise Refused("CUDA Error: out of memory at cumem_allocator.cpp:62")
        if all(tag in self.sleeping for tag in tags):
            self.sleeping -= set(tags)
            if "weights" in tags and self.memory["weights"] != "lost":
                self.note("backup")
        if not self.sleeping:
            self.paused = False
        return {"status": "sleeping" if self.sleeping else "awake", "tags": tags}

    def start_weight_update(self) -> dict[str, Any]:
        if self.updating:
            raise Refused("start_weight_update called while a weight update is already active")
        if "weights" in self.sleeping:
            self.fault("an update of weights that are asleep")
        self.updating, self.memory["weights"] = True, "partial"
        return {}

    def update_weights(self, info: dict[str, Any]) -> dict[str, Any]:
        if not self.updating or "weights" in self.sleeping:
            self.fault("weights arrive without an update, or asleep")
        if self.trouble("load"):
            raise Refused("CUDA error: an illegal memory access was encountered")
        _, name, size = info["shared"]
        seen = os.stat(f"/dev/shm{name}").st_size
        if seen < size:
            self.fault(f"{name} has {seen} bytes of {size}")
        self.note("memory", sender=int(name.split("_")[1]))  # torch names it by the process that made it
        return {}

    def finish_weight_update(self, version: str) -> dict[str, Any]:
        if not self.updating:
            raise Refused("no update")
        self.updating, self.version, self.memory["weights"] = False, version, f"version {version}"
        return {}

    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.sleeping or not self.memory["weights"].startswith("version"):
            self.fault(f"generation with {self.memory['weights']} weights; asleep: {sorted(self.sleeping)}")
        if self.trouble("crash"):
            os._exit(1)
        settings = body["sampling_params"]
        count = min(3, settings["max_tokens"])
        span = [{"version": self.version, "start": 0, "end": count}]
        content = [{"logprob": -0.5}] * count
        row = {"token_ids": [5] * count, "logprobs": {"content": content}, "finish_reason": "stop"}
        return {"choices": [{**row, "weight_versions": span} for _ in range(settings["n"])]}


class Handler(BaseHTTPRequestHandler):
    """vLLM's paths."""

    protocol_version = "HTTP/1.1"
    engine: Engine
    key: str

    def do_GET(self) -> None:
        self._answer({"is_sleeping": self.engine.paused} if self.path == "/is_sleeping" else {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        where, query = urlsplit(self.path), parse_qs(urlsplit(self.path).query)
        with self.engine.lock:
            self.engine.note(where.path, query=where.query)
            try:
                answer = self._call(where.path, query, body)
            except Refused as error:
                self._answer({"error": {"message": str(error)}}, 500)
                return
        self._answer(answer)
        if self.engine.ends:
            os._exit(1)

    def _call(self, path: str, query: dict[str, list[str]], body: dict[str, Any]) -> dict[str, Any]:
        engine = self.engine
        if path == "/sleep":
            return engine.sleep(int(query["level"][0]))
        if path == "/wake_up":
            return engine.wake_up(query["tags"])
        if path in ("/pause", "/resume"):
            engine.paused = path == "/pause"
        if path == "/start_weight_update":
            return engine.start_weight_update()
        if path == "/update_weights":
            return engine.update_weights(body["update_info"])
        if path == "/finish_weight_update":
            return engine.finish_weight_update(body["weight_version"])
        if path == "/inference/v1/generate":
            return engine.generate(body)
        return {}

    def _answer(self, answer: dict[str, Any], status: int = 200) -> None:
        known = self.headers.get("authorization") == f"Bearer {self.key}"
        content = json.dumps(answer).encode() if known else b"{}"
        self.send_response(status if known else 401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing on the console."""


class Server(ThreadingHTTPServer):
    # With the default of 5, the kernel drops some of many connections, and a fleet on a busy machine gives up.
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--model")
    parser.add_argument("--journal", type=Path)
    parser.add_argument("--troubles", default="")
    given, _ = parser.parse_known_args()
    Handler.key = Path(os.environ["MEGATRON_TEMPO_KEY"]).read_text().strip()
    number = int(Path(given.model).parent.name)
    Handler.engine = Engine(given.journal, number, [one for one in given.troubles.split(",") if one])
    Server((given.host, given.port), Handler).serve_forever()


if __name__ == "__main__":
    main()
