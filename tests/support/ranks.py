"""Functions run in real gloo processes."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_ranks(function: Callable[..., Any], world: int, out: Path, *args: Any, timeout: float = 240) -> list[Any]:
    """Call a module's top-level `function(*args)` in `world` processes, as torchrun would; what each returns, by rank.

    Raises AssertionError with the output of the processes if one fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "call.pkl").write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        log = (out / f"rank{rank}.log").open("w")
        command = [sys.executable, "-m", "tests.support.ranks", str(out)]
        processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT))
    try:
        codes = [process.wait(timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((out / f"rank{rank}.log").read_text()[-3000:] for rank in range(world))
    assert not any(codes), f"exit codes {codes}\n{logs}"
    return [pickle.loads((out / f"rank{rank}.pkl").read_bytes()) for rank in range(world)]


def _main(out: Path) -> None:
    import importlib

    module, name, args = pickle.loads((out / "call.pkl").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    (out / f"rank{os.environ['RANK']}.pkl").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
