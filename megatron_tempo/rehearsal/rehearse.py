"""Runs a rehearsal: chooses the ranks, runs them in a process under the null GPU, and collects what they found."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tempo.config.choices import Layers
from megatron_tempo.config.recipes import GPUS, RECIPES
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import save
from megatron_tempo.errors import InputError
from megatron_tempo.nullgpu.environment import environment
from megatron_tempo.plan.activations import IMBALANCE
from megatron_tempo.plan.memory import GB
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.split import split_of
from megatron_tempo.rehearsal.faults import Fault
from megatron_tempo.rehearsal.lengths import Lengths
from megatron_tempo.rehearsal.outcome import Outcome, Planned, RankResult
from megatron_tempo.rehearsal.ranks import RankKind, kinds_of
from megatron_tempo.rehearsal.scaled import scaled

log = logging.getLogger(__name__)

HOST_GB, SECONDS = 8.0, 300.0  # bounds of each rank's process
_MOST = 999_999_999  # of each option that is a number
_TAIL = 2000  # characters of a process's output that a report quotes


@dataclass(frozen=True, slots=True)
class Options:
    """How to rehearse. `rows`: responses of each kind, over all ranks; None: as few as fill the micro-batches.

    Raises InputError for a bound that is none.
    """

    lengths: Lengths = field(default_factory=Lengths)
    rows: int | None = None
    host_gb: float = HOST_GB
    seconds: float = SECONDS
    plant: str | None = None  # a function that each rank calls first, as module:name; tests plant faults with it

    def __post_init__(self) -> None:
        bounds = (("--rows", self.rows, 2), ("--host-gb", self.host_gb, 1), ("--seconds", self.seconds, 1))
        for name, value, least in bounds:
            if value is not None and not least <= value <= _MOST:
                raise InputError(f"{name}={value}: give a number from {least} to {_MOST:,}")


def rehearse(config: Config, options: Options) -> tuple[Outcome, Planned]:
    """Rehearse a configuration that has passed `problems`. Logs when a rank begins.

    Raises InputError if this machine cannot: torch without CUDA, or no C compiler.
    """
    ((outcome, planned),) = rehearse_all([(config, options)])
    return outcome, planned


def rehearse_all(cases: Sequence[tuple[Config, Options]]) -> list[tuple[Outcome, Planned]]:
    """Rehearse several configurations of one GPU in one process: what they import, they import once.

    The GPU has the memory that the first one leaves to its trainer. Raises InputError as `rehearse` does.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megatron-tempo-rehearsal-") as folder:
        made = [_Case.of(config, options, Path(folder) / str(i)) for i, (config, options) in enumerate(cases)]
        ranks, fault = _run(made, Path(folder))
    found = []
    for case, results in zip(made, ranks, strict=True):
        layers = results[0].layers if results else None
        notes = tuple(_notes(case.config, layers, has_experts=case.planned.shape.experts is not None))
        seconds = time.monotonic() - started
        case_fault = fault if len(results) < len(case.kinds) else None
        outcome = Outcome(tuple(results), case.rows, str(case.options.lengths), seconds, case_fault, notes)
        found.append((outcome, case.planned.with_layers(layers)))
    return found


def _notes(config: Config, layers: Layers | None, *, has_experts: bool) -> Iterator[str]:
    if has_experts:
        yield (
            "a mixture of experts: every expert gets equally many rows here, while plan counts "
            f"{IMBALANCE} times as many on the fullest rank. So these peaks are the least that a run needs"
        )
    is_auto = config.model.layers is Layers.auto and config.run.precision not in RECIPES
    if layers is Layers.transformer_engine and is_auto:
        yield (
            "model.layers=auto: Transformer Engine is installed here and was used, and plan counts it here; "
            "megatron-tempo plan does with model.layers=transformer_engine"
        )
    if config.model.critic_path is not None:
        path = config.model.critic_path
        yield f"model.critic_path={path}: the critic is taken to have the actor's decoder, as in plan"
    if not config.rollout.is_served:
        yield "the embedded engine's weights are on the GPU; it generates nothing, so its cache is in no figure"


