"""The process under the null GPU: imports the trainer once, then runs each rank in a fork, within bounds.

    python -m megatron_tempo.rehearsal.forks JOB.json

Prints a line of JSON when the imports are done, and one for each rank that ends.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import re
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tempo.nullgpu import guard
from megatron_tempo.rehearsal.faults import fault_of

# What a rank would otherwise import late, each anew.
_LATE = (
    "megatron.core.pipeline_parallel.p2p_communication",
    "triton.compiler",
    "torch._dynamo",
    "triton.experimental.gluon",
)
_LOOK = 0.1  # seconds between looks at a rank's process
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


def main(job: Path) -> int:
    """Run the ranks of a job one after another. Returns the exit status."""
    given = json.loads(job.read_text())
    _end_with(given["parent"])
    fault = None
    try:
        _prepare([Path(case["folder"]) for case in given["cases"]])
    except Exception as error:  # noqa: BLE001 - an import that fails, as of half an installation, is a finding
        fault = asdict(fault_of(error, "imports"))
    _say({"fault": fault})
    for case in given["cases"] if fault is None else ():
        for rank in case["ranks"]:
            _say({"fault": None, "rank": rank} | _bounded(case, rank))
    return 0


def _prepare(folders: Sequence[Path]) -> None:
    """Import what a rank imports, once for all, and write each case's model folder."""
    from megatron_tempo.models.megatron_compat.transformer_engine import check_import

    check_import()  # before the first import of Megatron-Core
    importlib.import_module("megatron_tempo.rehearsal.rank_run")
    for name in _LATE:
        importlib.import_module(name)
    import torch
    from triton.runtime.cache import triton_key

    from megatron_tempo.config.tree import load
    from megatron_tempo.plan.shapes import shape_of
    from megatron_tempo.rehearsal.model_folder import write_model_folder

    guard.rehearse()
    for folder in folders:
        shape, problems = shape_of(load(folder / "config.json"))
        assert shape is not None, problems
        write_model_folder(folder / "model", shape)
    assert not torch.cuda.is_initialized(), "a fork needs a CUDA that nobody has started"
    triton_key()  # a hash of Triton's files, which each rank would compute anew
    gc.collect()
    gc.freeze()  # half a million objects of the imports, as the trainer does
    # torch refuses CUDA in a fork, because real drivers do; the null GPU's state is plain memory
    torch.cuda._is_in_bad_fork = lambda: False


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def _bounded(given: dict[str, Any], rank: int) -> dict[str, Any]:
    """Run a rank in a fork. Returns why it was ended (None: it ended by itself), its seconds, its peak of memory."""
    parent, pid = os.getpid(), os.fork()
    if not pid:
        _in_fork(given, rank, parent)
    started, most, reason = time.monotonic(), 0, None
    while True:
        done, status, used = os.wait4(pid, os.WNOHANG)
        seconds = time.monotonic() - started
        if done:
            reason = reason or (None if status == 0 else _died(status))
            cpu = used.ru_utime + used.ru_stime
            return {"ended": reason, "seconds": seconds, "cpu_seconds": cpu, "host": most}
        most = max(most, _anonymous(pid))
        if most > given["host_gb"] * 1e9:
            reason = f"its process holds {most / 1e9:.1f} GB of this machine's memory: allow more with --host-gb"
        elif seconds > given["seconds"]:
            reason = f"it runs for more than {given['seconds']:g} s: allow more with --seconds"
        if reason is not None:
            os.kill(pid, signal.SIGKILL)
        time.sleep(_LOOK)


def _in_fork(given: dict[str, Any], rank: int, parent: int) -> None:
    """The rest of a rank's process."""
    code = 1
    try:
        _end_with(parent)
        folder = Path(given["folder"])
        log = os.open(folder / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from megatron_tempo.config.tree import load
        from megatron_tempo.rehearsal.lengths import Lengths
        from megatron_tempo.rehearsal.rank_run import Task, rehearse_rank, with_folders

        config = with_folders(load(folder / "config.json"), folder / f"run_{rank}", folder / "model")
        result = folder / f"rank_{rank}.json"
        if given["plant"] is not None:
            pkgutil.resolve_name(given["plant"])()
        rehearse_rank(Task(config, rank, given["world"], Lengths(*given["lengths"]), result, given["shared"]))
        code = 0
    except BaseException:  # noqa: BLE001 - the fork must not return into the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _end_with(parent: int) -> None:
    """Let Linux end this process when its parent ends, however that ends. `parent`: its process id."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it has ended meanwhile
        os._exit(1)


def _died(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"crash: its process ended with {signal.Signals(-code).name if code < 0 else f'status {code}'}"


def _anonymous(pid: int) -> int:
    """Bytes of memory that a process alone holds: not the files it maps, not what is reserved."""
    try:
        found = _ANONYMOUS.search(Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
