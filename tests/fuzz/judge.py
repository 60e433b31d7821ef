"""Runs a case in a process of its own, with bounded time and memory, and says what was wrong with what it did."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from megatron_tempo.errors import InputError, hidden, printable

OUTPUT = 100_000  # characters that a command may print
_WARNING = re.compile(r"\b[A-Z]\w{1,60}Warning: ")  # of a library


@dataclass(frozen=True, slots=True)
class Command:
    """`run`: returns the exit status. `may_write`: names in the case's folder that the command may make or change."""

    text: str
    run: Callable[[], int]
    statuses: tuple[int, ...] = (0, 2)
    may_write: tuple[str, ...] = ()


@dataclass(slots=True)
class Case:
    """`names`: a message about the input has at least one of them in it. `done`: what was damaged, in words."""

    commands: list[Command]
    names: list[str]
    done: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one command: seconds of processor time, and bytes in addition to what the program has when it starts. Of a
    case: seconds by the clock, after which it hangs if it waits, and is only slow if it computes."""

    processor: int = 10
    memory: int = 1 << 30
    clock: float = 60.0


def faults(make: Callable[[Path], Case], limits: Limits, keep: Path | None = None) -> list[str]:
    """Make a case in a new folder, run its commands, and return what is wrong, in words. Nothing: all is well.

    `keep`: where its files and `fuzz_case.txt`, which says what was done, stay; by default they are removed.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz", ignore_cleanup_errors=True) as made:
        folder, log = Path(made) / "case", Path(made) / "log"
        folder.mkdir()
        log.touch()
        ending = _in_child(lambda: _child(make, folder, log, limits), limits)
        output = log.read_text(encoding="utf-8", errors="backslashreplace")
        if keep is not None:
            shutil.copytree(made, keep, symlinks=True, ignore=_special, dirs_exist_ok=True)
        _make_removable(folder)
        if ending is not None:
            output += f"\nFAULT the case {ending}"
        parts = output.split("\nFAULT ")
        return [f"{part.strip()}\n{parts[0].strip()}" for part in parts[1:]]


def _in_child(work: Callable[[], None], limits: Limits) -> str | None:
    """Fork and wait. How the child ended, if it was not by itself."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            work()
            os._exit(0)
        except BaseException:  # noqa: BLE001 - of the fuzzer itself
            traceback.print_exc()
            os._exit(1)
    end = time.monotonic() + limits.clock
    status = None
    while status is None:
        done, code = os.waitpid(pid, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
        elif time.monotonic() > end and not (_computes(pid) and time.monotonic() < end + 20 * limits.clock):
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return f"hangs: more than {limits.clock:g} s by the clock"
        else:
            time.sleep(0.005)
    _end_group(pid)
    if status == -signal.SIGXCPU:
        return f"is slow: more than {limits.processor} s of processor time"
    return None if status == 0 else f"ends with status {status}"


def _computes(pid: int) -> bool:
    """Whether a process has a processor, or waits for nothing but one: on a busy machine that takes long."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _child(make: Callable[[Path], Case], folder: Path, log: Path, limits: Limits) -> None:
    with log.open("w", encoding="utf-8", errors="backslashreplace") as log_file:
        case = make(folder)
        os.chdir(folder)
        log_file.write("".join(f"  damaged: {printable(line)}\n" for line in case.done))
        _as_a_user()
        for command in case.commands:
            log_file.write(f"  command: {printable(command.text):.1000}\n")
            log_file.flush()
        for number, command in enumerate(case.commands):
            wrong, output = _one(command, case, folder, log.with_name(f"output{number}"), limits)
            if wrong:
                log_file.write(f"\nFAULT `{printable(command.text):.160}` {'; '.join(wrong)}\n")
                log_file.write(f"{_end_of(printable(output))}\n")
            log_file.flush()


def _one(command: Command, case: Case, folder: Path, output: Path, limits: Limits) -> tuple[list[str], str]:
    """What is wrong with a command, and its output."""
    before = snapshot(folder)
    _bound(limits)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), "utf-8", write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), "utf-8", "backslashreplace", write_through=True)
    wrong = []
    try:
        status = command.run()
    except SystemExit as error:  # argparse
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:  # noqa: BLE001 - what reaches the top is what we look for
        status = None
        wrong.append(f"raises {type(error).__name__}")
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    data = output.read_bytes()
    text = data.decode("utf-8", "replace")
    if status is not None and status not in command.statuses:
        wrong.append(f"exits with {status}, which it cannot")
    if status is not None:
        wrong += _wrong_text(data, text, status, case.names)
    after = snapshot(folder)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed := [name for name in changed if name not in command.may_write]:
        wrong.append(f"changes {', '.join(changed)}")
    return wrong, text


def _wrong_text(data: bytes, text: str, status: int, names: list[str]) -> list[str]:
    wrong = []
    if data.decode("utf-8", "ignore") != text:
        wrong.append("prints what is not UTF-8")
    if (code := hidden(text)) is not None:
        wrong.append(f"prints {code} as it is")
    if "Traceback (most recent call last)" in text:
        wrong.append("prints a traceback")
    if (warning := _WARNING.search(text)) is not None:
        wrong.append(f"prints a library's {warning[0]}")
    if len(text) > OUTPUT:
        wrong.append(f"prints {len(text)} characters")
    if status == 2 and not any(printable(name) in text for name in names):
        wrong.append(f"does not name any of {', '.join(names)}")
    return wrong


def snapshot(folder: Path) -> dict[str, str]:
    """By the name of everything below a folder: its kind and mode, and a hash of its contents."""
    contents = {}
    for path in _below(folder):
        status = path.lstat()
        content = b""
        if stat.S_ISLNK(status.st_mode):
            content = os.fsencode(os.readlink(path))
        elif stat.S_ISREG(status.st_mode) and os.access(path, os.R_OK, effective_ids=True):
            content = path.read_bytes()
        contents[str(path.relative_to(folder))] = f"{status.st_mode:o} {hashlib.sha256(content).hexdigest()}"
    return contents


def _below(folder: Path) -> list[Path]:
    """Everything in a folder. Not by rglob, which follows links and fails at those that cannot be followed."""
    return [Path(parent, name) for parent, folders, files in os.walk(folder) for name in (*folders, *files)]


def _bound(limits: Limits) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + limits.processor + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (size, resource.RLIM_INFINITY))


def _as_a_user() -> None:
    """Give up root's right to read files whose permissions forbid it."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version of the call, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _make_removable(folder: Path) -> None:
    """Give back the permissions that the case took; twice, because what is in a locked folder is seen only then."""
    for path in [*_below(folder), *_below(folder)]:
        if stat.S_ISDIR(path.lstat().st_mode):
            path.chmod(0o700)


def _special(folder: str, names: list[str]) -> list[str]:
    """What shutil cannot copy: pipes."""
    return [name for name in names if stat.S_ISFIFO(Path(folder, name).lstat().st_mode)]


def _end_of(text: str) -> str:
    """The last lines, without a traceback's markers."""
    lines = [line for line in text.strip().splitlines() if line.strip(" ^~")]
    return "\n".join(f"    {line:.300}" for line in lines[-12:])


def only(errors: tuple[type[Exception], ...], work: Callable[[], object]) -> int:
    """Call a function as a command: 2 if it raises InputError or one of `errors`, whose message is printed, else 0."""
    try:
        work()
    except (InputError, *errors) as error:
        print(printable(f"error: {error}"))
        return 2
    return 0
