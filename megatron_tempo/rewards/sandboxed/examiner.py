"""Runs the code of tests, in a sandbox of its own, on functions that are in the program's sandbox.

The program's names are `Remote`s here. A call sends plain data there and gets plain data back. No code of the program
runs in this process, so its verdict is that of the tests.
"""

from __future__ import annotations

import builtins
import os
import time

from .lines import Lines, send
from .lockdown import Lock, lock
from .plain import decode, encode

TYPE_CHECKING = False  # as in plain.py
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Lost(BaseException):
    """The program ended, took too long, or sent what is no message. No test can catch it."""


class Program:
    """The other end: a process that runs `program.answer_calls`."""

    def __init__(self, requests: int, replies: Lines, seconds: float) -> None:
        self._requests = requests
        self._replies = replies
        self._seconds = seconds  # for each reply
        self.lost: str | None = None  # why there is no program any more, whatever the tests catch

    def reply(self) -> Any:
        """The next message. Raises `Lost`."""
        if self.lost is not None:
            raise self.gone(self.lost)
        try:
            reply = self._replies.next(time.monotonic() + self._seconds)
        except TimeoutError:
            raise self.gone("timeout") from None
        except OverflowError:
            raise self.gone("output") from None
        except (ValueError, RecursionError, MemoryError):
            raise self.gone("error") from None
        if not isinstance(reply, dict):
            raise self.gone("error")
        return reply

    def gone(self, why: str) -> Lost:
        self.lost = why
        return Lost(why)

    def do(self, what: str, of: str | int, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
        """The result. Raises what the program raises, as one of Python's own exceptions."""
        request = {
            "do": what,
            "of": of,
            "arguments": [encode(one, _number) for one in arguments],
            "named": {name: encode(one, _number) for name, one in (named or {}).items()},
        }
        try:
            send(self._requests, request)
        except BrokenPipeError:
            raise self.gone("error") from None
        return self.value(self.reply())

    def value(self, reply: dict[str, Any]) -> Any:
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            raise _made(kind if known else RuntimeError, str(reply.get("message")))
        try:
            return decode(reply["value"], lambda number: Remote(self, number))
        except (ValueError, KeyError, RecursionError, MemoryError):
            raise self.gone("error") from None


def _made(kind: Any, message: str) -> Exception:
    try:
        error: Exception = kind(message)
    except Exception:  # noqa: BLE001
        return RuntimeError(message)
    return error


class Remote:
    """A function, class or object of the program. It equals nothing but itself."""

    __slots__ = ("_number", "_program")

    def __init__(self, program: Program, number: str | int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return _do(self, "call", arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _do(self, "getattr", (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        _do(self, "setattr", (name, value))

    def __getitem__(self, key: Any) -> Any:
        return _do(self, "getitem", (key,))

    def __iter__(self) -> Any:
        iterator = _do(self, "iter")
        return iterator if isinstance(iterator, Remote) else iter(iterator)

    def __next__(self) -> Any:
        return _do(self, "next")

    def __len__(self) -> int:
        return int(_do(self, "len"))

    def __bool__(self) -> bool:
        return bool(_do(self, "bool"))

    def __str__(self) -> str:
        return str(_do(self, "str"))


def _do(remote: Remote, what: str, arguments: tuple[Any, ...] = (), named: dict[str, Any] | None = None) -> Any:
    program: Program = object.__getattribute__(remote, "_program")
    return program.do(what, _number(remote), arguments, named)


def _number(value: Any) -> Any:
    """The number of a kept value, for `encode`."""
    if not isinstance(value, Remote):
        raise TypeError(f"a test cannot give a program a value of the type {type(value).__name__}")
    return object.__getattribute__(value, "_number")


def examine(setup: dict[str, Any], how: Lock, program: Program, verdicts: int) -> None:
    """Run the tests and send {"outcome", "why"}: "right", "wrong", "error", "timeout", "output" or "fault".

    `setup`: "before", code that is run first; "names" of the program that the tests use; "tests", the code; "call",
    the name of a function of the tests that takes the program's first name, or None.
    """
    try:
        started = "hello" in program.reply() and program.reply() == {"locked": True}
    except Lost:
        started = False
    if not started:
        send(verdicts, {"outcome": "fault", "why": "the program's sandbox did not start"})
        return
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(0, 2)
    lock(how)
    outcome = _outcome(lambda: _run(setup, program))
    send(verdicts, outcome if program.lost is None else {"outcome": program.lost, "why": ""})


def _run(setup: dict[str, Any], program: Program) -> None:
    program.value(program.reply())  # that it was loaded
    names: dict[str, Any] = {"__name__": "tests"}
    exec(compile(setup["before"], "before.py", "exec"), names)
    remotes = {name: Remote(program, name) for name in setup["names"]}
    names.update(remotes)
    exec(compile(setup["tests"], "tests.py", "exec"), names)
    if setup["call"] is not None:
        names[setup["call"]](remotes[setup["names"][0]])


def _outcome(run: Callable[[], None]) -> dict[str, str]:
    try:
        run()
    except AssertionError as error:
        return {"outcome": "wrong", "why": str(error)[:200]}
    except BaseException as error:  # noqa: BLE001
        return {"outcome": "error", "why": f"{type(error).__name__}: {error}"[:200]}
    return {"outcome": "right", "why": ""}
