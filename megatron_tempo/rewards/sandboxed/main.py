"""The first thing that runs in a sandbox: says hello, reads what it is to do, and does it."""

from __future__ import annotations

import os
import sys

from .examiner import Program, examine
from .lines import Lines, send
from .lockdown import Lock, end_with_parent
from .program import answer_calls, run_on_inputs

TYPE_CHECKING = False  # as in plain.py
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """Standard input and output carry messages; the first is {"role", "longest", "lock", ...}, by role:

    - "inputs", "calls": "source", the question's code and the program
    - "examiner": "requests" and "replies", the file descriptors of the program, "seconds" for each reply, and the
      setup of `examine`
    """
    end_with_parent()
    commands, answers = os.dup(0), os.dup(1)
    _give_way()
    send(answers, {"hello": os.getpid()})
    requests = Lines(commands, sys.maxsize)
    setup: dict[str, Any] | None = requests.next()
    if setup is None:
        return
    how = Lock(**setup["lock"])
    if setup["role"] == "inputs":
        run_on_inputs(setup["source"], how, requests, answers)
    elif setup["role"] == "calls":
        answer_calls(setup["source"], how, requests, answers)
    else:
        replies = Lines(setup["replies"], setup["longest"])
        examine(setup, how, Program(setup["requests"], replies, setup["seconds"]), answers)


def _give_way() -> None:
    """Let other processes have the processors first, and let the kernel end this one first if memory ends."""
    try:
        os.nice(10)
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("1000")
    except OSError:  # bubblewrap shows no /proc
        pass
