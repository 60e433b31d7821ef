"""Runs functions in real gloo processes."""

from __future__ import annotations

import importlib
import pickle
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support.fork_server import FORK_SERVER, Forked, ForkServer
from tests.support.ports import reserve_port

AFTER_FAILURE = 20.0  # seconds in which the other ranks can fail too, and report why


def run_ranks(
    function: Callable[..., Any],
    world: int,
    out: Path,
    *args: Any,
    timeout: float = 240,
    server: ForkServer = FORK_SERVER,
) -> list[Any]:
    """Call a module's top-level `function(*args)` in `world` processes, as torchrun does. Returns the results by rank.

    Each call gets new processes. Their output is in `out`/rankN.log. Raises AssertionError with the output if a process
    fails or takes longer than `timeout` s.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "call.pkl").write_bytes(pickle.dumps((function.__module__, function.__qualname__, args)))
    for rank in range(world):
        for kind in ("log", "pkl"):
            (out / f"rank{rank}.{kind}").unlink(missing_ok=True)
    ranks = [
        server.call(
            "tests.support.ranks:call_as_rank", str(out), rank, environment=environment, log=out / f"rank{rank}.log"
        )
        for rank, environment in enumerate(rank_environments(world))
    ]
    codes = _wait(ranks, timeout)
    if any(codes):
        logs = "\n".join((out / f"rank{rank}.log").read_text(errors="replace")[-3000:] for rank in range(world))
        raise AssertionError(f"exit codes {codes}\n{logs}")
    return [pickle.loads((out / f"rank{rank}.pkl").read_bytes()) for rank in range(world)]


def rank_environments(world: int) -> list[dict[str, str]]:
    """The environment variables of each rank on one machine, with which torch.distributed finds the other ranks."""
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserve_port())}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def call_as_rank(out: str, rank: int) -> None:
    """Run in each process: makes the call that `run_ranks` has saved."""
    folder = Path(out)
    module, name, args = pickle.loads((folder / "call.pkl").read_bytes())
    result = getattr(importlib.import_module(module), name)(*args)
    (folder / f"rank{rank}.pkl").write_bytes(pickle.dumps(result))


def _wait(ranks: Sequence[Forked], timeout: float) -> list[int]:
    """The exit codes. Ranks that do not end in time, or soon after another one has failed, are killed."""
    deadline = time.monotonic() + timeout
    while running := [rank for rank in ranks if rank.poll() is None]:
        if any(rank.returncode for rank in ranks):
            deadline = min(deadline, time.monotonic() + AFTER_FAILURE)
        left = deadline - time.monotonic()
        if left <= 0:
            for rank in running:
                rank.kill()
            break
        running[0].poll(min(left, 0.5))
    return [rank.wait() for rank in ranks]
