"""Servers on a node of their own: found by the folder, started again where they were, given up in the end."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from megatron_tempo.config.choices import EngineKind
from megatron_tempo.config.schema import Config
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rollout import serve
from megatron_tempo.rollout.engine_versions import EngineVersions
from megatron_tempo.rollout.server import Server
from megatron_tempo.rollout.server_adapter import Call, Launch, Start


class Files:
    """Stands for an engine: Python's own web server, whose folder holds a file `health`."""

    name = "Files"
    versions = EngineVersions("Files", ("files",), ("1",), "1")
    asks_for_version = Call("/version")
    health = Call("/health")

    def launch(self, start: Start) -> Launch:
        (start.folder / "health").write_text(start.key)
        where = ["--bind", start.host, "--directory", str(start.folder)]
        return Launch(["-m", "http.server", str(start.port), *where])


class Ended(Exception):
    """Stands for the end of the job."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "key").write_text("secret\n")
    return tmp_path


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.model.path, config.rollout.engine = str(tmp_path), EngineKind.vllm
    config.rollout.servers.replicas, config.rollout.servers.restarts = 2, 1
    config.rollout.servers.start_seconds = 20
    return config


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    """The servers in the order of their starts."""
    servers: list[Server] = []

    def note(*arguments: object) -> Server:
        servers.append(Server(*arguments))  # type: ignore[arg-type]
        return servers[-1]

    monkeypatch.setattr(serve, "Server", note)
    monkeypatch.setattr(serve, "server_adapter_of", lambda config, cpu: Files())
    yield servers
    for server in servers:
        server.close()


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").text == "secret"
    except httpx.HTTPError:
        return False


def test_a_server_that_ends_comes_back_where_it_was(
    config: Config, folder: Path, started: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    over = threading.Event()

    def sleep(seconds: float) -> None:
        time.sleep(0.02)
        if over.is_set():
            raise Ended

    monkeypatch.setattr(serve, "time", SimpleNamespace(sleep=sleep))
    errors: list[BaseException] = []

    def run() -> None:
        try:
            serve.serve(config, folder)
        except Ended as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    host = socket.gethostname()
    files = [folder / f"addresses/{host}-{i}" for i in range(2)]
    until(lambda: all(file.exists() for file in files))
    first, second = (file.read_text().strip() for file in files)
    assert first != second
    assert healthy(first)
    assert healthy(second)
    os.killpg(started[0].process.pid, signal.SIGKILL)
    until(lambda: len(started) == 3 and healthy(first))
    assert started[2].url == first
    # Its one restart is used up: another end is for good, and the other server stays.
    os.killpg(started[2].process.pid, signal.SIGKILL)
    until(lambda: not healthy(first))
    time.sleep(0.5)
    assert len(started) == 3
    assert healthy(second)
    over.set()
    thread.join(10)
    assert len(errors) == 1
    assert started[1].process.poll() is not None, "they end with the job"
    assert sorted(path.name for path in (folder / "addresses").iterdir()) == [f"{host}-0", f"{host}-1"]


def test_a_server_that_does_not_start_is_told_of(
    config: Config, folder: Path, started: list[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Files, "launch", lambda self, start: Launch(["-c", "raise SystemExit('no GPU here')"]))
    with pytest.raises(EngineError, match=r"Files ended with exit code 1(.|\n)*no GPU here"):
        serve.serve(config, folder)
    assert not (folder / "addresses").exists()


def test_without_a_key_nothing_is_started(config: Config, tmp_path: Path, started: list[Server]) -> None:
    with pytest.raises(InputError, match="holds no key"):
        serve.serve(config, tmp_path / "elsewhere")
    assert started == []
