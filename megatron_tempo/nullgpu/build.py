"""Builds the null GPU's libraries with gcc at first use, from the headers that torch's own dependencies bring."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_tempo.errors import InputError
from megatron_tempo.files import atomic_folder

SOURCES = Path(__file__).parent / "csrc"
DRIVER, NVML = (
    ("driver.c", "driver_memory.c", "driver_runtime.c"),
    ("nvml.c",),
)  # files of libcuda.so.1 and libnvidia-ml.so.1
PRELOAD = "libnullgpu.so"
FLAGS = (
    *("-std=gnu11", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-fno-builtin-malloc", "-fno-builtin-free"),
    *("-Wall", "-Wextra", "-Wno-unused-parameter"),  # most functions use none of theirs
)
STRICT = ("-Werror",)  # in tests: the warnings of a compiler that nobody tried must not stop a rehearsal
LINK = ("-shared", "-Wl,-z,now")  # -z now: without libnullgpu.so, the driver does not load at all
# Headers, and the package of torch's dependencies that has each.
HEADERS = {
    "cuda_runtime_api.h": "nvidia-cuda-runtime",
    "cuda.h": "nvidia-cuda-runtime",
    "cublas_v2.h": "nvidia-cublas",
    "cublasLt.h": "nvidia-cublas",
    "nccl.h": "nvidia-nccl-cu13",
}
# Whose functions are replaced: the runtime's (its registration functions work without a device),
# cuBLAS's and NCCL's.
WANTED = re.compile(r"^(cuda[A-Z]\w*|__cuda(LaunchKernel|InitModule|GetKernel)|cublas[A-Z]\w*|nccl[A-Z]\w*)$")
KEPT = re.compile(r"^cublas(Lt)?GetStatus(Name|String)$")  # texts, by NVIDIA's own library
GET_CUDA = (
    "A rehearsal needs torch with CUDA, and no GPU: make .venv-cuda/installed, or, in an environment of its own, "
    "pip install torch=={version} without an index of CPU builds (the wheel for Linux on the default index has CUDA)"
)


@dataclass(frozen=True)
class Torch:
    """The installed torch: its folder, and its version, such as 2.13.0+cu130."""

    folder: Path
    version: str


def libraries() -> Path:
    """The folder of libnullgpu.so, libcuda.so.1 and libnvidia-ml.so.1, which is made if it does not exist.

    Raises InputError where torch is not a CUDA build, where gcc or headers are missing, or where gcc fails.
    """
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        raise InputError(f"the null GPU is made of libraries for Linux with glibc, and this is {platform.platform()}")
    torch = installed_torch()
    compiler()  # also if the libraries are there: Triton compiles with it each kernel's launcher
    folder = cache_root() / key(torch)
    if not folder.is_dir():
        _build(torch, folder)
    return folder


def installed_torch() -> Torch:
    """The torch that a child process would import, found without importing it. Raises InputError for a CPU build."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise InputError(f"torch is not installed for {sys.executable}. {GET_CUDA.format(version='2.13.0')}")
    folder = Path(found.origin).parent
    text = (folder / "version.py").read_text(encoding="utf-8")
    version = re.search(r"^__version__ = '([^']+)'", text, re.MULTILINE)
    name = version.group(1) if version else "unknown"
    if not re.search(r"^cuda\b.*= '[\d.]+'", text, re.MULTILINE) or not (folder / "lib" / "libtorch_cuda.so").exists():
        fix = GET_CUDA.format(version=name.partition("+")[0])
        raise InputError(f"torch {name} in {folder} is a build without CUDA. {fix}")
    return Torch(folder, name)


def transformer_engine() -> list[Path]:
    """The libraries of Transformer Engine that are installed: its core, and its part for torch."""
    found = importlib.util.find_spec("transformer_engine")
    places = [] if found is None else list(found.submodule_search_locations or ())
    return [path for place in places for path in sorted(Path(place).rglob("*transformer_engine*.so"))]


