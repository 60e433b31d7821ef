"""Runs a rehearsal: chooses the ranks, runs them in a process under the null GPU, and collects what they found."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tempo.config.model_shape import ModelShape
from megatron_tempo.config.recipes import GPUS
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import save
from megatron_tempo.errors import InputError
from megatron_tempo.nullgpu.environment import environment
from megatron_tempo.plan.memory import GB
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.split import split_of
from megatron_tempo.rehearsal.faults import Fault
from megatron_tempo.rehearsal.lengths import Lengths
from megatron_tempo.rehearsal.outcome import Outcome, Planned, RankResult
from megatron_tempo.rehearsal.ranks import RankKind, kinds_of
from megatron_tempo.rehearsal.scaled import scaled

HOST_GB, SECONDS = 8.0, 300.0  # bounds of each rank's process
_TAIL = 2000  # characters of a process's output that a report quotes


@dataclass(frozen=True, slots=True)
class Options:
    """How to rehearse. `rows`: responses of each kind, over all ranks; None: as few as fill the micro-batches."""

    lengths: Lengths = field(default_factory=Lengths)
    rows: int | None = None
    host_gb: float = HOST_GB
    seconds: float = SECONDS


def rehearse(config: Config, options: Options, say: Callable[[str], None]) -> tuple[Outcome, Planned]:
    """Rehearse a configuration that has passed `problems`. `say`: gets a line when a rank begins.

    Raises InputError if this machine cannot: torch without CUDA, no C compiler, or a bound of `options` that is none.
    """
    _check(options)
    shape, _ = shape_of(config)
    assert shape is not None
    assert config.cluster is not None
    world = split_of(config).trainers
    small = scaled(config, world, options.rows)
    rows = next(stage.responses_per_prompt for stage in small.stages().values())
    kinds = kinds_of(config, world, rows)
    planned = Planned.of(config, small, shape, world)
    if planned.limit <= 0:
        raise InputError(
            f"rollout.servers: the servers on a trainer's GPU hold {planned.beside / GB:.1f} GB, and nothing is left "
            f"of cluster.memory_gb={config.cluster.memory_gb:g}: give the servers a smaller share, or GPUs of their own"
        )
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megatron-tempo-rehearsal-") as folder:
        job = _Job(Path(folder), small, shape, kinds, options, planned.limit)
        ranks, fault = job.run(say, planned)
    outcome = Outcome(
        tuple(ranks), rows, str(options.lengths), time.monotonic() - started, fault, tuple(_notes(config))
    )
    return outcome, planned


def _check(options: Options) -> None:
    bounds = (("--rows", options.rows, 2), ("--host-gb", options.host_gb, 1), ("--seconds", options.seconds, 1))
    for name, value, least in bounds:
        if value is not None and not least <= value < 1e9:
            raise InputError(f"{name}={value:g}: give a number of at least {least}")


def _notes(config: Config) -> Iterator[str]:
    if config.model.critic_path is not None:
        path = config.model.critic_path
        yield f"model.critic_path={path}: the critic is taken to have the actor's decoder, as in plan"
    if not config.rollout.is_served:
        yield "the embedded engine's weights are on the GPU; it generates nothing, so its cache is in no figure"


@dataclass(frozen=True, slots=True)
class _Job:
    folder: Path
    config: Config
    shape: ModelShape
    kinds: Sequence[RankKind]
    options: Options
    limit: float  # bytes of the GPU

    def run(self, say: Callable[[str], None], planned: Planned) -> tuple[list[RankResult], Fault | None]:
        """The ranks that ran, and the fault that came before any did."""
        self._write()
        assert self.config.cluster is not None
        major, minor = GPUS[self.config.cluster.gpu]
        given = environment(
            devices=1,
            memory_gb=self.limit / GB,
            capability=10 * major + minor,
            name=self.config.cluster.gpu,
        )
        # torch counts devices without starting CUDA, which it would refuse in a fork of such a process
        given |= {
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "megatron_tempo.rehearsal.forks", str(self.folder / "job.json")]
        log = self.folder / "forks.log"
        results: list[RankResult] = []
        with log.open("w") as errors:
            process = subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=errors, text=True)
            try:
                for record, kind in zip(_lines(process), [None, *self.kinds], strict=False):
                    if record["fault"] is not None:
                        return results, Fault(**record["fault"])
                    if kind is not None:
                        results.append(self._result(kind, record, planned))
                    if len(results) < len(self.kinds):
                        begun = self.kinds[len(results)]
                        say(f"rank {begun.rank} of {begun.world}: {begun.label}")
            finally:
                process.kill()
                process.wait()
        if len(results) < len(self.kinds):
            message = f"the process under the null GPU ended: {log.read_text(errors='replace').strip()[-_TAIL:]}"
            return results, Fault("a crash", "start", "megatron_tempo.rehearsal.forks", message, traceback=message)
        return results, None

    def _write(self) -> None:
        """The job's files, all in its own folder."""
        save(self.config, self.folder / "config.json")
        job: dict[str, Any] = {
            "folder": str(self.folder),
            "ranks": [kind.rank for kind in self.kinds],
            "world": self.kinds[0].world,
            "lengths": [self.options.lengths.mean, self.options.lengths.sigma],
            "shared": bool(split_of(self.config).shared),
            "host_gb": self.options.host_gb,
            "seconds": self.options.seconds,
        }
        (self.folder / "job.json").write_text(json.dumps(job))

    def _result(self, kind: RankKind, record: dict[str, Any], planned: Planned) -> RankResult:
        path = self.folder / f"rank_{kind.rank}.json"
        found = json.loads(path.read_text()) if path.exists() else {"phases": [], "machine": "", "fault": None}
        ended = record["ended"]
        if ended is not None:
            log = self.folder / f"rank_{kind.rank}.log"
            tail = (
                log.read_text(errors="replace").strip()[-_TAIL:] if ended.startswith("crash") and log.exists() else ""
            )
            ended = f"in phase {found.get('running', 'start')}: {ended}{tail and f': {tail}'}"
        fault = None if found["fault"] is None else Fault(**found["fault"])
        phases = planned.results(kind, found["phases"])
        took = record["seconds"], record["cpu_seconds"], record["host"]
        return RankResult(kind, found["machine"], phases, *took, fault, ended)


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    with closing(process.stdout) as stream:
        for line in stream:
            if line.startswith("{"):
                yield json.loads(line)
