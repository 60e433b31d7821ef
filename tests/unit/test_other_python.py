"""The Python for the other version of Megatron-Core: on PATH, or of pyenv, and only one that runs."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement

from tests.support.tools import load_tool

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("other_python", monkeypatch)


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def says(version: str) -> str:
    return f"echo {version}"


FAILS = "echo 'pyenv: python3.12: command not found' >&2; exit 127"


def test_the_first_on_path_that_runs(tool: ModuleType, tmp_path: Path) -> None:
    program(tmp_path / "shims/python3.12", FAILS)
    program(tmp_path / "old/python3.12", says("3.11"))  # a link to another one
    found = program(tmp_path / "bin/python3.12", says("3.12"))
    program(tmp_path / "bin/python3.13", says("3.13"))
    environment = {"PATH": f"{tmp_path}/shims:{tmp_path}/old:{tmp_path}/none:{tmp_path}/bin"}
    assert tool.other_python(("3.12", "3.13"), environment) == str(found)
    assert tool.other_python(("3.11",), environment) is None
    assert tool.other_python(("3.13",), environment) == f"{tmp_path}/bin/python3.13"


def test_pyenv_is_asked_for_what_its_shims_do_not_run(tool: ModuleType, tmp_path: Path) -> None:
    program(tmp_path / "shims/python3.12", FAILS)
    versions = f"versions) printf '3.1.2\\n3.11.7\\n3.12.1\\n' ;; prefix) echo {tmp_path}/versions/$2 ;;"
    program(tmp_path / "shims/pyenv", f"case $1 in {versions} esac")
    for full in ("3.1.2", "3.11.7", "3.12.1"):
        program(tmp_path / f"versions/{full}/bin/python", says(full.rpartition(".")[0]))
    environment = {"PATH": f"{tmp_path}/shims"}
    assert tool.other_python(("3.12", "3.13"), environment) == f"{tmp_path}/versions/3.12.1/bin/python"
    assert tool.other_python(("3.11",), environment) == f"{tmp_path}/versions/3.11.7/bin/python"
    assert tool.other_python(("3.13",), environment) is None


def test_its_versions_are_those_of_pyproject(tool: ModuleType) -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    markers = [one.marker for one in map(Requirement, dependencies) if one.name == "megatron-core"]
    kinds = [tuple(m.evaluate({"python_version": v}) for m in markers if m) for v in (*tool.OLDER, *tool.NEWER)]
    assert kinds == [(True, False)] * len(tool.OLDER) + [(False, True)] * len(tool.NEWER)
