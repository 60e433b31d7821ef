"""Compiles Triton kernels for Hopper (sm_90a) on a machine without a GPU.

A driver that only states the target GPU replaces CUDA's, and every launch compiles the kernel instead of running it. So
a test calls an operator as training does, and inspects what it would launch. The tools in Triton's wheel read the
registers, spills and instructions of the machine code. Do not use this in a process with Triton's interpreter.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as machine code.

    >>> Compiled(name="logprobs._summed", registers=48, stack=0, shared=1024, sass="...")
    """

    name: str  # file name without _triton, and the kernel's name
    registers: int  # per thread
    stack: int  # bytes of local memory per thread: spilled registers and indexed arrays
    shared: int  # bytes
    sass: str

    def count(self, instruction: str) -> int:
        """How often an instruction, given as a regular expression, occurs in the machine code."""
        return len(re.findall(rf"\b{instruction}\b", self.sass))

    @property
    def spills(self) -> int:
        """Instructions that move registers to local memory or back."""
        return self.count(r"(?:LDL|STL)[.\w]*")


class _Hopper(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def launches() -> Iterator[list[Compiled]]:
    """Collects the kernels that are launched in the block, in order."""
    compiled: list[Compiled] = []

    def launch(kernel: JITFunction[Any], grid: Any) -> Callable[..., None]:
        def compile_it(*args: Any, **kwargs: Any) -> None:
            file = kernel.__module__.rpartition(".")[2].removesuffix("_triton")
            compiled.append(_read(f"{file}.{kernel.__name__}", kernel.warmup(*args, grid=grid, **kwargs)))

        return compile_it

    usual = JITFunction.__getitem__
    JITFunction.__getitem__ = launch  # type: ignore[method-assign, assignment]
    triton.runtime.driver.set_active(_Hopper())
    try:
        yield compiled
    finally:
        JITFunction.__getitem__ = usual  # type: ignore[method-assign]


def _read(name: str, kernel: Any) -> Compiled:
    registers, stack, sass = _machine_code(kernel.asm["cubin"])
    return Compiled(name, registers, stack, kernel.metadata.shared, sass)


@cache  # several calls launch the same kernel, and reading one takes a second
def _machine_code(cubin: bytes) -> tuple[int, int, str]:
    """Registers and bytes of stack per thread, and the instructions."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def tool(*args: str) -> str:
            command = [str(TOOLS / "cuobjdump"), *args, str(path)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", tool("--dump-resource-usage"))
        assert usage is not None
        registers, stack = map(int, usage.groups())
        return registers, stack, tool("--dump-sass")
