"""A job: its processes and nodes, and the problems that prevent a configuration from being submitted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from megatron_tempo.config.cluster import ClusterConfig
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules import cluster
from megatron_tempo.config.schema import Config
from megatron_tempo.plan.split import split_of


class Kind(Enum):
    """Kinds of jobs. Each has a template, launch/NAME.sbatch."""

    train = "train"
    eval = "eval"
    convert = "convert"


@dataclass(frozen=True, slots=True)
class Job:
    """A job of a checked configuration.

    >>> Job(Kind.train, config, arguments=())          # Job(Kind.convert, config, ("hf-to-megatron", A, B))
    """

    kind: Kind
    config: Config
    arguments: tuple[str, ...]  # of the convert command

    @property
    def cluster(self) -> ClusterConfig:
        assert self.config.cluster is not None
        return self.config.cluster

    @property
    def run(self) -> Path:
        """The folder that the job writes to."""
        return Path(self.config.run.dir).absolute()

    @property
    def nodes(self) -> int:
        return 1 if self.kind is Kind.convert else self.cluster.nodes

    @property
    def processes(self) -> int:
        """Trainer processes on each of the trainer's nodes."""
        return processes(self.config) // self.cluster.training_nodes


def processes(config: Config) -> int:
    """Trainer processes on all nodes: one per GPU that no server uses, as `plan` counts them."""
    return split_of(config).trainers


def problems(config: Config, kind: Kind) -> Iterator[Problem]:
    """Problems of the cluster's configuration, and of the job's layout on it."""
    yield from cluster.site(config)
    if config.cluster is None or kind is Kind.convert:
        return
    nodes = list(cluster.rollout_nodes(config))
    yield from nodes
    if not nodes:
        yield from cluster.spread(config, processes(config))


def elsewhere(config: Config, problem: Problem) -> bool:
    """Whether a problem is about a file that exists only in the job's container."""
    contained = config.cluster is not None and config.cluster.slurm.container is not None
    return contained and problem.field == "rollout.servers.python"
