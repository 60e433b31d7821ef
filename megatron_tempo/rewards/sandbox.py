"""Where a program that is judged runs: in bubblewrap, or in a subprocess that locks itself.

Both run the same code (`rewards/sandboxed`) in a bare interpreter, with the same limits and the same filter of system
calls. Bubblewrap adds namespaces: no network, no other processes, and a file system with nothing in it but the
interpreter. The subprocess has Landlock in their place, where the kernel has it. docs/code.md says what each of them
protects from.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from megatron_tempo.config.choices import SandboxKind
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.sandboxed import lockdown

INSIDE = Path(__file__).parent / "sandboxed"
OLDEST = (3, 10)  # version of an interpreter
THREADS = 64  # of a program in bubblewrap, where they can be counted
TEMPORARY_BYTES = 2**24  # of a program's own files in bubblewrap
INSTALL = "apt install bubblewrap"
_BOOT = "import sys; sys.path[:1] = []; sys.path.append({!r}); from sandboxed.main import main; sys.path.pop(); main()"
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib64", "/lib32")  # libraries, and an interpreter of the system
_LINKER = "/etc/ld.so.cache"
_DEVICES = ("/dev/zero", "/dev/random", "/dev/urandom")


@dataclass(frozen=True, slots=True)
class Interpreter:
    """The Python that runs programs. `folders`: what it has to read."""

    path: str
    folders: tuple[str, ...]
    options: tuple[str, ...]

    @classmethod
    def find(cls, path: str | None) -> Interpreter:
        """`path`: None for this program's Python without its packages. Raises InputError if it does not run."""
        bare = () if path else ("-S",)
        executable = path or _own()
        ask = "import sys; print(sys.prefix, sys.base_prefix, *sys.version_info[:2], sep='\\n')"
        command = [executable, "-s", "-B", *bare, "-c", ask]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment())
        except (OSError, subprocess.SubprocessError) as error:
            raise InputError(f"rewards.code.python: {executable} does not run as a Python ({error})") from error
        *prefixes, major, minor = asked.stdout.split("\n")[:4]
        if (int(major), int(minor)) < OLDEST:
            needed = ".".join(map(str, OLDEST))
            raise InputError(f"rewards.code.python: {executable} is Python {major}.{minor}; give {needed} or later")
        folders = (*prefixes, *_libraries())
        return cls(executable, tuple(dict.fromkeys(folders)), ("-s", "-B", *bare))

    def command(self, folder: str) -> list[str]:
        return [self.path, *self.options, "-c", _BOOT.format(folder)]


class Sandbox(Protocol):
    """Where programs run."""

    @property
    def name(self) -> str: ...

    @property
    def gaps(self) -> Sequence[str]:
        """What it does not protect from."""

    def command(self) -> list[str]:
        """The command line of a process that runs `sandboxed.main`. File descriptors that are given to it arrive."""

    def lock(self) -> dict[str, Any]:
        """The fields of `lockdown.Lock` that depend on the sandbox."""


@dataclass(frozen=True, slots=True)
class Bubblewrap:
    """Namespaces by `bwrap`, as root or as an ordinary user."""

    interpreter: Interpreter
    bwrap: str
    has_sizes: bool  # whether this version can limit a file system in memory
    inside: Path = INSIDE
    name: str = "bubblewrap"
    filtered: bool = field(default_factory=lockdown.can_filter)

    @property
    def gaps(self) -> Sequence[str]:
        return [
            *([] if self.filtered else ["starting processes, until the program's time is up"]),
            "reading what is in /usr and in the interpreter's folder",
            "faults of the kernel",
        ]

    def command(self) -> list[str]:
        interpreter = self.interpreter.command("/code")
        mounts: list[str] = []
        for path in _SYSTEM:
            if os.path.islink(path):
                mounts += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                mounts += ["--ro-bind", path, path]
        outside = [folder for folder in self.interpreter.folders if not folder.startswith("/usr/") and folder != "/usr"]
        for folder in (_LINKER, *outside):
            mounts += ["--ro-bind-try", folder, folder]
        mounts += ["--ro-bind", str(self.inside), "/code/sandboxed", "--dev", "/dev", "--remount-ro", "/dev"]
        own = ["--size", str(TEMPORARY_BYTES), "--tmpfs", "/dev/shm", "--size", str(TEMPORARY_BYTES), "--tmpfs", "/tmp"]
        mounts += own if self.has_sizes else ["--dir", "/tmp"]
        return [
            *(self.bwrap, "--unshare-all", "--die-with-parent", "--new-session", "--hostname", "sandbox"),
            *(*mounts, "--remount-ro", "/", "--chdir", "/tmp", "--", *interpreter),
        ]

    def lock(self) -> dict[str, Any]:
        return {"processes": THREADS if self.filtered else 0, "readable": None, "filtered": self.filtered}


