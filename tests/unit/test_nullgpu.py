"""The null GPU as far as it goes without a CUDA build of torch: what is refused, the cache of builds, and the guard.

tests/nullgpu has the rest (make test-rehearsal).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_tempo import cli
from megatron_tempo.config.choices import Device
from megatron_tempo.errors import InputError
from megatron_tempo.models.device import select_device
from megatron_tempo.nullgpu import build, environment, guard

LIBRARIES = {"libnullgpu.so", "libcuda.so.1", "libnvidia-ml.so.1"}
# What the build takes from NVIDIA's header for the driver.
CUDA_H = """\
#define cuMemAlloc                          cuMemAlloc_v2
    #define cuMemcpyHtoD                    __CUDA_API_PTDS(cuMemcpyHtoD_v2)
#define cuMemcpy                            __CUDA_API_PTDS(cuMemcpy)
#define CUDA_VERSION 13000
CUresult CUDAAPI cuInit(unsigned int Flags);
CUresult CUDAAPI cuMemAlloc(CUdeviceptr *dptr, size_t bytesize);
CUresult  CUDAAPI  cuStreamCreate (CUstream *phStream, unsigned int Flags);
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages folder that Python looks into first, and a cache of its own."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    # find_spec asks loaded modules first, and this process has torch.
    found = build.importlib.util.find_spec
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: _spec(folder, name, found))
    return folder


def _spec(folder: Path, name: str, found: Callable[..., object]) -> object:
    if name in ("torch", "nvidia", "transformer_engine"):
        return build.importlib.machinery.PathFinder.find_spec(name, [str(folder)])
    return found(name)


def torch_in(site: Path, version: str = "2.13.0+cu130", cuda: str | None = "13.0") -> Path:
    folder = site / "torch"
    (folder / "lib").mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n")
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
    )
    if cuda is not None:
        (folder / "lib" / "libtorch_cuda.so").touch()
    return folder


def headers_in(site: Path) -> Path:
    folder = site / "nvidia" / "cu13" / "include"
    folder.mkdir(parents=True)
    for header in build.HEADERS:
        (folder / header).write_text(CUDA_H if header == "cuda.h" else "")
    return folder


def test_a_cpu_build_of_torch_is_refused_with_the_way_to_a_cuda_build(site: Path) -> None:
    torch_in(site, "2.13.0+cpu", None)
    with pytest.raises(InputError) as caught:
        build.libraries()
    message = str(caught.value)
    assert f"torch 2.13.0+cpu in {site / 'torch'} is a build without CUDA" in message
    assert "make .venv-cuda/installed" in message
    assert "pip install torch==2.13.0 " in message
    assert "no GPU" in message
    assert "://" not in message


def test_no_torch_is_refused(site: Path) -> None:
    with pytest.raises(InputError, match=r"torch is not installed for .*make \.venv-cuda/installed"):
        build.libraries()


