"""Time programs in the sandboxes: python tools/bench_code.py --programs 100 --workers 2

Each program is another one, so none is answered from the cache. They are small, so that what a sandbox costs is seen.
The same number of bare interpreters, which read one input each, is timed in between: the rate of the sandbox is given
as a part of theirs, because the machine may have other work. As root on cgroups of version 1 it also counts processor
time, that of the kernel included, by a group of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from megatron_tempo.config.choices import SandboxKind
from megatron_tempo.config.schema import CodeConfig
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.code_tests import ProgramTests
from megatron_tempo.rewards.sandbox import Interpreter, environment
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers

CGROUP = Path("/sys/fs/cgroup/cpuacct")
KINDS = {
    "inputs, 2 tests": (
        ProgramTests("inputs", cases=(("2 3\n", "5\n"), ("10 20\n", "30\n"))),
        "a, b = map(int, input().split())\nprint(a + b)  # {}",
    ),
    "inputs, 20 tests": (
        ProgramTests("inputs", cases=tuple((f"{i} 3\n", f"{i + 3}\n") for i in range(20))),
        "a, b = map(int, input().split())\nprint(a + b)  # {}",
    ),
    "calls, 20 tests": (
        ProgramTests("calls", names=("add",), cases=tuple(([i, 3], i + 3) for i in range(20))),
        "def add(a, b): return a + b  # {}",
    ),
    "asserts, 3 tests": (
        ProgramTests("asserts", names=("add",), code="\n".join(f"assert add({i}, 3) == {i + 3}" for i in range(3))),
        "def add(a, b): return a + b  # {}",
    ),
}


@contextmanager
def counted() -> Iterator[Path | None]:
    """A group for the processes that start inside, whose processor time the kernel counts; None where there is none."""
    try:
        group = Path(tempfile.mkdtemp(prefix="bench-code-", dir=CGROUP))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()))
        time.sleep(0.5)  # for processes that are ending
        group.rmdir()


def seconds_of(group: Path | None) -> float:
    return float("nan") if group is None else int((group / "cpuacct.usage").read_text()) / 1e9


def bare(count: int, workers: int) -> None:
    interpreter = Interpreter.find(None)
    command = [interpreter.path, *interpreter.options, "-c", "print(sum(map(int, input().split())))"]

    def run(_: int) -> None:
        subprocess.run(command, input=b"2 3\n", stdout=subprocess.DEVNULL, env=environment(), check=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, range(count)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", type=int, default=100, help="of each kind")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    count, workers = arguments.programs, arguments.workers
    print("| sandbox | kind | programs a minute | as a part of bare interpreters | processor time, ms |")
    print("|---|---|---|---|---|")
    with counted() as group:
        for kind in (SandboxKind.bubblewrap, SandboxKind.subprocess):
            with Verifiers(code=CodeConfig(kind, workers=workers)) as verifiers:
                try:
                    verifiers.check_sandbox()
                except InputError as error:
                    print(f"{kind.name}: {error}")
                    continue
                for name, (tests, body) in KINDS.items():
                    print(
                        f"| {kind.name} | {name} | {timed(verifiers, tests, body, count, workers, group)} |", flush=True
                    )


def timed(verifiers: Verifiers, tests: ProgramTests, body: str, count: int, workers: int, group: Path | None) -> str:
    """The cells of a row. Sandboxes and bare interpreters take turns."""
    answer = tests.write()
    items = [Item("code", "", f"```python\n{body.format(i)}\n```", answer) for i in range(count + 1)]
    verifiers.score(items[:1])  # the pool starts
    ours = theirs = used = 0.0
    parts = 4
    for part in range(parts):
        some = items[1 + part * count // parts : 1 + (part + 1) * count // parts]
        began, before = time.monotonic(), seconds_of(group)
        assert verifiers.score(some) == [1.0] * len(some)
        ours, used = ours + time.monotonic() - began, used + seconds_of(group) - before
        began = time.monotonic()
        bare(len(some), workers)
        theirs += time.monotonic() - began
    return f"{60 * count / ours:.0f} | {theirs / ours:.2f} | {1000 * used / count:.0f}"


if __name__ == "__main__":
    main()