@dataclass(frozen=True, slots=True)
class Subprocess:
    """A process that locks itself. It sees the machine's processes and files by name, and can open none of them."""

    interpreter: Interpreter
    inside: Path = INSIDE
    name: str = "subprocess"
    filtered: bool = field(default_factory=lockdown.can_filter)
    landlock: int = field(default_factory=lockdown.landlock_version)

    @property
    def gaps(self) -> Sequence[str]:
        files = "reading, changing and removing this user's files: the kernel has no Landlock"
        calls = "the network, and signals to this user's processes: system calls cannot be filtered on this machine"
        return [
            *([] if self.landlock else [files]),
            *([] if self.filtered else [calls]),
            "a number of threads that only the limit on memory bounds",
            "seeing which files exist",
            "reading what is in the system's libraries and in the interpreter's folder",
            "faults of the kernel",
        ]

    def command(self) -> list[str]:
        return self.interpreter.command(str(self.inside.parent))

    def lock(self) -> dict[str, Any]:
        libraries = [path for path in _SYSTEM if path not in ("/usr", "/bin", "/sbin")]
        readable = [*libraries, "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", _LINKER, *_DEVICES]
        prefixes = [folder for folder in self.interpreter.folders if folder != "/usr"]
        return {
            "processes": None if self.filtered else 0,
            "readable": [*readable, *prefixes] if self.landlock else None,
            "filtered": self.filtered,
        }


def sandboxes(kind: SandboxKind, python: str | None) -> list[Bubblewrap | Subprocess]:
    """The sandboxes that `kind` allows and that are installed, the better ones first. They have not been tried.

    Raises InputError if there is none, or if `python` does not run.
    """
    interpreter = Interpreter.find(python)
    found: list[Bubblewrap | Subprocess] = []
    bwrap = shutil.which("bwrap")
    if kind is not SandboxKind.subprocess and bwrap is not None:
        found.append(Bubblewrap(interpreter, bwrap, "--size" in _help(bwrap)))
    if kind is not SandboxKind.bubblewrap:
        found.append(Subprocess(interpreter))
    if not found:
        raise InputError(f"rewards.code.sandbox=bubblewrap: there is no bwrap on PATH; {INSTALL}")
    return found


@contextmanager
def compiled(sandbox: Bubblewrap | Subprocess) -> Iterator[Sandbox]:
    """The same sandbox with its code compiled by its interpreter, which takes a third from the start of a program."""
    with TemporaryDirectory(prefix="sandboxed-") as folder:
        inside = Path(folder) / INSIDE.name
        shutil.copytree(INSIDE, inside, ignore=shutil.ignore_patterns("__pycache__"))
        command = [sandbox.interpreter.path, "-s", "-m", "compileall", "-q", str(inside)]
        subprocess.run(command, stdout=subprocess.DEVNULL, env=environment(), check=False)
        yield replace(sandbox, inside=inside)


def environment() -> dict[str, str]:
    """The environment of programs: nothing of this process's own but where libraries are."""
    own = {"LD_LIBRARY_PATH": os.environ["LD_LIBRARY_PATH"]} if os.environ.get("LD_LIBRARY_PATH") else {}
    return own | {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",  # so that the order of a set of strings, and with it a verdict, is the same each time
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
    }


def _own() -> str:
    """This program's Python outside its virtual environment."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    based = Path(sys.base_prefix) / "bin" / version
    return str(based if based.exists() else Path(sys.executable).resolve())


def _libraries() -> list[str]:
    return [path for path in os.environ.get("LD_LIBRARY_PATH", "").split(":") if path.startswith("/")]


def _help(bwrap: str) -> str:
    try:
        return subprocess.run([bwrap, "--help"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
