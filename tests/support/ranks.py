"""Functions run in real gloo processes.

The processes are kept from call to call: importing Megatron takes longer than most of what is tested in them. Each call
opens process groups of its own. After a failure all of them are ended, and the next call starts new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pickle
import select
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Pool:
    """Worker processes, started when they are first needed; worker i is rank i of every call that needs it.

    `paths` are searched for packages before the installed ones.
    """

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self.workers: list[subprocess.Popen[bytes]] = []

    def call(self, out: Path, world: int, timeout: float) -> list[int]:
        """Let the first `world` workers do the call in `out`: their exit codes, 0 for those that came to its end."""
        while len(self.workers) < world:
            self.workers.append(_start(self.paths))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank, worker in enumerate(self.workers[:world]):
            assert worker.stdin is not None
            worker.stdin.write(
                json.dumps({"out": str(out), "rank": rank, "world": world, "port": port}).encode() + b"\n"
            )
            worker.stdin.flush()
        deadline = time.monotonic() + timeout
        codes = [_answer(worker, deadline) for worker in self.workers[:world]]
        if any(codes):
            self.close()
        return codes

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
        self.workers = []


POOL = Pool()
WITH_TE = Pool(ROOT / "tests/support/te")  # the stand-in for Transformer Engine
for pool in (POOL, WITH_TE):
    atexit.register(pool.close)


def run_ranks(
    function: Callable[..., Any], world: int, out: Path, *args: Any, timeout: float = 240, pool: Pool = POOL
) -> list[Any]:
    """Call a module's top-level `function(*args)` in `world` processes, as torchrun would; what each returns, by rank.

    Their output is in `out`/rankN.log. Raises AssertionError with it if one fails or takes longer than `timeout` s.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "call.pkl").write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
    codes = pool.call(out, world, timeout)
    if any(codes):
        logs = "\n".join((out / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
        raise AssertionError(f"exit codes {codes}\n{logs}")
    return [pickle.loads((out / f"rank{rank}.pkl").read_bytes()) for rank in range(world)]


def _start(paths: tuple[Path, ...]) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(map(str, (ROOT, *paths)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "tests.support.ranks"]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _answer(worker: subprocess.Popen[bytes], deadline: float) -> int:
    assert worker.stdout is not None
    ready, _, _ = select.select([worker.stdout], [], [], max(0.0, deadline - time.monotonic()))
    if not ready:
        return -1  # it hangs
    return 0 if worker.stdout.readline() == b"done\n" else 1


def _serve() -> None:
    """Do the calls that come, one a line; a call that fails ends the process."""
    answers = os.fdopen(os.dup(1), "wb")
    for line in sys.stdin:
        call = json.loads(line)
        out, rank = Path(call["out"]), call["rank"]
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(call["world"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(call["port"]),
        }
        with _output_to(out / f"rank{rank}.log"):
            module, name, args = pickle.loads((out / "call.pkl").read_bytes())
            result = getattr(importlib.import_module(module), name)(*args)
        (out / f"rank{rank}.pkl").write_bytes(pickle.dumps(result))
        del result
        gc.collect()  # process groups in cycles: each keeps a thread that wakes a hundred times a second
        answers.write(b"done\n")
        answers.flush()


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Standard output and error of this process, and of those that it starts, into a file; an error's traceback too."""
    with path.open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()


if __name__ == "__main__":
    _serve()
