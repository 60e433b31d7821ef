"""The process that compares mathematical answers: `python -m megatron_tempo.rewards.math_worker MEMORY_MB SECONDS`.

Requests come as JSON lines on standard input, replies go to standard output: to {"answer", "response"} {"correct"}, to
{"known", "response"} {"equal", "answer"}. Both have "exhausted", which says that the memory did not suffice, and
"retire", which asks for a fresh process. The first reply says that the libraries are loaded. `math.py` keeps the time;
the limit on processor time here is for a worker whose trainer was killed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import psutil
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from megatron_tempo.rewards.answers import last_boxed
from megatron_tempo.rewards.math import ANSWER_CHARS

# Regular expressions of math-verify take quadratic time on a response without an answer.
TAIL_CHARS = 4000

# Parsing, simplifying and comparing load parts of sympy when first used. That is not to count on the first item's time.
WARM_UP = (
    ("x^2+1", r"\boxed{1+x^2}"),
    (r"\frac{\sqrt{2}}{2}", "The answer is $1/\\sqrt{2}$."),
    ("(1,2]", r"\boxed{(1, 2]}"),
)

BOXED_FIRST = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def correct(answer: str, response: str) -> bool:
    r"""Whether the response's answer, in its last \boxed{} or else where math-verify finds one, equals `answer`."""
    box = last_boxed(response)
    if box is not None and box.strip() == answer.strip():
        return True
    stated = statement(response)
    parsed = [] if stated is None else read(stated)
    if not parsed:
        return False
    # An answer may be given boxed, in dollars, or bare.
    gold = answer if "\\boxed" in answer or answer.startswith("$") else f"\\boxed{{{answer}}}"
    return verify(parse(gold, BOXED_FIRST, parsing_timeout=None), parsed, timeout_seconds=None)


def statement(response: str) -> str | None:
    """The part of a response that states its answer: its last box, or its end. None where the box holds no answer."""
    box = last_boxed(response)
    if box is None:
        return response[-TAIL_CHARS:]
    return f"\\boxed{{{box}}}" if box.strip() and len(box) <= ANSWER_CHARS else None


@lru_cache(maxsize=128)  # the answers of a question's responses, which are compared with one another
def read(stated: str) -> list[Any]:
    """What math-verify finds in a statement; empty where that is nothing."""
    if last_boxed(stated) is None:
        return parse(stated, parsing_timeout=None)
    return parse(stated, BOXED_FIRST, parsing_timeout=None)


def equal(known: Sequence[str], response: str) -> tuple[int | None, str | None]:
    """The place of the first of the known statements that says the same as the response, and the response's own.

    (None, None) where the response states nothing.
    """
    stated = statement(response)
    if stated is None or not read(stated):
        return None, None
    if stated in known:
        return known.index(stated), stated
    for place, other in enumerate(known):
        if verify(read(other), read(stated), timeout_seconds=None):
            return place, stated
    # What cannot even be compared with a number must not become an answer that others are compared with.
    verify(read("\\boxed{0}"), read(stated), timeout_seconds=None)
    return None, stated


def reply_to(request: dict[str, Any]) -> dict[str, Any]:
    if "known" in request:
        return dict(zip(("equal", "answer"), equal(request["known"], request["response"]), strict=True))
    return {"correct": correct(request["answer"], request["response"])}


def main() -> None:
    memory, seconds = int(sys.argv[1]) * 2**20, float(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    logging.disable(logging.CRITICAL)
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # libraries that print must not speak on the pipe
    for answer, response in WARM_UP:
        correct(answer, response)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    os.dup2(nowhere, 2)
    process = psutil.Process()
    for line in sys.stdin.buffer:
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds) + 1, hard))
        request = json.loads(line)
        try:
            reply, exhausted = reply_to(request), False
        except MemoryError:
            reply, exhausted = {}, True
        # What sympy caches must not leave too little for the items to come.
        retire = exhausted or process.memory_info().vms > memory / 2
        print(json.dumps({**reply, "exhausted": exhausted, "retire": retire}), file=replies, flush=True)


if __name__ == "__main__":
    main()