@dataclass(frozen=True, slots=True)
class _Case:
    """A configuration to rehearse. `small`: with few rows. `folder`: its files, which the ranks read and write."""

    config: Config
    small: Config
    options: Options
    rows: int
    kinds: Sequence[RankKind]
    planned: Planned
    folder: Path

    @classmethod
    def of(cls, config: Config, options: Options, folder: Path) -> _Case:
        shape, _ = shape_of(config)
        assert shape is not None
        assert config.cluster is not None
        world = split_of(config).trainers
        small = scaled(config, world, options.rows)
        rows = small.stage2.responses_per_prompt
        planned = Planned.of(config, small, shape, world)
        if planned.limit <= 0:
            raise InputError(
                f"rollout.servers: the servers on a trainer's GPU hold {planned.server_bytes / GB:.1f} GB, and nothing "
                f"is left of cluster.memory_gb={config.cluster.memory_gb:g}: give the servers a smaller share, or GPUs "
                f"of their own"
            )
        return cls(config, small, options, rows, kinds_of(config, world, rows, shape.layers), planned, folder)

    def write(self) -> dict[str, Any]:
        """Write the case's folder. Returns what the process has to know of it."""
        self.folder.mkdir()
        save(self.small, self.folder / "config.json")
        return {
            "folder": str(self.folder),
            "ranks": [kind.rank for kind in self.kinds],
            "world": self.kinds[0].world,
            "lengths": [self.options.lengths.mean, self.options.lengths.sigma],
            "shared": bool(split_of(self.config).shared),
            "host_gb": self.options.host_gb,
            "seconds": self.options.seconds,
            "plant": self.options.plant,
        }

    def result(self, kind: RankKind, record: dict[str, Any]) -> RankResult:
        """The result of a rank that has ended, from its files."""
        path, log = (self.folder / f"rank_{kind.rank}.{suffix}" for suffix in ("json", "log"))
        found = json.loads(path.read_text()) if path.exists() else {"phases": [], "machine": "", "fault": None}
        layers = None if found.get("layers") is None else Layers(found["layers"])
        ended = record["ended"]
        if ended is not None:
            crashed = ended.startswith("crash") and log.exists()
            tail = log.read_text(errors="replace").strip()[-_TAIL:] if crashed else ""
            ended = f"in phase {found.get('running', 'start')}: {ended}{tail and f': {tail}'}"
        fault = None if found["fault"] is None else Fault(**found["fault"])
        phases = self.planned.with_layers(layers).results(kind, found["phases"])
        took = record["seconds"], record["cpu_seconds"], record["host"]
        return RankResult(kind, found["machine"], phases, *took, fault, ended, layers)


def _run(cases: Sequence[_Case], folder: Path) -> tuple[list[list[RankResult]], Fault | None]:
    """The results of each case's ranks that ran, and the fault after which none did."""
    job, output = folder / "job.json", folder / "forks.log"
    job.write_text(json.dumps({"parent": os.getpid(), "cases": [case.write() for case in cases]}))
    results: list[list[RankResult]] = [[] for _ in cases]
    left = [(i, kind) for i, case in enumerate(cases) for kind in case.kinds]
    command = [sys.executable, "-m", "megatron_tempo.rehearsal.forks", str(job)]
    given = _environment(cases[0]) | {"TMPDIR": str(folder)}
    with output.open("w") as errors:
        process = subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            for number, record in enumerate(_lines(process)):
                if record["fault"] is not None:
                    return results, Fault(**record["fault"])
                if number:  # the first line says that the imports are done
                    i, kind = left.pop(0)
                    results[i].append(cases[i].result(kind, record))
                if left:
                    begun = left[0][1]
                    log.info("rank %d of %d: %s", begun.rank, begun.world, begun.label)
        finally:
            process.kill()
            process.wait()
    if not left:
        return results, None
    message = f"the process under the null GPU ended: {output.read_text(errors='replace').strip()[-_TAIL:]}"
    return results, Fault("a crash", "start", "megatron_tempo.rehearsal.forks", message, traceback=message)


def _environment(case: _Case) -> dict[str, str]:
    assert case.config.cluster is not None
    gpu = case.config.cluster.gpu
    major, minor = GPUS[gpu]
    return environment(devices=1, memory_gb=case.planned.limit / GB, capability=10 * major + minor, name=gpu) | {
        # torch counts devices without starting CUDA, which it would refuse in a fork of such a process
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    with closing(process.stdout) as stream:
        for line in stream:
            if line.startswith("{"):
                yield json.loads(line)
