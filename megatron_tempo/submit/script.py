"""The sbatch script of a job: a template of launch/, with the block between two marks set from the configuration."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_tempo.errors import InputError, hidden
from megatron_tempo.submit.job import Job, Kind

BEGIN, END = "# >>> megatron-tempo submit writes this block", "# <<<"


def render(job: Job, launch: Path, folder: Path, work: Path) -> str:
    """The script. `launch`: folder of the templates. `folder`: the job's snapshot. `work`: base of relative paths.

    Raises InputError for a path or an argument with invisible characters: a newline would begin a command. The
    configuration has none.
    """
    for name, words in {"the run's folder": str(folder), "the working folder": str(work), **_arguments(job)}.items():
        if hidden(words) or "\n" in words or "\t" in words:
            raise InputError(f"{name} has an invisible character in its name: {words!r}: rename it")
    text = (launch / f"{job.kind.name}.sbatch").read_text(encoding="utf-8")
    before, rest = text.split(BEGIN, 1)
    mark, rest = rest.split("\n", 1)
    after = rest.split(f"\n{END}", 1)[1]
    block = [*_options(job, folder), *_variables(job, folder, work)]
    return f"{before}{BEGIN}{mark}\n" + "\n".join(block) + f"\n{END}{after}"


def _options(job: Job, folder: Path) -> Iterator[str]:
    slurm, cluster = job.cluster.slurm, job.cluster
    tasks = 1 if job.kind is Kind.convert else cluster.gpus_per_node
    options: dict[str, object] = {
        "job-name": f"tempo-{job.kind.name}-{job.run.name}",
        "nodes": job.nodes,
        "ntasks-per-node": tasks,
        "cpus-per-task": slurm.cpus_per_task,
        "gres": _gres(job),
        "partition": slurm.partition,
        "account": slurm.account,
        "time": slurm.time_limit,
        "signal": None if job.kind is Kind.eval else f"B:USR1@{slurm.grace_seconds}",
        "output": f"{str(folder).replace('%', '%%')}/%j.out",
        "open-mode": "append",
    }
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    again = "--no-requeue" if job.kind is Kind.eval else "--requeue"
    yield from (f"#SBATCH {_quoted(word)}" for word in [*words, again, *slurm.options])


def _variables(job: Job, folder: Path, work: Path) -> Iterator[str]:
    config, cluster, slurm = job.config, job.cluster, job.cluster.slurm
    servers = config.rollout.servers
    python = slurm.python or ("python3" if slurm.container else sys.executable)
    yield _set("JOB", folder, "this job's folder: its script, snapshot and output")
    yield _set("RUN", job.run, "run.dir")
    yield _set("WORK", work, "base of relative paths in the configuration")
    yield _set("CODE", folder / "code")
    yield _set("PYTHON", python)
    yield _set("GRES", _gres(job) or "")
    yield _set("CPUS", (slurm.cpus_per_task or 0) * (1 if job.kind is Kind.convert else cluster.gpus_per_node),
               "per node; 0: SLURM's default")  # fmt: skip
    yield _set("INTERFACE", slurm.interface or "", "network interface for sockets")
    yield _array("MODULES", slurm.modules)
    yield _array("ENVIRONMENT", [f"{name}={value}" for name, value in slurm.environment.items()])
    yield _set("CONTAINER", slurm.container or "", "container image")
    yield _array("MOUNTS", _mounts(job, work))
    if job.kind is Kind.convert:
        yield _array("COMMAND", job.arguments)
        return
    yield _set("CONFIG", folder / "config.json")
    yield _set("TRAIN_NODES", cluster.training_nodes)
    yield _set("PROCESSES", job.processes, "trainer processes on each trainer node")
    yield _set("ROLLOUT_NODES", cluster.rollout_nodes, "the nodes after those of the trainer")
    away = cluster.rollout_nodes and config.rollout.is_served
    yield _set("SERVERS", servers.replicas if away else 0, "servers on each of those nodes")
    yield _set("START_SECONDS", round(servers.start_seconds), "time limit for a server to start")
    if job.kind is Kind.train:
        yield _set("GRACE", slurm.grace_seconds, "seconds from the signal to the time limit")


def _gres(job: Job) -> str | None:
    cluster = job.cluster
    return (
        None if job.kind is Kind.convert or not cluster.slurm.gres else f"{cluster.slurm.gres}:{cluster.gpus_per_node}"
    )


def _mounts(job: Job, work: Path) -> list[str]:
    slurm = job.cluster.slurm
    return [f"{job.run}:{job.run}", f"{work}:{work}", *slurm.mounts] if slurm.container else []


def _set(name: str, value: object, note: str = "") -> str:
    return f"{name}={shlex.quote(str(value))}" + (f"  # {note}" if note else "")


def _array(name: str, values: list[str] | tuple[str, ...]) -> str:
    return f"{name}=({shlex.join(values)})"


_PLAIN = re.compile(r"[\w./:=@,+%^~-]+", re.ASCII)


def _quoted(word: str) -> str:
    """An option as sbatch parses it: in double quotes, with a backslash before each quote or backslash."""
    return word if _PLAIN.fullmatch(word) else '"' + re.sub(r'(["\\])', r"\\\1", word) + '"'


def _arguments(job: Job) -> dict[str, str]:
    return {f"argument {number} of the converter": word for number, word in enumerate(job.arguments)}
