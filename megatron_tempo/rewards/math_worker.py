"""The process that compares mathematical answers: `python -m megatron_tempo.rewards.math_worker MEMORY_MB SECONDS`.

It loads sympy once and forks a child that serves requests, JSON lines on standard input, with replies on standard
output. A killed child is replaced within milliseconds. Each child begins with {"ready": its pid, "ended": how its
predecessor ended, as a return code}. Requests and replies:

    {"answer", "response"}   {"correct"}
    {"read": response}       {"statement", "kind", "unit", "form", "face", "value"}, or statement null
    {"equal": two statements, "by"}     {"equal"}
    {"gold": answer}         {"parsed"}

A request has an "id", which its reply repeats. A reply also has "exhausted", which says that the memory was
exhausted, and "retire", which requests a fresh child. `math_pool.py` enforces the time limit; the limit on processor
time here is for a worker whose trainer was killed.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import resource
import sys
import time
from dataclasses import astuple
from typing import Any, TextIO

import psutil
from math_verify import verify
from sympy import Integer

from megatron_tempo.rewards import math_equal
from megatron_tempo.rewards.math_reading import read, read_whole
from megatron_tempo.rewards.statement import Statement, stated

# Parsing, simplifying and comparing load parts of sympy on first use. That must not count as the first item's time.
WARM_UP = (
    ("x^2+1", r"\boxed{1+x^2}"),
    (r"\frac{\sqrt{2}}{2}", "The answer is $1/\\sqrt{2}$."),
    ("(1,2]", r"\boxed{(1, 2]}"),
    ("1", r"\boxed{x + \sin^2 x}"),
    ("6", "We get $x = 3$, and so it is 6 in all."),
)
CRASHES = 5  # consecutive children that end immediately before the worker gives up
AT_ONCE = 0.05  # seconds


def correct(answer: str, response: str) -> bool:
    """Whether the answer that the response states equals `answer`."""
    statement = stated(response)
    return statement is not None and math_equal.matches(read_whole(answer), read(statement))


def parsed(answer: str) -> bool:
    """Whether an answer has a value or is words. Otherwise only its own spelling equals it."""
    reading = read_whole(answer)
    return reading.value is not None or bool(reading.words)


def read_response(response: str) -> dict[str, Any]:
    """The answer that a response states, and the values that show which others it may equal (`math_equal.points`)."""
    statement = stated(response)
    reading = None if statement is None else read(statement)
    if statement is None or reading is None or reading.empty:
        return {"statement": None}
    face, value = (math_equal.points(part) for part in math_equal.face_and_value(reading))
    if face is None and reading.value is not None:
        # If it cannot even be compared with a number, it must not become an answer that others are compared with.
        verify([Integer(0)], [reading.value], timeout_seconds=None)
    marks = reading.marks
    return {
        "statement": astuple(statement),
        "kind": "%" * marks.percent + "deg" * marks.degrees + (f"base {marks.base}" if marks.base else ""),
        "unit": marks.unit,
        "form": reading.form if reading.form in ("set", "tuple") else "",
        "face": face,
        "value": value,
    }


def reply_to(request: dict[str, Any]) -> dict[str, Any]:
    if "read" in request:
        return read_response(request["read"])
    if "equal" in request:
        one, other = (read(Statement(*statement)) for statement in request["equal"])
        by = request["by"]
        # If `by` gives how a mark is read, the answer without a mark is the gold answer.
        return {"equal": math_equal.matches(one, other, by) or (by == "any" and math_equal.matches(other, one))}
    if "gold" in request:
        return {"parsed": parsed(request["gold"])}
    return {"correct": correct(request["answer"], request["response"])}


def main() -> int:
    memory, seconds = int(sys.argv[1]) * 2**20, float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # libraries that print must not write to the pipe
    for answer, response in WARM_UP:
        correct(answer, response)
    os.dup2(nowhere, 2)
    gc.freeze()  # so that children share the memory of loaded modules
    ended, crashes = None, 0
    while crashes < CRASHES:
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _serve(replies, ended, memory, seconds)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == 0:  # the input has ended
            return 0
        crashes = crashes + 1 if time.monotonic() - started < AT_ONCE and ended > 0 else 0
    return 1


def _serve(replies: TextIO, predecessor: int | None, memory: int, seconds: float) -> None:
    """Answer requests until the input ends."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # the child needs none of these
        resource.setrlimit(limit, (0, 0))
    print(json.dumps({"ready": os.getpid(), "ended": predecessor}), file=replies, flush=True)
    process = psutil.Process()
    for line in sys.stdin.buffer:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds) + 1, hard))
        request = json.loads(line)
        try:
            reply, exhausted = reply_to(request), False
        except MemoryError:
            reply, exhausted = {}, True
        except RecursionError:  # nested too deeply to be an answer
            reply, exhausted = {}, True
        # sympy's caches must leave enough memory for later items.
        retire = exhausted or process.memory_info().vms > memory / 2
        message = {**reply, "id": request["id"], "exhausted": exhausted, "retire": retire}
        print(json.dumps(message), file=replies, flush=True)


if __name__ == "__main__":
    sys.exit(main())
