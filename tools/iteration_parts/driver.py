"""Starts the stub server and the ranks of a measurement, and collects what they measured."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from iteration_parts import rank, stub_server
from iteration_parts.made import Size, configuration, preset_of, write_inputs

_LIMIT = 1800.0  # seconds of one measurement
_FORK = multiprocessing.get_context("fork")  # a rank shares the imports' memory with this process


@dataclass(frozen=True, slots=True)
class Measured:
    """The last iteration of a run, as each rank measured it (`rank.run_rank`)."""

    share: float
    ranks: int
    rows: int
    tokens: int
    wall: float  # seconds of the whole run, with its start
    by_rank: list[dict[str, Any]]

    def line(self) -> str:
        first = self.by_rank[0]["costs"]
        seconds = sum(cost["seconds"] for name, cost in first.items() if name != "worker processes")
        calls = sum(cost["calls"] for cost in first.values())
        return (
            f"{self.tokens:,} tokens in {self.rows} rows, {self.ranks} ranks: {seconds:.2f} s of processor time and "
            f"{calls} collective calls on the first rank ({self.wall:.0f} s in all)"
        )


def measure(size: Size, ranks: int, folder: Path) -> Measured:
    """Run an iteration of this size in this many processes. `folder`: for the inputs, and the run's files meanwhile.

    Raises RuntimeError with the end of a rank's log if one fails.
    """
    begun = time.monotonic()
    work, inputs = folder / f"{ranks}_{size.share:g}", folder / "inputs"
    work.mkdir(parents=True)
    if not inputs.exists():
        stage = preset_of(size.preset).stage2
        write_inputs(inputs, size.iterations * max(stage.labelled_prompts, stage.unlabelled_prompts))
    ours, theirs = _FORK.Pipe()
    server = _FORK.Process(target=stub_server.serve, args=(size.mean, theirs), daemon=True)
    server.start()
    try:
        address = f"http://127.0.0.1:{ours.recv()}"
        config = configuration(size, inputs, work / "run", [address], ranks)
        files = [work / f"rank{number}.json" for number in range(ranks)]
        port = _free_port()
        processes = [
            _FORK.Process(target=rank.run_rank, args=(number, ranks, port, config, file))
            for number, file in enumerate(files)
        ]
        _run(processes, files)
    finally:
        server.kill()
        server.join()
    records = [json.loads(file.read_text()) for file in files]
    shutil.rmtree(work)
    one = records[0]
    return Measured(size.share, ranks, one["rows"], one["tokens"], time.monotonic() - begun, records)


def _run(processes: list[BaseProcess], files: list[Path]) -> None:
    """Until all have ended. If one fails, the others are ended, because they wait for it."""
    for process in processes:
        process.start()
    deadline = time.monotonic() + _LIMIT
    try:
        while any(process.is_alive() for process in processes):
            time.sleep(0.05)
            failed = [i for i, process in enumerate(processes) if process.exitcode not in (None, 0)]
            if failed or time.monotonic() > deadline:
                time.sleep(1.0)  # others may say more
                number = failed[0] if failed else 0
                why = f"rank {number} failed" if failed else f"no end within {_LIMIT:.0f} s"
                raise RuntimeError(f"{why}\n{files[number].with_suffix('.log').read_text()[-4000:]}")
    finally:
        for process in processes:
            process.kill()
            process.join()
    if missing := [file for file in files if not file.exists()]:
        raise RuntimeError(f"{missing[0]} is not there\n{missing[0].with_suffix('.log').read_text()[-4000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
