"""Transformer Engine that is installed but broken, in many ways, and the attention that it must not choose."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.transformer_engine import check_import, unfused_message

# Each is what a package says when it is imported, by file. `None`: an empty file.
WHOLE = {"__init__.py": None, "pytorch/__init__.py": None, "pytorch/distributed.py": None}
# As TE's own __init__: it passes over a torch part that cannot be imported, with a warning at most.
LENIENT = """
import warnings
try:
    from . import pytorch
except ImportError:
    pass
except FileNotFoundError:
    warnings.warn("Detected a PyTorch installation but could not find the shared object file")
"""
BROKEN = {
    "no torch part": (
        {"__init__.py": LENIENT, "pytorch/__init__.py": "raise FileNotFoundError('Could not find shared object file')"},
        "FileNotFoundError: Could not find shared object file",
    ),
    "no CUDA runtime": (
        {"__init__.py": "import ctypes; ctypes.CDLL('libcudart.so.99')"},
        "OSError: libcudart.so.99: cannot open shared object file: No such file or directory",
    ),
    "compiled against another torch": (
        {"__init__.py": LENIENT, "pytorch/__init__.py": "raise ImportError('te.so: undefined symbol: _ZN3c10')"},
        "ImportError: te.so: undefined symbol: _ZN3c10",
    ),
    "parts of different versions": (
        {"__init__.py": LENIENT, "pytorch/__init__.py": "assert False, 'package version mismatch.\\nFound 2.9'"},
        "AssertionError: package version mismatch",
    ),
    "no parts at all": (
        {"__init__.py": "raise RuntimeError('Found empty `transformer-engine` meta package installed')"},
        "RuntimeError: Found empty `transformer-engine` meta package installed",
    ),
    "no metadata": (
        {"__init__.py": "from importlib import metadata; metadata.version('transformer_engine_nowhere')"},
        "PackageNotFoundError: No package metadata was found for transformer_engine_nowhere",
    ),
    "another driver": (
        {**WHOLE, "pytorch/__init__.py": "object().missing"},
        "AttributeError: 'object' object has no attribute 'missing'",
    ),
    "cut off": ({"__init__.py": None}, "ModuleNotFoundError: No module named 'transformer_engine.pytorch'"),
    "without the module that Megatron-Core imports": (
        {"__init__.py": None, "pytorch/__init__.py": None},
        "ModuleNotFoundError: No module named 'transformer_engine.pytorch.distributed'",
    ),
    "not Python": ({"__init__.py": "def"}, "SyntaxError: invalid syntax (__init__.py, line 1)"),
}


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is searched for packages first. Afterwards, no part of what was imported from it is left."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def plant(folder: Path, files: dict[str, str | None]) -> None:
    for name, text in files.items():
        path = folder / "transformer_engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or "")


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> object:
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("error")
def test_a_broken_one_is_named_with_the_fix(planted: Path, name: str) -> None:
    files, words = BROKEN[name]
    plant(planted, files)
    with pytest.raises(InputError) as caught:
        check_import()
    message = str(caught.value)
    assert message.startswith("Transformer Engine is installed (")
    assert f"), but cannot be imported: {words}. " in message
    assert "pip install --no-build-isolation '.[te]', docs/gpu.md)" in message
    assert "Or remove that folder: without it, the layers are" in message
    assert "\n" not in message


def test_a_whole_one_and_none_pass(planted: Path) -> None:
    check_import()
    plant(planted, WHOLE)
    check_import()
    assert "transformer_engine.pytorch.distributed" in sys.modules


@pytest.mark.parametrize("command", ["train", "convert"])
def test_the_commands_say_so_before_megatron_is_imported(tmp_path: Path, command: str) -> None:
    """In a process of its own: here Megatron-Core is imported already."""
    plant(tmp_path / "packages", BROKEN["no torch part"][0])
    plant(tmp_path / "packages/megatron", {})
    (tmp_path / "packages/megatron.py").write_text("raise SystemExit('Megatron-Core was imported')")
    arguments = {
        "train": ["train", "experiment=quickstart", f"run.dir={tmp_path / 'run'}"],
        "convert": ["convert", "hf-to-megatron", "examples/quickstart/model", str(tmp_path / "out")],
    }[command]
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": f"{tmp_path / 'packages'}:{root}", "CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_tempo", *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: Transformer Engine is installed (")
    assert "FileNotFoundError: Could not find shared object file" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Megatron-Core was imported" not in done.stderr


# GPU, variables, run.deterministic, FP8 -> the fixes, in order
UNFUSED = [
    ((8, 0), {}, True, False, ["install flash-attn", "model.layers=local"]),
    ((8, 9), {}, False, True, ["install flash-attn", "run.precision=bf16 and model.layers=local"]),
    ((10, 0), {}, True, False, ["install flash-attn", "run.deterministic=false", "model.layers=local"]),
    ((10, 3), {}, False, False, ["install flash-attn", "model.layers=local"]),
    ((9, 0), {"NVTE_FUSED_ATTN": "0"}, True, False, ["unset NVTE_FUSED_ATTN in", "install flash-attn"]),
    (None, {"NVTE_FLASH_ATTN": "0", "NVTE_FUSED_ATTN": "1"}, True, False, ["unset NVTE_FLASH_ATTN in", "flash-attn"]),
]


@pytest.mark.parametrize(("capability", "environment", "deterministic", "in_fp8", "fixes"), UNFUSED)
def test_the_fix_for_unfused_attention(
    capability: tuple[int, int] | None,
    environment: dict[str, str],
    deterministic: bool,
    in_fp8: bool,
    fixes: list[str],
) -> None:
    message = unfused_message(capability, environment, deterministic=deterministic, in_fp8=in_fp8)
    assert message.startswith("Transformer Engine chose its unfused attention on ")
    assert (f"compute capability {capability[0]}.{capability[1]}" if capability else "this machine") in message
    places = [message.index(fix) for fix in fixes]
    assert places == sorted(places)
    assert ("run.deterministic=false" in message) == ("run.deterministic=false" in fixes)
    assert ("unset" in message) == any("unset" in fix for fix in fixes)
