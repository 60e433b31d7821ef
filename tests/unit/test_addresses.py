"""Where a machine listens, which GPUs a job's numbers stand for, and that no proxy is asked for a server of ours."""

from __future__ import annotations

import asyncio
import socket
import sys
from pathlib import Path

import pytest

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.schema import JudgeConfig, ServersConfig
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rewards.judge import JudgeScorer
from megatron_tempo.rollout import addresses, supervisor
from megatron_tempo.rollout.addresses import chosen_devices, own_address
from megatron_tempo.rollout.engine_versions import EngineVersions
from megatron_tempo.rollout.server import Server
from megatron_tempo.rollout.server_adapter import Call, Launch, Start
from megatron_tempo.rollout.supervisor import ExternalServers

OUTWARD = "192.0.2.7"


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What names stand for here."""
    known: dict[str, str] = {}

    def resolve(name: str) -> str:
        try:
            return known[name]
        except KeyError:
            raise socket.gaierror(-2, "Name or service not known") from None

    monkeypatch.setattr(socket, "gethostname", lambda: "machine")
    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(addresses, "_outward_address", lambda: OUTWARD)
    return known


@pytest.mark.parametrize(
    ("of_name", "address"), [("10.0.0.5", "10.0.0.5"), ("127.0.1.1", OUTWARD), ("127.0.0.1", OUTWARD), (None, OUTWARD)]
)
def test_a_machines_own_name(names: dict[str, str], of_name: str | None, address: str) -> None:
    """Debian's /etc/hosts gives it 127.0.1.1, which other machines do not reach; some give it nothing."""
    names |= {} if of_name is None else {"machine": of_name}
    assert own_address("hostname") == address


def test_a_machine_without_a_network(names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_outward_address", lambda: None)
    with pytest.raises(InputError, match="this machine's name machine has no IPv4 address here"):
        own_address("hostname")
    names["machine"] = "127.0.1.1"
    assert own_address("hostname") == "127.0.1.1"


def test_hosts_that_cannot_be_used(names: dict[str, str]) -> None:
    names["127.0.0.1"] = "127.0.0.1"
    assert own_address("127.0.0.1") == "127.0.0.1"
    with pytest.raises(InputError, match=r"rollout\.servers\.host=nobody has no IPv4 address here .*: give an IPv4"):
        own_address("nobody")
    with pytest.raises(InputError, match=r"rollout\.servers\.host=::1 is an IPv6 address"):
        own_address("::1")


@pytest.mark.parametrize(
    ("visible", "numbers", "devices"),
    [
        (None, [2, 3], ["2", "3"]),
        ("4,5,6,7", [2, 3], ["6", "7"]),
        ("GPU-aa, GPU-bb,GPU-cc", [1, 2], ["GPU-bb", "GPU-cc"]),
        ("MIG-1/2/3", [0], ["MIG-1/2/3"]),
    ],
)
def test_devices_are_counted_among_the_jobs(visible: str | None, numbers: list[int], devices: list[str]) -> None:
    assert chosen_devices(numbers, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == devices


@pytest.mark.parametrize(("visible", "count"), [("4,5", 2), ("4,-1,5", 1), ("", 0)])
def test_a_device_outside_the_jobs_share(visible: str, count: int) -> None:
    with pytest.raises(InputError, match=rf"there is no GPU 2: .* shows {count} here"):
        chosen_devices([2], {"CUDA_VISIBLE_DEVICES": visible})


class Files:
    """Stands for an engine: Python's own web server, which logs its key and its variables as engines do."""

    name = "Files"
    versions = EngineVersions("Files", ("files",), ("1",), "1")
    asks_for_version = Call("/version")
    health = Call("/health")

    def launch(self, start: Start) -> Launch:
        (start.folder / "health").write_text("well")
        serve = (
            "import http.server, os, sys; print(sys.argv, sorted(os.environ), flush=True); os.chdir(sys.argv[1]); "
            "open('made', 'w'); server = http.server.ThreadingHTTPServer((sys.argv[2], int(sys.argv[3])), "
            "http.server.SimpleHTTPRequestHandler); server.serve_forever()"
        )
        return Launch(["-c", serve, str(start.folder), start.host, str(start.port), f"api_key='{start.key}'"])


KEY = "0123456789abcdef"


@pytest.fixture
def proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a login shell: one that nobody listens at, one of a kind that httpx has no package for."""
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)


@pytest.mark.usefixtures("proxies")
def test_no_proxy_is_asked_and_nobody_else_reads(tmp_path: Path) -> None:
    folder = tmp_path / "engine" / "0"
    folder.mkdir(parents=True, mode=0o755)
    (folder / "files.log").write_text("of an earlier start\n")
    (folder / "files.log").chmod(0o644)
    config = ServersConfig(python=sys.executable, start_seconds=60)
    server = Server(Files(), config, tmp_path, folder, KEY, EnginePrecision.fp32, "")  # type: ignore[arg-type]
    try:
        server.wait()
        assert asyncio.run(ExternalServers(Files(), [server.url], KEY, 60).start(0)) == server.url  # type: ignore[arg-type]
    finally:
        server.close()
    modes = {name: (folder / name).stat().st_mode & 0o777 for name in (".", "files.log", "made")}
    assert modes == {".": 0o700, "files.log": 0o600, "made": 0o600}
    log = server.log.read_text()
    assert KEY in log
    assert not any(f"'{name}'" in log.lower() for name in ("http_proxy", "https_proxy", "all_proxy"))


def test_a_log_is_told_without_the_key(tmp_path: Path) -> None:
    class Failing(Files):
        def launch(self, start: Start) -> Launch:
            return Launch(["-c", f"raise SystemExit('ServerArgs(api_key={start.key})')"])

    config = ServersConfig(python=sys.executable, start_seconds=60)
    server = Server(Failing(), config, tmp_path, tmp_path / "0", KEY, EnginePrecision.fp32, "")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"api_key=\*\*\*") as caught:
        server.wait()
    server.close()
    assert KEY not in str(caught.value)


@pytest.mark.usefixtures("proxies")
def test_a_judge_on_this_machine_is_asked_without_a_proxy(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]"):
        JudgeScorer(JudgeConfig(url=f"http://{host}:1/v1", model="m"), tmp_path).close()
    with pytest.raises(InputError, match=r"the environment's proxy cannot be used for .*: set NO_PROXY=judge\.example"):
        JudgeScorer(JudgeConfig(url="http://judge.example:1/v1", model="m"), tmp_path)


def test_a_host_that_does_not_resolve_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(supervisor, "UNRESOLVED", 2)
    servers = ExternalServers(Files(), ["http://nobody.invalid:1"], KEY, 600)  # type: ignore[arg-type]
    with pytest.raises(EngineError, match=r"http://nobody\.invalid:1: the host does not resolve on"):
        asyncio.run(servers.start(0))