@pytest.mark.parametrize(("tool", "package"), [("gcc", "gcc"), ("nm", "binutils")])
def test_a_missing_tool_is_named(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, package: str
) -> None:
    torch_in(site)
    headers_in(site)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in {"gcc", "nm"} - {tool}:
        (tools / name).write_text("#!/bin/sh\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(InputError, match=rf"^{tool} is not on PATH.*apt-get install {package}") as caught:
        build.libraries()
    assert ("CC=" in str(caught.value)) == (tool == "gcc")


@pytest.mark.parametrize(("header", "package"), build.HEADERS.items())
def test_a_missing_header_is_named_with_its_package(
    site: Path, monkeypatch: pytest.MonkeyPatch, header: str, package: str
) -> None:
    torch_in(site)
    (headers_in(site) / header).unlink()
    monkeypatch.setenv("CUDA_HOME", str(site / "no-toolkit"))
    with pytest.raises(InputError, match=rf"^{re.escape(header)} is in none of .*pip install {package}\b.*CUDA_HOME"):
        build.include_folders()


def test_a_toolkit_serves_where_the_wheels_have_no_headers(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = headers_in(site).parent
    toolkit.rename(site / "toolkit")
    monkeypatch.setenv("CUDA_HOME", str(site / "toolkit"))
    assert build.include_folders()[-1] == site / "toolkit" / "include"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_a_failing_compiler_is_quoted(site: Path) -> None:
    torch_in(site)
    headers_in(site)  # empty: nothing in them is declared
    with pytest.raises(InputError, match=r"cannot be built: gcc failed with status 1: .*error: .*reinstall torch"):
        build.libraries()
    assert list(build.cache_root().iterdir()) == []


def test_the_key_follows_what_a_build_is_made_of(site: Path, tmp_path: Path) -> None:
    torch = build.Torch(torch_in(site), "2.13.0+cu130")
    sources = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, sources)
    first = build.key(torch, sources)
    assert build.key(torch, sources) == first
    keys = {first}
    with (sources / "nccl.c").open("a") as file:
        file.write("\n")
    keys.add(build.key(torch, sources))
    (sources / "shim" / "crt" / "more.h").touch()
    keys.add(build.key(torch, sources))
    keys.add(build.key(build.Torch(torch.folder, "2.13.1+cu130"), sources))
    (site / "transformer_engine").mkdir()
    (site / "transformer_engine" / "__init__.py").touch()
    (site / "transformer_engine" / "libtransformer_engine.so").write_bytes(b"one")
    keys.add(build.key(torch, sources))
    (site / "transformer_engine" / "libtransformer_engine.so").write_bytes(b"other")
    keys.add(build.key(torch, sources))
    assert len(keys) == 6


def test_builds_that_start_at_once_leave_one_whole_folder(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_in(site)
    headers_in(site)
    monkeypatch.setattr(build, "compiler", lambda: ["gcc"])
    everybody_compiles, folders = threading.Barrier(4), []

    def compiled(gcc: list[str], includes: list[Path], torch: build.Torch, folder: Path) -> None:
        (folder / "libnullgpu.so").touch()
        everybody_compiles.wait(60)  # all four are between the look and the rename
        for name in LIBRARIES:
            (folder / name).touch()

    monkeypatch.setattr(build, "_compile", compiled)
    threads = [threading.Thread(target=lambda: folders.append(build.libraries())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(folders) == 4
    assert len(set(folders)) == 1
    assert [path.name for path in build.cache_root().iterdir()] == [folders[0].name]
    assert {path.name for path in folders[0].iterdir()} == LIBRARIES


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_in(site)
    headers_in(site)
    monkeypatch.setattr(build, "compiler", lambda: ["gcc"])

    def fails(gcc: list[str], includes: list[Path], torch: build.Torch, folder: Path) -> None:
        (folder / "libnullgpu.so").touch()
        raise InputError("full disk")

    with monkeypatch.context() as patch:
        patch.setattr(build, "_compile", fails)
        with pytest.raises(InputError, match="full disk"):
            build.libraries()
    assert list(build.cache_root().iterdir()) == []
    monkeypatch.setattr(build, "_compile", lambda gcc, includes, torch, folder: (folder / "done").touch())
    assert (build.libraries() / "done").exists()


def test_a_cache_that_cannot_be_written_is_named(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_in(site)
    headers_in(site)
    monkeypatch.setattr(build, "compiler", lambda: ["gcc"])
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"file/megatron_tempo/nullgpu, .*: Not a directory.*XDG_CACHE_HOME"):
        build.libraries()


def test_a_wheel_carries_every_source() -> None:
    root = Path(__file__).resolve().parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = root / "megatron_tempo" / "nullgpu"
    carried = {path for pattern in patterns["megatron_tempo.nullgpu"] for path in package.glob(pattern)}
    sources = {path for path in build.SOURCES.rglob("*") if path.is_file()}
    assert len(sources) > 15
    assert sources <= carried


def test_a_device_is_not_selected_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What train and eval do first when they are called as functions."""
    monkeypatch.setattr(guard, "is_loaded", lambda: True)
    with pytest.raises(InputError, match=r"^run\.device=auto: this process has the null GPU"):
        select_device(Device.auto, 0)


def test_the_driver_has_the_names_that_its_header_makes(site: Path) -> None:
    includes = [headers_in(site)]
    assert build.current_versions(includes) == ["cuMemAlloc_v2", "cuMemcpyHtoD_v2"]
    assert build.driver_names(includes) == {
        "cuInit",
        "cuMemAlloc",
        "cuStreamCreate",
        "cuMemAlloc_v2",
        "cuMemcpyHtoD_v2",
    }


def test_a_stub_is_reported_unless_doing_nothing_is_the_answer() -> None:
    text = build.stub_source({"cudaMemPoolTrimTo", "cudaGraphLaunch"})
    assert "NOTHING(cudaMemPoolTrimTo)" in text
    assert "STUB(cudaGraphLaunch)" in text


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_the_files_without_nvidia_headers_compile_without_a_warning(tmp_path: Path) -> None:
    for name in ("counters.c", "memory.c", "host_memory.c"):
        command = ["gcc", *build.FLAGS, *build.STRICT, f"-I{build.SOURCES}", "-c", str(build.SOURCES / name)]
        done = subprocess.run([*command, "-o", str(tmp_path / "a.o")], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_what_a_child_gets(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "libraries", lambda: tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("LD_PRELOAD", "/old/libnullgpu.so libjemalloc.so")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    found = environment.environment(devices=2, memory_gb=48.5, capability=89, name="L40S")
    assert "CUDA_VISIBLE_DEVICES" not in found
    assert found["LD_PRELOAD"] == f"{tmp_path}/libnullgpu.so:libjemalloc.so"
    assert found["LD_LIBRARY_PATH"] == f"{tmp_path}:/opt/lib"
    assert found["NULLGPU_MEMORY_BYTES"] == "48500000000"
    assert found["NULLGPU_NAME"] == "L40S (null)"
    assert (found["NULLGPU_DEVICES"], found["NULLGPU_CAPABILITY"], found[guard.MARKER]) == ("2", "89", "1")


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"devices": 0}, "devices 0"), ({"memory_gb": -1.0}, "memory_gb -1"), ({"capability": 9}, "sm_90")],
)
def test_a_device_that_cannot_be_is_refused(setting: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        environment.environment(**setting)  # type: ignore[arg-type]


def test_the_bound_on_devices_is_that_of_the_c_code() -> None:
    text = (build.SOURCES / "nullgpu.h").read_text()
    assert f"#define NULLGPU_MAX_DEVICES {environment.MAX_DEVICES}\n" in text


def test_this_process_has_no_null_gpu() -> None:
    assert not guard.is_loaded()
    guard.refuse_null_gpu("train")
    with pytest.raises(InputError, match="no null GPU"):
        guard.rehearse()


@pytest.mark.parametrize(
    "command",
    [
        ["train", "experiment=quickstart"],
        ["eval", "data=no.jsonl"],
        ["serve", "--folder", "none"],
        ["convert", "hf-to-megatron", "none", "OUT"],
    ],
    ids=lambda words: words[0],
)
def test_what_computes_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guard, "is_loaded", lambda: True)
    assert cli.main([word.replace("OUT", str(tmp_path / "out")) for word in command]) == 2
    error = capsys.readouterr().err
    assert f"error: {command[0]}: this process has the null GPU" in error
    assert "unset LD_PRELOAD" in error
    assert list(tmp_path.iterdir()) == []


def test_a_rehearsal_may_and_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(guard, "is_loaded", lambda: True)
    monkeypatch.setattr(guard, "_rehearsing", False)
    with pytest.raises(InputError, match="computes nothing"):
        guard.refuse_null_gpu("run.device=auto")
    guard.rehearse()
    guard.refuse_null_gpu("run.device=auto")
    assert "NULL GPU: a rehearsal" in capsys.readouterr().err


def test_a_variable_of_the_shell_is_no_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "is_loaded", lambda: True)
    monkeypatch.setattr(guard, "_rehearsing", False)
    monkeypatch.setenv(guard.MARKER, "1")
    with pytest.raises(InputError, match="computes nothing"):
        guard.refuse_null_gpu("train")
