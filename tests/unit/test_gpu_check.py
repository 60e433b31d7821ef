"""The driver of tools/gpu_check.py, with parts of a line each, and what its own parts share."""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open

from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.plan.memory import MemoryPhase
from megatron_tempo.weights import tables
from tests.support.tools import TOOLS, load_tool

# Parts by name: what their processes run, with the setting as the last argument.
RECORDS = (
    "from gpu_parts.setting import Setting; from gpu_parts.records import Records; import sys, os, time, signal;\n"
)
RECORDS += "s = Setting.read(sys.argv[1]); r = Records(open(s.folder / (NAME + '.records'), 'w'));\n"
HANGS = 2.0  # the limit of the part that hangs, in seconds
PARTS = {
    "good": "r.at_most('error', 0.5, 1.0)",
    "wrong": "r.at_most('error', 1.5, 1.0); r.figure('time', 3.0, 's')",
    "hangs": "r.figure('before', 1.0); import subprocess; p = subprocess.Popen(['sleep', '600']); "
    "print('started', p.pid, flush=True); time.sleep(600)",
    "crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "raises": "raise ValueError('of the part')",
    "misses": "print('missing: vllm, sglang'); sys.exit(3)",
    "last": "r.holds('runs', True)",
}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("gpu_check", monkeypatch)


def run(tool: ModuleType, out: Path, names: Sequence[str], *, limit: float = 60.0, total: float = 300.0) -> list[Any]:
    from gpu_parts.catalog import Part
    from gpu_parts.setting import Setting

    def command(part: Any, _: Any) -> list[str]:
        return ["-c", RECORDS.replace("NAME", repr(part.name)) + PARTS[part.name]]

    parts = [Part(name, name, HANGS if name == "hangs" else limit) for name in names]
    return tool.driver.run_parts(parts, Setting("cpu", True, str(out), total), total, command, sys.executable)


