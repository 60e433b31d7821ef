"""The process that compares mathematical answers: `python -m megatron_tempo.rewards.math_worker MEMORY_MB SECONDS`.

Requests come as JSON lines {"answer", "response"} on standard input, replies {"correct", "retire"} go to standard
output; "retire" asks for a fresh process. The first reply says that the libraries are loaded. `math.py` keeps the time;
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
    boxed = last_boxed(response)
    if boxed is not None:
        if not boxed.strip() or len(boxed) > ANSWER_CHARS:
            return False
        if boxed.strip() == answer.strip():
            return True
        found = parse(f"\\boxed{{{boxed}}}", BOXED_FIRST, parsing_timeout=None)
    else:
        found = parse(response[-TAIL_CHARS:], parsing_timeout=None)
    if not found:
        return False
    # An answer may be given boxed, in dollars, or bare.
    gold = answer if "\\boxed" in answer or answer.startswith("$") else f"\\boxed{{{answer}}}"
    return verify(parse(gold, BOXED_FIRST, parsing_timeout=None), found, timeout_seconds=None)


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
            verdict, exhausted = correct(request["answer"], request["response"]), False
        except MemoryError:
            verdict, exhausted = False, True
        # What sympy caches must not leave too little for the items to come.
        retire = exhausted or process.memory_info().vms > memory / 2
        print(json.dumps({"correct": verdict, "retire": retire}), file=replies, flush=True)


if __name__ == "__main__":
    main()
