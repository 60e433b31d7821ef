"""Tells what an exception on the GPU path is, in which phase and where in this package it was raised."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_HERE = Path(__file__).resolve().parent

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Fault:
    """An error that a GPU run would have met.

    `where`: the innermost frame in this package, outside of the rehearsal. Bytes: `wanted` are those that were asked
    for, of an error out of memory; `allocated`, `reserved` and `largest_free` (piece) are torch's allocator's then.
    """

    kind: str
    phase: str
    where: str
    message: str
    wanted: int = 0
    traceback: str = ""
    allocated: int = 0
    reserved: int = 0
    largest_free: int = 0

    @property
    def in_pieces(self) -> bool:
        """Whether the memory that was asked for was free, but not in one piece."""
        free = self.reserved - self.allocated
        return self.kind == OUT_OF_MEMORY and 0 < self.wanted <= free


# Kinds of faults, the first that fits: by the exception's class and its message.
_KINDS: tuple[tuple[str, Callable[[str, str], object]], ...] = (
    (OUT_OF_MEMORY, lambda kind, text: kind == "OutOfMemoryError"),
    (
        "Transformer Engine cannot be imported",
        lambda kind, text: (
            text.startswith("Transformer Engine is installed")
            or ("mporterror" in kind.lower() and "transformer" in text)
        ),
    ),
    ("a module cannot be imported", lambda kind, text: kind in ("ImportError", "ModuleNotFoundError")),
    (
        "a kernel does not compile",
        lambda kind, text: (
            kind in ("CompilationError", "OutOfResources", "PTXASError", "UnsupportedLanguageConstruct")
            or "ptxas" in text
        ),
    ),
    (
        "a CPU tensor in an NCCL group, or a CUDA tensor in a CPU group",
        lambda kind, text: re.search(
            r"No backend type associated with device type|Tensors must be CUDA and dense", text
        ),
    ),
    (
        "tensors on different devices",
        lambda kind, text: re.search(
            r"same device|is on cpu, but|on device .* expected|different from other tensors|"
            r"cannot be accessed from Triton|not on the expected device|indices should be either on|found at least two",
            text,
        ),
    ),
    (
        "a size that FP8 does not take",
        lambda kind, text: re.search(r"(?i)fp8|float8", text) and re.search(r"(?i)divisib|multiple|shape|dim", text),
    ),
    (
        "a wrong type of numbers",
        lambda kind, text: re.search(
            r"(?i)dtype|scalar type|must have the same type|expected .* (got|found) (float|double|half|bf|int|long)",
            text,
        ),
    ),
    ("a wrong shape", lambda kind, text: re.search(r"(?i)shape|size of tensor|sizes|dimension", text)),
)


def fault_of(error: BaseException, phase: str) -> Fault:
    """The fault that an exception tells."""
    name, text = type(error).__name__, str(error)
    found = next((kind for kind, fits in _KINDS if fits(name, text)), "a Python error on the GPU path")
    wanted = _wanted(text) if found == OUT_OF_MEMORY else 0
    lines = "".join(traceback.format_exception(error))
    return Fault(found, phase, _frame(error), f"{name}: {_first_lines(text)}", wanted, lines)


def _frame(error: BaseException) -> str:
    """The innermost frame of this package; of the rehearsal's own code only if there is no other."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _PACKAGE in Path(frame.filename).resolve().parents]
    program = [frame for frame in own if _HERE not in Path(frame.filename).resolve().parents]
    for frame in reversed(program or own or list(frames)):
        path = Path(frame.filename).resolve()
        name = path.relative_to(_PACKAGE.parent) if _PACKAGE in path.parents else path.name
        return f"{name}:{frame.lineno} {frame.name}"
    return "unknown"


def _first_lines(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:700] or "no message"


_UNITS = {"B": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def _wanted(text: str) -> int:
    """Bytes that torch tried to allocate, from its message."""
    found = re.search(r"Tried to allocate ([\d.]+) (\w+)", text)
    return int(float(found[1]) * _UNITS.get(found[2], 0)) if found else 0
