"""Runs the parts one after another, each in a process group of its own that is killed at its time limit.

A part that hangs, crashes or fails does not stop the others. Files in the output folder:

    gpu_check.jsonl    one line for each part, written when it ends
    PART.log           what the part's processes printed
    PART.records       what it has found so far, one record a line
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path

from gpu_parts.__main__ import MISSING, NO_GPU
from gpu_parts.catalog import Part
from gpu_parts.records import Record, Verdict, read
from gpu_parts.setting import ROOT, Setting

RESULTS = "gpu_check.jsonl"
LEAST = 5.0  # a part is not started with less time than this, in seconds

# The command of a part's process.
Command = Callable[[Part, Setting], Sequence[str]]


class Status(Enum):
    """How a part ended."""

    passed = "passed"
    unchecked = "not checked (null GPU)"
    failed = "FAILED"
    error = "ERROR"
    crashed = "CRASHED"
    timed_out = "TIME LIMIT"
    missing = "not run: missing"
    no_gpu = "not run: no GPU"
    skipped = "not run: no time left"
    interrupted = "interrupted"

    @property
    def is_good(self) -> bool:
        """Whether the command as a whole may succeed. A missing package is no failure: the table names it."""
        return self in (Status.passed, Status.unchecked, Status.missing)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a part ended, after how many seconds, and what it has found. `message`: why, unless it passed."""

    part: str
    status: Status
    seconds: float
    message: str = ""
    records: tuple[Record, ...] = ()

    def line(self) -> str:
        return json.dumps(asdict(self) | {"status": self.status.value})

    def failures(self) -> list[Record]:
        return [record for record in self.records if record.verdict == Verdict.failed.value]


def run_parts(
    parts: Sequence[Part], setting: Setting, total: float, command: Command, python: str, patience: float = 1.0
) -> list[Outcome]:
    """Run the parts within `total` seconds; those for which no time is left are skipped. Ctrl-C ends the run.

    `patience`: a factor of each part's time limit.
    """
    setting.folder.mkdir(parents=True, exist_ok=True)
    deadline, outcomes = time.monotonic() + total, []
    with (setting.folder / RESULTS).open("w", encoding="utf-8") as results:
        for part in parts:
            left = deadline - time.monotonic()
            limit = min(patience * part.seconds, left)
            if left < LEAST:
                outcome = Outcome(part.name, Status.skipped, 0.0, f"the total of {total:.0f} s is used up")
            else:
                print(f"{part.name}: {part.shows} (at most {limit:.0f} s) ...", flush=True)
                outcome = run_part(part, replace(setting, seconds=limit), command(part, setting), python)
                print(f"  {outcome.status.value} after {outcome.seconds:.0f} s {outcome.message}".rstrip(), flush=True)
            outcomes.append(outcome)
            results.write(outcome.line() + "\n")
            results.flush()
            if outcome.status is Status.interrupted:
                break
    return outcomes


def run_part(part: Part, setting: Setting, command: Sequence[str], python: str) -> Outcome:
    """Run one part in a session of its own. Whatever it has started is killed when it ends."""
    folder = setting.folder
    log, records = folder / f"{part.name}.log", folder / f"{part.name}.records"
    records.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, *command, setting.written()],
            cwd=ROOT,
            env=environment(setting),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | Status = process.wait(timeout=setting.seconds)
        except subprocess.TimeoutExpired:
            code = Status.timed_out
        except KeyboardInterrupt:
            code = Status.interrupted
        finally:
            kill_group(process)
    return outcome_of(part, code, time.monotonic() - started, log, tuple(read(records)))


def kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # it leads its group, also after its own end
    process.wait()


def outcome_of(part: Part, code: int | Status, seconds: float, log: Path, records: tuple[Record, ...]) -> Outcome:
    verdicts = {record.verdict for record in records}
    last = last_line(log)
    if isinstance(code, Status):
        after = f"killed after {seconds:.0f} s" + (f", after the record {records[-1].name!r}" if records else "")
        return Outcome(part.name, code, seconds, f"{after}; {log}", records)
    if code == MISSING:
        return Outcome(part.name, Status.missing, seconds, last.removeprefix("missing: "))
    if code == NO_GPU:
        return Outcome(part.name, Status.no_gpu, seconds, last)
    if code < 0:
        return Outcome(part.name, Status.crashed, seconds, f"signal {signal.Signals(-code).name}; {log}", records)
    if code:
        return Outcome(part.name, Status.error, seconds, f"{last}; {log}", records)
    if Verdict.failed.value in verdicts:
        return Outcome(part.name, Status.failed, seconds, str(log), records)
    return Outcome(
        part.name, Status.unchecked if Verdict.unchecked.value in verdicts else Status.passed, seconds, "", records
    )


def last_line(log: Path) -> str:
    """The last line that says something: an exception's, when a part ends by one."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "no output")


def environment(setting: Setting) -> dict[str, str]:
    """The environment of a part's process: this checkout is imported, and no other."""
    variables = dict(os.environ)
    before = [variables["PYTHONPATH"]] if variables.get("PYTHONPATH") else []
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tools"), str(ROOT), *before])
    variables.setdefault("OMP_NUM_THREADS", "1" if setting.device == "cpu" else "4")
    variables["PYTHONUNBUFFERED"] = "1"
    variables["HF_HUB_OFFLINE"] = "1"
    variables.setdefault("PYTHONWARNINGS", "ignore")
    if setting.device == "cpu":
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each part, then what failed, then the figures."""
    lines = [f"{'part':13} {'status':24} {'s':>5}  checks"]
    for one in outcomes:
        compared = [record for record in one.records if record.verdict]
        passed = sum(record.verdict == Verdict.passed.value for record in compared)
        unchecked = sum(record.verdict == Verdict.unchecked.value for record in compared)
        checks = f"{passed} of {len(compared)} passed" if compared else ""
        checks += f", {unchecked} not checked" if unchecked else ""
        words = "; ".join(word for word in (checks, one.message) if word)
        lines.append(f"{one.part:13} {one.status.value:24} {one.seconds:5.0f}  {words}".rstrip())
    for one in outcomes:
        lines += [f"  {one.part}: {record.printed()}" for record in one.failures()]
    return "\n".join(lines)


def default_command(part: Part, _: Setting) -> Sequence[str]:
    return ["-m", "gpu_parts", part.name]


def exit_status(outcomes: Sequence[Outcome]) -> int:
    """0 if all parts that could run passed; 130 after Ctrl-C; else 1."""
    if any(one.status is Status.interrupted for one in outcomes):
        return 130
    return int(not all(one.status.is_good for one in outcomes))
