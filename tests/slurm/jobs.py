"""Submits jobs to the SLURM of `tests.support.slurm` as a user does, and waits for them."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file

from megatron_tempo.config.tree import save
from megatron_tempo.observability.records import read_metrics
from tests.support.project import config_of, write_project
from tests.support.slurm import ROOT

ITERATIONS = 5  # of each stage
LAST = 2 * ITERATIONS
SITE = """\
# @package _global_
cluster:
  nodes: 2
  gpus_per_node: 1
  slurm:
    partition: debug
    time_limit: "30"
    interface: lo
    grace_seconds: 120
"""


class Site:
    """A folder with a small project and the cluster file `loopback`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "cluster").mkdir(parents=True)
        (folder / "cluster/loopback.yaml").write_text(SITE)
        config = config_of(write_project(folder / "project"), folder / "run")
        config.parallel.pipeline = 2  # a stage on each node
        config.stage1.iterations = config.stage2.iterations = ITERATIONS
        config.evaluation.every, config.checkpoint.every = 2, 0
        save(config, folder / "config.json")

    def tempo(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "megatron_tempo", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    def submit(self, run: str, *words: str, cluster: str = "loopback") -> subprocess.CompletedProcess[str]:
        where = ["--config-dir", str(self.folder), "--config", str(self.folder / "config.json"), f"cluster={cluster}"]
        return self.tempo("submit", *where, f"run.dir={self.folder / run}", *words)

    def started(self, run: str, *words: str) -> Submitted:
        done = self.submit(run, *words)
        assert done.returncode == 0, done.stderr
        match = re.search(r"submitted job ([\d> -]+) from (\S+);", done.stdout)
        assert match is not None, done.stdout
        return Submitted(self.folder / run, Path(match[2]), match[1].split(" -> "), done.stdout)


class Submitted:
    """One submission: its run, its job's folder and SLURM's numbers."""

    def __init__(self, run: Path, folder: Path, ids: list[str], output: str) -> None:
        self.run, self.folder, self.ids, self.output = run, folder, ids, output

    def log(self, link: int = 0) -> str:
        path = self.folder / f"{self.ids[link]}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def facts(self, link: int = 0) -> dict[str, str]:
        """SLURM's record of the job: JobState, Restarts, ExitCode, ..."""
        text = command("scontrol", "show", "job", "--oneliner", self.ids[link])
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def ended(self, seconds: float = 400) -> dict[str, str]:
        """Wait until the last job of the submission has ended. Returns SLURM's record of it."""
        last = len(self.ids) - 1
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.until(lambda: self.facts(last)["JobState"] in over, seconds)
        return self.facts(last)

    def until(self, moment: Callable[[], bool], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not moment():
            assert time.monotonic() < deadline, f"the moment never came; {self.facts()}\n{self.log()[-4000:]}"
            time.sleep(0.05)

    @property
    def exported(self) -> Path:
        return self.run / f"hf_step_{LAST:08d}"

    def done(self) -> int:
        """Iterations in metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0


def command(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def numbers(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without its times."""
    timing = ("time", "seconds", "idle_share", "tokens_per_second")
    return [
        {k: v for k, v in record.items() if k not in timing and not k.startswith(("time/", "memory_gb/"))}
        for record in read_metrics(run)
    ]


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor in a folder of exported models, by its path and name."""
    return {
        f"{path.parent.relative_to(folder)}/{name}": tensor.tobytes()
        for path in folder.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
