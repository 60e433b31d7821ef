"""Judges one program by its tests, in a sandbox. The results that are expected never enter the program's sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from signal import SIGKILL, SIGXCPU
from types import TracebackType
from typing import Any, Literal, NamedTuple

from megatron_tempo.config.choices import SandboxKind
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.code_tests import ProgramTests, outputs_agree, results_agree
from megatron_tempo.rewards.sandbox import INSTALL, Sandbox, environment, sandboxes
from megatron_tempo.rewards.sandboxed.lines import Lines, send
from megatron_tempo.rewards.sandboxed.plain import encode

WALL = 10  # times a test's limit of processor time are its limit of time, because the machine may be busy
START_SECONDS = 60.0  # for a sandbox to start, on a busy machine
TRIES = 3  # for a sandbox to start
MESSAGE_BYTES = 2**22  # of a program's result in asserts
OUTPUT_BYTES = 2**20  # of a program's output beyond four times the longest that is right

Outcome = Literal["right", "wrong", "error", "timeout", "output"]


class SandboxError(RuntimeError):
    """A sandbox did not start: nothing is known about the program."""


class Verdict(NamedTuple):
    """The outcome of a program's tests, and its reason."""

    outcome: Outcome
    why: str = ""


@dataclass(frozen=True, slots=True)
class ProgramLimits:
    """The limits of one program."""

    seconds: float  # processor time of a test
    wall_seconds: float  # all tests of a program
    memory_mb: int


def judge(program: str, tests: ProgramTests, limits: ProgramLimits, sandbox: Sandbox) -> Verdict:
    """Run a program's tests until one fails. Raises SandboxError if the sandbox does not start, three times."""
    run = {"inputs": _by_inputs, "calls": _by_calls, "asserts": _by_asserts}[tests.kind]
    source = (tests.before, program)
    for attempt in range(TRIES):
        try:
            return run(source, tests, limits, sandbox)
        except SandboxError:
            if attempt == TRIES - 1:
                raise
    raise AssertionError("the last attempt returns or raises")


def first_working(kind: SandboxKind, python: str | None) -> tuple[Sandbox, list[str]]:
    """The best sandbox of those that `kind` allows that runs a program, and why better ones do not.

    Raises InputError if none does.
    """
    why: list[str] = []
    if kind is SandboxKind.auto and shutil.which("bwrap") is None:
        why.append(f"bubblewrap: there is no bwrap on PATH; {INSTALL}")
    for sandbox in sandboxes(kind, python):
        try:
            verdict = judge(_TRIAL, _TRIAL_TESTS, _TRIAL_LIMITS, sandbox)
        except (SandboxError, OSError) as error:
            why.append(f"{sandbox.name}: {error}")
            continue
        if verdict.outcome == "right":
            return sandbox, why
        why.append(f"{sandbox.name}: a trial program ended as {verdict.outcome} ({verdict.why})")
    fix = "give the container or the user the right to make namespaces, or rewards.code.sandbox=auto"
    raise InputError(f"rewards.code.sandbox={kind.name}: no sandbox works here: {'; '.join(why)}; {fix}")


_TRIAL = "import math, threading\nprint(input()[::-1])\nthreading.Thread(target=print, args=(math.comb(4, 2),)).start()"
_TRIAL_TESTS = ProgramTests("inputs", cases=(("abc\n", "cba\n6\n"),))
_TRIAL_LIMITS = ProgramLimits(seconds=20.0, wall_seconds=120.0, memory_mb=512)


