"""The process under the null GPU: imports the trainer once, then runs each rank in a fork, within bounds.

    python -m megatron_tempo.rehearsal.forks JOB.json

Prints a line of JSON for each rank that ends: {"rank": 0, "ended": null or why it was ended}.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

_LOOK = 0.1  # seconds between looks at a rank's process
_ANONYMOUS = re.compile(r"RssAnon:\s+(\d+) kB")


def main(job: Path) -> int:
    """Run the ranks of a job one after another. Returns the exit status."""
    given = json.loads(job.read_text())
    # imports here: an error in one of them, such as half an installation, is a finding of the rehearsal
    try:
        _imports(Path(given["model"]), Path(given["shape"]))
    except Exception:  # noqa: BLE001
        _say({"rank": None, "ended": traceback.format_exc()})
        return 0
    for rank in given["ranks"]:
        _say({"rank": rank, "ended": _bounded(given, rank)})
    return 0


def _imports(model: Path, shape: Path) -> None:
    """What a rank imports, once for all; and the model's folder, for which the weights' names are needed."""
    import megatron.core.pipeline_parallel.p2p_communication
    import torch

    import megatron_tempo.rehearsal.rank_run
    from megatron_tempo.config.model_shape import read_model_shape
    from megatron_tempo.rehearsal.model_folder import write_model_folder

    write_model_folder(model, read_model_shape(shape))
    assert not torch.cuda.is_initialized(), "a fork needs a CUDA that nobody has started"
    # torch refuses CUDA in a fork, for real drivers do; the null GPU's state is plain memory
    torch.cuda._is_in_bad_fork = lambda: False


def _say(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def _bounded(given: dict[str, Any], rank: int) -> str | None:
    """Run a rank in a fork. Returns why it was ended, None if it ended by itself."""
    pid = os.fork()
    if not pid:
        _in_fork(given, rank)
    started = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return None if status == 0 else _died(status)
        reason = None
        if (held := _anonymous(pid)) > given["host_gb"] * 1e9:
            reason = f"memory: its process holds {held / 1e9:.1f} GB of this machine's memory"
        elif time.monotonic() - started > given["seconds"]:
            reason = f"time: it runs for more than {given['seconds']:g} s"
        if reason is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return reason
        time.sleep(_LOOK)


def _in_fork(given: dict[str, Any], rank: int) -> None:
    """The rest of a rank's process."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive this process
        log = os.open(Path(given["results"]) / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from megatron_tempo.config.tree import load
        from megatron_tempo.rehearsal.lengths import Lengths
        from megatron_tempo.rehearsal.rank_run import Task, rehearse_rank, with_folders

        config = with_folders(load(given["config"]), Path(given["results"]) / f"run_{rank}", Path(given["model"]))
        result = Path(given["results"]) / f"rank_{rank}.json"
        rehearse_rank(Task(config, rank, given["world"], Lengths(*given["lengths"]), result, given["shared"]))
        code = 0
    except BaseException:  # noqa: BLE001 - the fork must not return into the caller
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
