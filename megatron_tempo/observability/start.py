"""Records how a job was started: starts.jsonl has one line per start, for the report."""

from __future__ import annotations

import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_tempo.observability.records import Record

_PACKAGES = ("megatron-tempo", "torch", "megatron-core", "transformer-engine", "triton", "transformers", "numpy")
_GIT_SECONDS = 10.0


def start_record(step: int, processes: int, gpus: Sequence[str], extensions: Mapping[str, str]) -> Record:
    """The line of a start that continues at `step`.

    `gpus` are the names of this node's GPUs, `extensions` the SHA-256 of the modules with the user's code, by name.
    """
    commit, changed = _commit()
    return {
        "time": round(time.time(), 3),
        "step": step,
        "command": command_line(),
        "folder": os.getcwd(),
        "commit": commit,
        "changed": changed,
        "versions": _versions(),
        "hardware": hardware(gpus),
        "gpus": list(gpus),
        "host": socket.gethostname(),
        "processes": processes,
        "extensions": dict(extensions),
    }


def changed_extensions(before: Sequence[Record], now: Mapping[str, str]) -> list[str]:
    """Names of the user's objects whose module's file differs from that of the last start that used them."""
    last: dict[str, str] = {}
    for start in before:
        last |= start.get("extensions", {})
    return [name for name, digest in now.items() if last.get(name, digest) != digest]


def command_line() -> str:
    """The command of this process, for a shell."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]] if sys.orig_argv else sys.argv)


def hardware(gpus: Sequence[str]) -> str:
    """A text: this node's GPUs, processor and memory."""
    cards = [f"{list(gpus).count(name)} x {name}" for name in dict.fromkeys(gpus)]
    gigabytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return ", ".join([*cards, f"{_processor()}, {os.cpu_count()} logical cores", f"{gigabytes:.0f} GB of memory"])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name.replace("megatron-tempo", "megatron_tempo")] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def _commit() -> tuple[str | None, bool]:
    """The commit of the checkout that this code is in, and whether its files differ from it; (None, False) if none.

    A submitted job runs from a copy, next to which the commit is written (`submit.snapshot`).
    """
    folder = Path(__file__).resolve().parents[2]
    revision, changes = folder.parent / "revision.txt", folder.parent / "changes.diff"
    if folder.name == "code" and revision.is_file():
        return revision.read_text().strip(), changes.is_file() and changes.stat().st_size > 0
    if not (folder / ".git").exists():
        return None, False
    commit = _git(folder, "rev-parse", "HEAD")
    return commit, bool(commit and _git(folder, "status", "--porcelain", "--untracked-files=no"))


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=_GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