class _Session:
    """A process in a sandbox that takes and returns messages."""

    def __init__(
        self, sandbox: Sandbox, longest: int, pipes: tuple[int, int] | None = None, passed: tuple[int, ...] = ()
    ) -> None:
        """`pipes`: the process's input and output, if they lead to another one. `passed`: more files that it gets."""
        given, taken = (subprocess.PIPE, subprocess.PIPE) if pipes is None else pipes
        self._errors = os.memfd_create("errors")
        self._name = sandbox.name
        try:
            self._process = subprocess.Popen(
                sandbox.command(),
                stdin=given,
                stdout=taken,
                stderr=self._errors,
                pass_fds=passed,
                cwd="/",
                env=environment(),
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            os.close(self._errors)
            raise SandboxError(f"the sandbox {self._name} failed: {error}") from error
        if self._process.stdin is not None and self._process.stdout is not None:
            os.set_blocking(self._process.stdin.fileno(), False)
            self._lines = Lines(self._process.stdout.fileno(), longest)

    def __enter__(self) -> _Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End all processes of the sandbox."""
        if self._process.returncode is None:  # not waited for yet: its number is its own
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        os.close(self._errors)

    def hello(self) -> None:
        try:
            said = self._lines.next(time.monotonic() + START_SECONDS)
        except (ValueError, TimeoutError, OverflowError):
            said = None
        if not isinstance(said, dict) or "hello" not in said:
            raise self.fault("it did not start")

    def send(self, message: Any, deadline: float) -> None:
        """Send a message. What cannot be sent is noticed when there is no reply."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, TimeoutError):
            send(self._process.stdin.fileno(), message, deadline)

    def reply(self, deadline: float) -> dict[str, Any] | Verdict:
        """The next message; without one, the verdict on a program that sends none."""
        try:
            reply = self._lines.next(deadline)
        except TimeoutError:
            return Verdict("timeout")
        except OverflowError:
            return Verdict("output")
        except (ValueError, RecursionError):
            return Verdict("error", "it sent what is no message")
        return reply if isinstance(reply, dict) else self.ended()

    def ended(self) -> Verdict:
        """The verdict on a program whose process has ended, or is about to."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return Verdict("error", "it closed its output")
        return _of_code(code)

    def fault(self, what: str) -> SandboxError:
        words = os.pread(self._errors, 2000, 0).decode("utf-8", "replace").strip()
        return SandboxError(f"the sandbox {self._name} failed: {what}{f' ({words[-500:]})' if words else ''}")


def _of_code(code: int) -> Verdict:
    if code in (-SIGXCPU, 128 + SIGXCPU):
        return Verdict("timeout")
    return Verdict("error", f"it ended with code {code}")


def _setup(role: str, limits: ProgramLimits, sandbox: Sandbox, file_bytes: int, **more: Any) -> dict[str, Any]:
    lock = {"memory_mb": limits.memory_mb, "seconds": limits.seconds, "file_bytes": file_bytes, **sandbox.lock()}
    return {"role": role, "lock": lock, **more}


def _by_inputs(source: tuple[str, str], tests: ProgramTests, limits: ProgramLimits, sandbox: Sandbox) -> Verdict:
    room = OUTPUT_BYTES + 4 * max(len(wanted) for _, wanted in tests.cases)
    end = time.monotonic() + limits.wall_seconds
    with _Session(sandbox, 6 * room + 1000) as session:  # JSON writes a character in up to six times its bytes
        session.hello()
        session.send(_setup("inputs", limits, sandbox, room, source=source), end)
        for given, wanted in tests.cases:
            deadline = min(end, time.monotonic() + WALL * limits.seconds)
            session.send({"input": given}, deadline)
            reply = session.reply(deadline)
            if isinstance(reply, Verdict):
                return reply
            if "fault" in reply:
                raise session.fault(str(reply["fault"]))
            verdict = _of_output(reply, wanted, limits)
            if verdict.outcome != "right":
                return verdict
    return Verdict("right")


def _of_output(reply: dict[str, Any], wanted: str, limits: ProgramLimits) -> Verdict:
    output, ended, seconds = reply.get("output"), reply.get("ended"), reply.get("cpu")
    if not isinstance(ended, int) or not isinstance(seconds, float) or not isinstance(output, str | None):
        return Verdict("error", "it sent what is no message")
    if seconds > limits.seconds:
        return Verdict("timeout")
    if ended != 0:
        return _of_code(ended)
    return Verdict("right" if output is not None and outputs_agree(output, wanted) else "wrong")


def _by_calls(source: tuple[str, str], tests: ProgramTests, limits: ProgramLimits, sandbox: Sandbox) -> Verdict:
    room = OUTPUT_BYTES + 4 * max(len(str(wanted)) for _, wanted in tests.cases)
    end = time.monotonic() + limits.wall_seconds
    with _Session(sandbox, room) as session:
        session.hello()
        session.send(_setup("calls", limits, sandbox, 0, source=source), end)
        if session.reply(time.monotonic() + START_SECONDS) != {"locked": True}:
            raise session.fault("it did not lock itself")
        verdict = _value(session, min(end, time.monotonic() + WALL * limits.seconds))
        for given, wanted in tests.cases:
            if isinstance(verdict, Verdict):
                return verdict
            arguments = [encode(one, _no_data) for one in given]
            deadline = min(end, time.monotonic() + WALL * limits.seconds)
            session.send({"do": "call", "of": tests.names[0], "arguments": arguments, "named": {}}, deadline)
            verdict = _value(session, deadline)
            if not isinstance(verdict, Verdict) and not results_agree(verdict["value"], wanted):
                return Verdict("wrong")
    return verdict if isinstance(verdict, Verdict) else Verdict("right")


def _value(session: _Session, deadline: float) -> dict[str, Any] | Verdict:
    """A reply with a value; a verdict if there is none."""
    reply = session.reply(deadline)
    if isinstance(reply, Verdict) or "value" in reply:
        return reply
    return Verdict("error", f"{reply.get('raised')}: {reply.get('message')}"[:200])


def _no_data(value: object) -> int:
    raise TypeError(f"JSON has no {type(value).__name__}")


def _by_asserts(source: tuple[str, str], tests: ProgramTests, limits: ProgramLimits, sandbox: Sandbox) -> Verdict:
    """The tests run in a sandbox of their own, next to the program's, to which two pipes lead."""
    end = time.monotonic() + limits.wall_seconds
    with ExitStack() as stack, _Pipe() as requests, _Pipe() as replies:
        program = stack.enter_context(_Session(sandbox, 0, (requests.reads, replies.writes)))
        requests.close(requests.reads)
        replies.close(replies.writes)
        passed = (requests.writes, replies.reads)
        examiner = stack.enter_context(_Session(sandbox, MESSAGE_BYTES, passed=passed))
        examiner.hello()
        with suppress(BrokenPipeError):  # the examiner notices
            send(requests.writes, _setup("calls", limits, sandbox, 0, source=source))
        requests.close(requests.writes)  # so that the program ends with the examiner
        setup = _setup("examiner", limits, sandbox, 0, longest=MESSAGE_BYTES, seconds=WALL * limits.seconds)
        setup |= {"requests": passed[0], "replies": passed[1], "names": tests.names, "call": tests.call}
        setup["lock"]["seconds"] = limits.wall_seconds
        examiner.send(setup | {"before": tests.before, "tests": tests.code}, end)
        reply = examiner.reply(end)
        if isinstance(reply, Verdict):
            return reply
        outcome, why = reply["outcome"], str(reply["why"])
        if outcome == "fault":
            raise program.fault(why)
        return program.ended() if (outcome, why) == ("error", "") else Verdict(outcome, why)


class _Pipe:
    """Two file descriptors, of which those that are open are closed at the end."""

    def __init__(self) -> None:
        self.reads, self.writes = os.pipe()
        self._open = {self.reads, self.writes}

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for place in list(self._open):
            self.close(place)

    def close(self, place: int) -> None:
        self._open.remove(place)
        os.close(place)