def cache_root() -> Path:
    """The folder of all builds: nullgpu below the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "megatron_tempo" / "nullgpu"


def key(torch: Torch, sources: Path = SOURCES) -> str:
    """Names a build: a hash of the sources, the flags, torch's version and place, and Transformer Engine."""
    digest = hashlib.sha256()
    for path in sorted(path for path in sources.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(sources)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    digest.update(repr((FLAGS, LINK, WANTED.pattern, torch.version, str(torch.folder), platform.machine())).encode())
    for library in transformer_engine():
        status = library.stat()
        digest.update(repr((str(library), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()[:20]


def compiler() -> list[str]:
    """The C compiler: $CC, or gcc. Raises InputError if it is not there."""
    words = shlex.split(os.environ.get("CC") or "gcc")
    for tool, package in ((words[0], "gcc"), ("nm", "binutils")):
        if shutil.which(tool) is None:
            raise InputError(
                f"{tool} is not on PATH: the null GPU and Triton's launchers are compiled at first use. Install it "
                f"(apt-get install {package}, dnf install {package}, or module load {package})"
                + (", or name one that is there, such as CC=gcc-13" if tool == words[0] else "")
            )
    return words


def include_folders() -> list[Path]:
    """The folders with NVIDIA's headers. Raises InputError that names the header that is in none of them."""
    found = importlib.util.find_spec("nvidia")
    places = [] if found is None else list(found.submodule_search_locations or ())
    folders = [path for place in places for path in sorted(Path(place).glob("*/include"))]
    toolkit = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders.append(Path(toolkit) / "include")
    for header, package in HEADERS.items():
        if not any((folder / header).exists() for folder in folders):
            raise InputError(
                f"{header} is in none of {', '.join(map(str, folders))}: the null GPU is compiled with the headers of "
                f"torch's dependencies. Reinstall torch with them (pip install {package}), or set CUDA_HOME to a CUDA "
                "toolkit of torch's version"
            )
    return [folder for folder in folders if folder.is_dir()]


def _build(torch: Torch, folder: Path) -> None:
    """Of processes that build at once, the first to finish gives its folder the name."""
    gcc, includes = compiler(), include_folders()
    try:
        with atomic_folder(folder) as temporary:
            _compile(gcc, includes, torch, temporary)
    except OSError as error:
        if not folder.is_dir():
            raise InputError(
                f"{folder.parent}, where the null GPU is kept, cannot be written: {error.strerror}. Set "
                "XDG_CACHE_HOME to a folder that can"
            ) from error


def _compile(gcc: list[str], includes: list[Path], torch: Torch, folder: Path) -> None:
    """The three libraries, each of its files and of generated stubs."""
    flags = [*FLAGS, *(f"-I{path}" for path in includes), "-idirafter", str(SOURCES / "shim"), f"-I{SOURCES}"]
    objects = folder / "objects"
    objects.mkdir()

    def compiled(source: Path) -> Path:
        target = objects / f"{source.stem}.o"
        _run([*gcc, *flags, "-c", str(source), "-o", str(target)])
        return target

    def linked(name: str, parts: list[Path], stubs: str) -> None:
        generated = objects / f"stubs_{name.partition('.')[0]}.c"
        generated.write_text(stubs, encoding="utf-8")
        parts = [*parts, compiled(generated)]
        _run([*gcc, *LINK, f"-Wl,-soname,{name}", *map(str, parts), "-o", str(folder / name), "-ldl", "-lpthread"])

    runtime = [compiled(path) for path in sorted(SOURCES.glob("*.c")) if path.name not in (*DRIVER, *NVML)]
    linked(PRELOAD, runtime, stub_source(_wanted(torch) - _defined(runtime)))
    driver = [compiled(SOURCES / name) for name in DRIVER]
    versions = "".join(f'"{name}", ' for name in current_versions(includes))
    table = f"const char *const nullgpu_current_versions[] = {{{versions}NULL}};\n"
    linked("libcuda.so.1", driver, stub_source(driver_names(includes) - _defined(driver)) + table)
    linked("libnvidia-ml.so.1", [compiled(SOURCES / name) for name in NVML], stub_source(set()))
    shutil.rmtree(objects)


def _run(command: list[str]) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | {"LC_ALL": "C"}, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise InputError(
            f"the null GPU cannot be built: {command[0]} failed with status {done.returncode}: "
            f"{lines[0] if lines else 'no message'}. The headers may be of another CUDA version than torch's: "
            "reinstall torch with its dependencies. The command: " + shlex.join(command)
        )
    return done.stdout


def _symbols(path: Path, *options: str) -> set[str]:
    lines = _run(["nm", *options, str(path)]).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.split()}


def _defined(objects: list[Path]) -> set[str]:
    return set().union(*(_symbols(path, "--defined-only", "--extern-only") for path in objects))


def _wanted(torch: Torch) -> set[str]:
    """The functions of the runtime, cuBLAS and NCCL that torch and Transformer Engine call."""
    users = [*sorted((torch.folder / "lib").glob("*.so")), *transformer_engine()]
    names = set().union(*(_symbols(path, "--dynamic", "--undefined-only") for path in users))
    return {name for name in names if WANTED.match(name) and not KEPT.match(name)}


def driver_names(includes: list[Path]) -> set[str]:
    """Every function that cuda.h declares, by the name that a library has for it (cuMemAlloc is cuMemAlloc_v2)."""
    declared = set(re.findall(r"CUresult\s+CUDAAPI\s+(cu[A-Z]\w+)\s*\(", _driver_header(includes)))
    return declared | set(current_versions(includes))


def current_versions(includes: list[Path]) -> list[str]:
    """The functions whose current version cuda.h names by a macro: cuMemAlloc_v2, and not cuStreamGetCtx_v2."""
    macro = r"^\s*#\s*define\s+(cu[A-Z]\w+)\s+(?:__CUDA_API_PT\w+\()?(\1_v\d+)\)?\s*$"
    return sorted({version for _, version in re.findall(macro, _driver_header(includes), re.MULTILINE)})


def _driver_header(includes: list[Path]) -> str:
    path = next(folder / "cuda.h" for folder in includes if (folder / "cuda.h").exists())
    return path.read_text(encoding="utf-8", errors="replace")


def stub_source(names: set[str]) -> str:
    """C for functions that return success. Those that nothing.txt does not name report their first call.

    A stub takes no arguments: the calling conventions of x86-64 and AArch64 let a function ignore its own.
    """
    text = (SOURCES / "nothing.txt").read_text(encoding="utf-8")
    silent = {line for line in text.split("\n") if line and not line.startswith("#")}
    lines = [
        "/* Generated by build.py. */",
        '#include "nullgpu.h"',
        "#define NOTHING(name) NULLGPU_API int name(void); int name(void) { return 0; }",
        "#define STUB(name) NULLGPU_API int name(void); int name(void) { static char is_told; "
        "if (!__atomic_exchange_n(&is_told, 1, __ATOMIC_RELAXED)) nullgpu_stub_called(#name); return 0; }",
    ]
    lines += [f"{'NOTHING' if name in silent else 'STUB'}({name})" for name in sorted(names)]
    return "\n".join(lines) + "\n"
