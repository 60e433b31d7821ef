"""Compare an iteration of GRPO with TRL's on the same work, on one core of a CPU: python tools/bench_trl.py

Both start from the same model folder and read the same prompts. An iteration of either generates the same number of
responses, computes their log-probabilities, and takes the same number of optimizer steps, in fp32. TRL runs in an
environment of its own (make .venv-trl/installed). Each program is one process with one thread. Their iterations
alternate, another one first in each round, on one core. The first iterations of each are not counted.

Times are processor seconds, so that other load on the machine counts less. Tables have medians over the rounds; the
ratio is TRL's median by ours. Responses are drawn by each program, so their lengths agree in distribution only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from trl_parts.work import WORKS, Work, write

TOOLS = Path(__file__).resolve().parent
ROOT = TOOLS.parent
PROGRAMS = {"ours": "trl_parts.ours", "TRL": "trl_parts.trl_grpo"}
PHASES = {  # of either program; what is left of an iteration is the actor's steps, and small things
    "generation": ("generate",),
    "log-probabilities": ("logprobs",),
}
Result = dict[str, Any]


class Program:
    """A running program, which does an iteration at each turn."""

    def __init__(self, python: str, module: str, words: list[str], core: int, log: Path) -> None:
        environment = os.environ | {"PYTHONPATH": f"{TOOLS}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self.log, self._module = log, module
        self._process = subprocess.Popen(
            [python, "-W", "ignore", "-m", module, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            env=environment,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        self._read()

    def turn(self) -> Result:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        result = self._read()
        self._read()  # ready for the next turn
        return result

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> Result:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._module} has ended; its last words:\n{self.log.read_text()[-2000:]}")
        result: Result = json.loads(line)
        return result


def measure(work: str, pythons: dict[str, str], rounds: int, skipped: int, core: int) -> dict[str, list[Result]]:
    """The counted iterations of each program."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model, prompts = write(WORKS[work], Path(folder))
        programs = {
            name: stack.enter_context(
                Program(
                    python,
                    PROGRAMS[name],
                    [work, str(model), str(prompts), f"{folder}/{name}"],
                    core,
                    Path(folder) / f"{name}.log",
                )
            )
            for name, python in pythons.items()
        }
        results: dict[str, list[Result]] = {name: [] for name in programs}
        for number in range(skipped + rounds):
            for name in list(programs) if number % 2 else reversed(programs):
                results[name].append(programs[name].turn())
        return {name: iterations[skipped:] for name, iterations in results.items()}


def table(results: dict[str, list[Result]]) -> str:
    """Medians of the seconds of each phase, and how many times ours is as fast."""
    rows = [["", *results, "ratio"], ["---"] * (len(results) + 2)]
    for phase in ["iteration", *PHASES, "actor and the rest"]:
        medians = [statistics.median(_seconds(one, phase) for one in results[name]) for name in results]
        ratio = f"{medians[-1] / medians[0]:.2f}" if len(medians) > 1 else ""
        rows.append([phase, *(f"{median:.3f} s" for median in medians), ratio])
    tokens = [statistics.mean(one["tokens"] for one in results[name]) for name in results]
    rows.append(["response tokens, mean", *(f"{count:,.0f}" for count in tokens), ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _seconds(result: Result, phase: str) -> float:
    if phase == "iteration":
        return float(result["seconds"])
    if phase in PHASES:
        return sum(result["phases"].get(name, 0.0) for name in PHASES[phase])
    return float(result["seconds"]) - sum(_seconds(result, other) for other in PHASES)


def described(work: Work) -> str:
    return f"{work.about}: {work.prompts} prompts x {work.samples} responses, {work.steps} optimizer steps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=str(ROOT / ".venv-trl" / "bin" / "python"), metavar="PYTHON")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=["quickstart", "jagged"])
    parser.add_argument("--rounds", type=int, default=7, help="iterations of each program that count")
    parser.add_argument("--skipped", type=int, default=2, help="iterations before those")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core that both use")
    parser.add_argument("--only", choices=list(PROGRAMS), help="one of the programs alone")
    asked = parser.parse_args()
    pythons = {"ours": sys.executable, "TRL": asked.trl_python}
    pythons = {name: python for name, python in pythons.items() if asked.only in (None, name)}
    if "TRL" in pythons and not Path(asked.trl_python).exists():
        parser.error(f"no {asked.trl_python}: make .venv-trl/installed, or give --trl-python")
    print(
        f"one core of {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, ", end=""
    )
    print(f"torch {torch.__version__}, medians of {asked.rounds} iterations, processor seconds")
    for name in asked.work:
        results = measure(name, pythons, asked.rounds, asked.skipped, asked.core)
        print(f"\n{described(WORKS[name])}\n\n{table(results)}", flush=True)


if __name__ == "__main__":
    main()
