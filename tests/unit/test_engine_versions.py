"""Servers of engines in versions that the adapters are not written for."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version
from pathlib import Path

import pytest

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.rollout.engine_versions import EngineVersions, _warn_once, check_version, installed_version
from megatron_tempo.rollout.server import Server
from megatron_tempo.rollout.server_adapter import Call, Launch, ServerAdapter, Start
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.supervisor import ExternalServers
from megatron_tempo.rollout.vllm import Vllm
from tests.support.served import served


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    _warn_once.cache_clear()


@pytest.mark.parametrize(
    ("versions", "found", "supported"),
    [
        (Vllm.versions, "0.32.0", True),
        (Vllm.versions, "0.32.1.post1", True),
        (Vllm.versions, "0.33.0rc1", True),
        (Vllm.versions, "0.33.0+cu130", True),
        (Vllm.versions, "0.31.4", False),
        (Vllm.versions, "0.320.0", False),
        (Vllm.versions, "0.3", False),
        (Sglang.versions, "0.5.23", True),
        (Sglang.versions, "0.5.23.post2", True),
        (Sglang.versions, "0.5.2", False),
        (Sglang.versions, "0.5.230", False),
    ],
)
def test_supported_versions(versions: EngineVersions, found: str, supported: bool) -> None:
    assert versions.supports(found) is supported
    assert (versions.doubt(found) is None) is supported


class Engine:
    """A server of vLLM's or SGLang's that answers what it is asked at its start."""

    def __init__(self, adapter: ServerAdapter, version: str) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                known = {adapter.health.path: {}, adapter.asks_for_version.path: {"version": version}}
                content = json.dumps(known.get(self.path)).encode()
                self.send_response(200 if self.path in known else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._listener = HTTPServer(("127.0.0.1", 0), Handler)

    @contextmanager
    def running(self) -> Iterator[str]:
        with served(self._listener):
            yield f"http://127.0.0.1:{self._listener.server_address[1]}"


@pytest.mark.parametrize(
    ("adapter", "found", "fix"),
    [
        (Vllm(cpu=True, tensor=1), "0.31.0", "pip install vllm==0.32.0"),
        (Sglang(cpu=True, tensor=1), "0.4.9", "pip install sglang==0.5.23"),
        (Vllm(cpu=True, tensor=1), "0.33.0", None),
        (Sglang(cpu=True, tensor=1), "0.5.23", None),
    ],
)
def test_a_server_of_another_version_is_named_once_with_the_fix(
    adapter: ServerAdapter, found: str, fix: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with Engine(adapter, found).running() as url:
        for _ in range(2):
            starter = ExternalServers(adapter, [url], "key", 60)
            assert asyncio.run(starter.start(0)) == url
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == (fix is not None)
    if fix is not None:
        assert said[0].startswith(f"{adapter.name} {found} is not a version that this program supports")
        assert fix in said[0]


def test_a_server_that_does_not_say_its_version_is_used(caplog: pytest.LogCaptureFixture) -> None:
    for answer in ("", "404 not found", "[]", "{}"):
        check_version(Vllm.versions, answer, "http://one:1")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_the_version_of_an_interpreter_is_that_of_its_package() -> None:
    assert installed_version(sys.executable, ["no-such-package", "pytest"]) == version("pytest")
    assert installed_version(sys.executable, ["no-such-package"]) == "none"
    assert installed_version("/bin/false", ["pytest"]) is None
    assert installed_version("/no/such/python", ["pytest"]) is None


class Ending:
    """An engine that does not start; the package pytest stands for it."""

    name = "Ending"
    versions = EngineVersions("Ending", ("pytest",), ("0.1",), "0.1.7")
    health = asks_for_version = Call("/health")

    def launch(self, start: Start) -> Launch:
        return Launch(["-c", "raise SystemExit('error: unrecognized arguments: --tokens-only')"])


@pytest.mark.parametrize(
    ("packages", "words"),
    [
        (
            ("pytest",),
            f"Ending {version('pytest')} is not a version that this program supports (0.1): if it fails or its "
            f"log-probabilities differ, run `{sys.executable} -m pip install pytest==0.1.7`",
        ),
        (("no-such-package",), f"{sys.executable} has no package no-such-package: run `{sys.executable} -m pip"),
    ],
)
def test_an_engine_that_does_not_start_is_told_of_with_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: tuple[str, ...], words: str
) -> None:
    monkeypatch.setattr(Ending, "versions", EngineVersions("Ending", packages, ("0.1",), "0.1.7"))
    config = ServersConfig(python=sys.executable, start_seconds=60)
    server = Server(Ending(), config, tmp_path, tmp_path / "0", "key", EnginePrecision.fp32, "")  # type: ignore[arg-type]
    with pytest.raises(EngineError) as error:
        server.wait()
    assert words in str(error.value)
    assert "unrecognized arguments" in str(error.value)
