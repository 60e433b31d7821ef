"""Runs the program that is judged, on standard input or by calls of its functions. All of it is inside the sandbox.

Nothing here is secret from the program, and no verdict is made here: it gets inputs, and what it returns is compared
elsewhere. A program that took this process over could do no more than send other outputs.
"""

from __future__ import annotations

import builtins
import gc
import os
import sys
import types

from .lines import Lines, send
from .lockdown import Lock, allow_seconds, lock
from .plain import decode, encode

TYPE_CHECKING = False  # as in plain.py
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

NAME = "program.py"
FUNCTIONS = "program"  # the module of a program whose functions are called: what is under its main guard does not run
# Modules that take a while to import, and run no code of others.
PRELOADED = (
    "typing",
    "collections",
    "heapq",
    "bisect",
    "random",
    "statistics",
    "datetime",
    "itertools",
    "functools",
    "copy",
)


def run_on_inputs(source: tuple[str, str], how: Lock, requests: Lines, replies: int) -> None:
    """For each request, {"input"}, run the program once. Reply: {"output", "ended", "cpu"}; {"fault"} if that fails.

    `source`: see `load`.
    "output": what it wrote, None if that is no UTF-8. "ended": its return code. "cpu": seconds.
    """
    for name in PRELOADED:
        if any(name in part for part in source):  # it may be imported by each run
            __import__(name)
    gc.freeze()  # each run leaves these objects alone at its end, which halves the time that it takes
    while (request := requests.next()) is not None:
        given, written = os.memfd_create("input"), os.memfd_create("output")
        with os.fdopen(os.dup(given), "wb") as file:
            file.write(request["input"].encode("utf-8", "surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
        locked, says = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(locked)
            _become(source, how, given, written, says)
            return  # the interpreter ends as after any script: it waits for threads and writes what is buffered
        os.close(says)
        is_locked = os.read(locked, 1) == b"+"
        _, status, usage = os.wait4(child, 0)
        if not is_locked:
            send(replies, {"fault": "a process could not lock itself"})
            return
        output = os.pread(written, how.file_bytes, 0)
        for place in (given, written, locked):
            os.close(place)
        ended = os.waitstatus_to_exitcode(status)
        send(replies, {"output": _text(output), "ended": ended, "cpu": usage.ru_utime + usage.ru_stime})


def _become(source: tuple[str, str], how: Lock, given: int, written: int, says: int) -> None:
    """Turn this process into the program's."""
    os.dup2(given, 0)
    os.dup2(written, 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    says = os.dup2(says, 3)
    os.closerange(4, 2**16)
    sys.stdin, sys.stdout = open(0, encoding="utf-8"), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8")  # noqa: SIM115
    lock(how)
    os.write(says, b"+")
    os.close(says)
    load(source, "__main__")


def load(source: tuple[str, str], name: str) -> dict[str, Any]:
    """Run a program as the module `name`. Its names.

    `source`: the question's code, and the program. If both are whole, one runs after the other: a program may begin
    with imports from `__future__`. Else the program continues the question's code.
    """
    module = types.ModuleType(name)
    module.__dict__["__file__"] = NAME
    sys.modules[name] = module
    sys.argv = [NAME]
    for missing in {"exit", "quit"} - vars(builtins).keys():  # of the module site, which is left out
        setattr(builtins, missing, sys.exit)
    try:
        parts = [compile(part, NAME, "exec", dont_inherit=True) for part in source]
    except (SyntaxError, ValueError):
        parts = [compile("\n".join(source), NAME, "exec", dont_inherit=True)]
    for part in parts:
        exec(part, module.__dict__)
    return module.__dict__


def answer_calls(source: tuple[str, str], how: Lock, requests: Lines, replies: int) -> None:
    """Load the program, then serve requests. Reply: {"value"}, or {"raised", "message"} with the exception's class.

    A request is {"do", "of", "arguments", "named"}. "of": a name of the program, or the number of a kept value.
    """
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)
    os.dup2(0, 2)
    lock(how)
    send(replies, {"locked": True})
    kept: list[Any] = []
    try:
        names = load(source, FUNCTIONS)
    except BaseException as error:  # noqa: BLE001
        send(replies, raised(error))
        return
    send(replies, {"value": None})

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    def of(number: int | str) -> Any:
        return _named(names, number) if isinstance(number, str) else kept[number]

    while (request := requests.next()) is not None:
        allow_seconds(how.seconds)
        try:
            arguments = [decode(one, of) for one in request["arguments"]]
            named = {name: decode(one, of) for name, one in request["named"].items()}
            reply = {"value": encode(_do(request["do"], of(request["of"]), arguments, named), keep)}
        except BaseException as error:  # noqa: BLE001
            reply = raised(error)
        send(replies, reply)


def raised(error: BaseException) -> dict[str, str]:
    try:
        message = str(error)[:1000]
    except Exception:  # noqa: BLE001
        message = ""
    return {"raised": next(_builtin_names(error), "Exception"), "message": message}


def _builtin_names(error: BaseException) -> Iterator[str]:
    """The names of the error's classes that are Python's own, the nearest first."""
    return (kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins")


def _named(names: dict[str, Any], name: str) -> Any:
    """A function of the program, or the method of this name of its class Solution."""
    if name in names:
        return names[name]
    if "Solution" in names:
        return getattr(names["Solution"](), name)
    raise NameError(f"name {name!r} is not defined")


def _do(what: str, of: Any, arguments: list[Any], named: dict[str, Any]) -> Any:
    if what == "call":
        return of(*arguments, **named)
    if what == "getattr":
        return getattr(of, arguments[0])
    if what == "setattr":
        return setattr(of, arguments[0], arguments[1])
    if what == "getitem":
        return of[arguments[0]]
    plain: dict[str, Any] = {
        "iter": iter,
        "next": next,
        "len": len,
        "str": str,
        "repr": repr,
        "bool": bool,
        "hash": hash,
    }
    return plain[what](of)


def _text(output: bytes) -> str | None:
    try:
        return output.decode("utf-8")
    except UnicodeDecodeError:
        return None
