"""The process that runs programs: `python -m megatron_tempo.rewards.code_worker SANDBOX WORKERS PYTHON LIMITS`.

It starts sandboxes and compares outputs, so that neither holds the trainer's lock of Python. SANDBOX is one that was
tried, PYTHON a path or "", LIMITS the fields of `ProgramLimits` in JSON. Messages are lines of JSON. A request is
{"id", "answer", "programs"}; for each program comes a reply {"id", "index", "outcome", "why"}, or {"id", "index",
"fault"} if its sandbox does not start. The process ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_tempo.config.choices import SandboxKind
from megatron_tempo.rewards.code_run import ProgramLimits, SandboxError, judge
from megatron_tempo.rewards.code_tests import ProgramTests, read_tests
from megatron_tempo.rewards.sandbox import Sandbox, compiled, sandboxes
from megatron_tempo.rewards.sandboxed.lines import send


def main() -> None:
    kind, workers, python, limits = sys.argv[1:]
    with suppress(OSError):  # programs inherit it: if memory ends, the kernel ends them before the trainer
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")
    with compiled(sandboxes(SandboxKind[kind], python or None)[0]) as sandbox:
        serve(sandbox, int(workers), ProgramLimits(**json.loads(limits)))
    os._exit(0)  # what still runs ends with this process; nobody waits for it


def serve(sandbox: Sandbox, workers: int, limits: ProgramLimits) -> None:
    """Answer requests until the input ends."""
    replies, one_at_a_time = os.dup(1), threading.Lock()
    os.dup2(2, 1)

    def run(request: dict[str, Any], tests: ProgramTests, index: int) -> None:
        reply = _reply(request["programs"][index], tests, limits, sandbox)
        with one_at_a_time:
            send(replies, {"id": request["id"], "index": index, **reply})

    pool = ThreadPoolExecutor(workers, thread_name_prefix="program")
    for line in sys.stdin.buffer:
        request = json.loads(line)
        tests = read_tests(request["answer"])
        for index in range(len(request["programs"])):
            pool.submit(run, request, tests, index)
    pool.shutdown(wait=False, cancel_futures=True)


def _reply(program: str, tests: ProgramTests, limits: ProgramLimits, sandbox: Sandbox) -> dict[str, str]:
    try:
        verdict = judge(program, tests, limits, sandbox)
    except SandboxError as error:
        return {"fault": str(error)}
    except Exception as error:  # noqa: BLE001  # without a reply, the trainer would wait for ever
        return {"fault": f"{type(error).__name__}: {error}"}
    return {"outcome": verdict.outcome, "why": verdict.why}


if __name__ == "__main__":
    main()