def over_its_limit(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, log: Path) -> None:
    """A part with the limit HANGS is over it as soon as it has started its own process, however busy the machine is."""

    class Process(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            if timeout != HANGS:
                return super().wait(timeout)
            deadline = time.monotonic() + 120
            while b"started" not in log.read_bytes() and time.monotonic() < deadline:
                time.sleep(0.01)
            raise subprocess.TimeoutExpired("part", timeout)

    monkeypatch.setattr(tool.driver.subprocess, "Popen", Process)


def is_running(pid: int) -> bool:
    """A process that was killed and not yet waited for by its parent has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_no_part_stops_the_others(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    over_its_limit(tool, monkeypatch, tmp_path / "hangs.log")
    outcomes = run(tool, tmp_path, list(PARTS))
    found = {one.part: one.status.name for one in outcomes}
    assert found == {
        "good": "passed",
        "wrong": "failed",
        "hangs": "timed_out",
        "crashes": "crashed",
        "raises": "error",
        "misses": "missing",
        "last": "passed",
    }
    messages = {one.part: one.message for one in outcomes}
    assert "after the record 'before'" in messages["hangs"]
    assert "SIGSEGV" in messages["crashes"]
    assert "ValueError: of the part" in messages["raises"]
    assert messages["misses"] == "vllm, sglang"
    assert not is_running(int((tmp_path / "hangs.log").read_text().split()[-1])), "what a part has started ends with it"
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines] == list(PARTS)
    assert lines[1]["status"] == "FAILED"
    assert lines[1]["records"][1] == {"name": "time", "value": 3.0, "unit": "s", "bound": "", "verdict": ""}
    assert tool.driver.exit_status(outcomes) == 1
    text = tool.driver.table(outcomes)
    assert "  wrong: error: 1.5 (at most 1) FAILED" in text
    assert "not run: missing" in text
    assert "hangs" in capsys.readouterr().out


def test_a_missing_package_alone_is_no_failure(tool: ModuleType, tmp_path: Path) -> None:
    assert tool.driver.exit_status(run(tool, tmp_path, ["good", "misses"])) == 0


def test_the_rest_is_skipped_when_the_total_is_used_up(tool: ModuleType, tmp_path: Path) -> None:
    outcomes = run(tool, tmp_path, ["good", "last"], total=0.0)
    assert [one.status.value for one in outcomes] == ["not run: no time left"] * 2
    assert len((tmp_path / "gpu_check.jsonl").read_text().splitlines()) == 2
    assert tool.driver.exit_status(outcomes) == 1


def test_a_part_gets_what_is_left_of_the_total(tool: ModuleType, tmp_path: Path) -> None:
    tool.driver.LEAST, before = 0.0, tool.driver.LEAST
    try:
        started = time.monotonic()
        (outcome,) = run(tool, tmp_path, ["hangs"], total=0.5)
        assert outcome.status.name == "timed_out"
        assert time.monotonic() - started < 60  # its own limit is 2 s, and it sleeps for 600 s
    finally:
        tool.driver.LEAST = before


def test_records_are_read_back_up_to_a_line_that_was_cut(tool: ModuleType, tmp_path: Path) -> None:
    from gpu_parts.records import Records, read

    path = tmp_path / "records"
    with path.open("w") as file:
        records = Records(file)
        records.at_most("nan", math.nan, 1.0)
        records.between("high", 3.0, 1.0, 2.0)
        with records.attempt("case"):
            raise ValueError("two\nlines")
    with path.open("a") as file:
        file.write('{"name": "cut')
    found = read(path)
    assert [(one.name, one.value, one.verdict) for one in found] == [
        ("nan", "nan", "FAILED"),
        ("high", 3.0, "FAILED"),
        ("case: runs to its end", "ValueError: two lines", "FAILED"),
    ]
    assert read(tmp_path / "none") == []


def test_the_null_gpu_compares_no_numbers(tool: ModuleType) -> None:
    from gpu_parts.records import Records

    file = io.StringIO()
    records = Records(file, has_numbers=False)
    records.at_most("error", 2.0, 1.0)
    records.between("peak", 3.0, 1.0, 2.0, numeric=False)
    with records.attempt("case"):
        raise TypeError
    verdicts = [json.loads(line)["verdict"] for line in file.getvalue().splitlines()]
    assert verdicts == ["not checked (null GPU)", "FAILED", "FAILED"]


def test_the_null_gpu_is_found_by_its_library(tool: ModuleType, tmp_path: Path) -> None:
    from gpu_parts.setting import is_null_gpu

    assert not is_null_gpu()
    library = tmp_path / "libnullgpu.so"
    library.write_bytes(b"\0" * mmap.PAGESIZE)
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        assert is_null_gpu()
    assert not is_null_gpu()


def test_a_part_names_what_it_misses(tool: ModuleType, tmp_path: Path) -> None:
    from gpu_parts.__main__ import missing
    from gpu_parts.catalog import Part
    from gpu_parts.setting import Setting

    part = Part("p", "", 1.0, ("json", "no_such_package", "no_such.module"), ("no_cuda_package",))
    assert missing(part, Setting("cpu", True, str(tmp_path), 1.0)) == ["no_such_package", "no_such.module"]
    assert missing(part, Setting("cuda", True, str(tmp_path), 1.0))[-1] == "no_cuda_package"


@pytest.mark.skipif(torch.cuda.is_available(), reason="finds a GPU")
def test_a_machine_without_a_gpu_is_no_success(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--only", "versions", "kernels", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "kernels       not run: no GPU" in said
    assert "torch finds no GPU: check the driver and CUDA_VISIBLE_DEVICES, or give --device cpu" in said


def test_every_part_is_listed_and_is_a_module(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from gpu_parts.catalog import PARTS as CATALOG

    assert tool.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [part.name for part in CATALOG]
    assert all((TOOLS / "gpu_parts" / f"{part.name}.py").exists() for part in CATALOG)
    assert tool.main(["--list", "--only", "memory", "versions"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["versions", "memory"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--out", "there"], "has files already; give a new or an empty folder"),
        (["--rehearsal", "none.json"], "--rehearsal none.json: there is none"),
        (["--wheels", "none"], "--wheels none: there is none"),
        (["--wheels", "there"], "no .whl file there; docs/gpu.md tells"),
    ],
)
def test_bad_options(
    tool: ModuleType,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/mine").write_text("kept")
    assert tool.main([*words, "--device", "cpu", "--only", "versions"]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "there/mine").read_text() == "kept"
    assert not (tmp_path / "runs").exists()


def wheel(folder: Path, name: str, version: str) -> Path:
    """A wheel with one module, written by hand."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", f"VERSION = {version!r}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.long
def test_wheels_are_installed_beside_the_packages_that_are_there(tool: ModuleType, tmp_path: Path) -> None:
    from gpu_parts.wheels import WheelError, make_environment

    wheels = tmp_path / "wheels"
    wheels.mkdir()
    wheel(wheels, "hello_gpu", "1.0")
    wheel(wheels, "pluggy", "0.1")  # pytest's, of another version
    python = make_environment(wheels, tmp_path / "out/venv")
    words = "import hello_gpu, pluggy, numpy; print(hello_gpu.VERSION, pluggy.VERSION, numpy.__version__)"
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([python, "-c", words], capture_output=True, text=True, env=clean, check=False)
    assert done.stdout.split() == ["1.0", "0.1", numpy.__version__], done.stderr
    (wheels / "broken-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(WheelError, match="pip cannot install them"):
        make_environment(wheels, tmp_path / "out/venv")


def test_a_made_model_has_the_tensors_of_a_qwen3(tool: ModuleType, tmp_path: Path) -> None:
    from gpu_parts.made import FOUR_OF_8B, write_model

    folder = write_model(tmp_path / "model", FOUR_OF_8B, empty=True)
    shape = read_model_shape(folder)
    mappings = tables.mappings(shape, critic=False)
    wanted = {name: size for mapping in mappings for name, size in zip(mapping.names, mapping.shapes, strict=True)}
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118, no dict
        assert file.get_tensor("model.layers.3.input_layernorm.weight").abs().sum() == 0
    assert found == wanted
    assert sum(math.prod(size) for size in found.values()) == 2 * 151_936 * 4096 + 4096 + 4 * 192_946_432
    assert (folder / "model.safetensors").stat().st_blocks * 512 < 1 << 20, "its data is a hole"


def test_a_rehearsals_peaks_are_read(tool: ModuleType, tmp_path: Path) -> None:
    from gpu_parts.memory import against_rehearsal, rehearsed
    from gpu_parts.records import Records

    path, file = tmp_path / "rehearsal.json", io.StringIO()
    phases = [{"phase": "actor", "peak": 40_000_000_000, "reserved": 1}, {"phase": "sync", "peak": 5}]
    path.write_text(json.dumps({"ranks": [{"phases": phases}, {"phases": []}], "rows": 2}))
    against_rehearsal(path, {MemoryPhase.actor: 44_000_000_000, MemoryPhase.values: 1}, Records(file))
    found = {record["name"]: record["value"] for record in map(json.loads, file.getvalue().splitlines())}
    assert found == {"actor: rehearsed peak": 40.0, "actor: peak / rehearsed peak": 1.1}
    for text in ("{}", "[", '{"ranks": []}', '{"ranks": [{"phases": [{"peak": 1}]}]}', '"text"'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is not the JSON of a rehearsal"):
            rehearsed(path)


@pytest.mark.slow
def test_all_parts_run_at_small_sizes(tmp_path: Path) -> None:
    """Every line of the kit runs here, on a CPU. What it shows of a GPU is nothing."""
    command = [sys.executable, str(TOOLS / "gpu_check.py"), "--device", "cpu", "--out", str(tmp_path / "out")]
    command += ["--seconds", "550", "--patience", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out/gpu_check.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    assert {line["status"] for line in lines} == {"passed"}
    compared = {line["part"]: sum(bool(record["verdict"]) for record in line["records"]) for line in lines}
    assert compared["ranks"] == 72
    assert compared["transfer"] == 7
    assert compared["kernels"] == 9
