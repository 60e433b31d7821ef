"""The context of a run: configuration, process groups, device and watchdog."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import transformers

from megatron_tempo.config.problem import ConfigErrors
from megatron_tempo.config.rules.precision import Machine, check_machine
from megatron_tempo.config.schema import Config
from megatron_tempo.models.device import refuse_shared_gpus, select_device
from megatron_tempo.models.machine import machine_of
from megatron_tempo.models.megatron_compat.torch_private import begun_collectives
from megatron_tempo.models.offload import ModelOffloader
from megatron_tempo.models.parallel import Join, Layouts, join_launched, parallel_groups
from megatron_tempo.observability import logs
from megatron_tempo.rollout.nccl import align_nccl
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.runtime.folder_lock import LOCK, FolderLock
from megatron_tempo.runtime.watchdog import Watchdog


@dataclass(frozen=True, slots=True)
class RunContext:
    """The context of a run: its config, this rank's groups for actor and critic, its device and world size."""

    config: Config
    layouts: Layouts
    device: torch.device
    offloader: ModelOffloader
    machine: Machine

    @property
    def is_writer(self) -> bool:
        """The one rank that writes the run's plain files."""
        return self.layouts.actor.is_writer


@contextmanager
def open_context(config: Config, join: Join = join_launched, *, watched: bool = True) -> Iterator[RunContext]:
    """The device and the process groups of a job, and its log on the console.

    The watchdog aborts the job if a rank is dead or hangs. `join`: how this process joins the others. `watched`: false
    where there are no others, as in a rehearsal.
    """
    run = Path(config.run.dir).absolute().name
    logs.configure(rank=logs.rank_of(), run=run, level=config.metrics.log_level.value)
    if config.rollout.is_served:
        align_nccl()  # before the first communicator
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = select_device(config.run.device, local_rank, deterministic=config.run.deterministic)
    machine = machine_of(device)
    if problems := list(check_machine(config, machine)):
        raise ConfigErrors(problems)
    # On CUDA some operations have no deterministic form; there torch warns instead of stopping.
    torch.use_deterministic_algorithms(config.run.deterministic, warn_only=device.type == "cuda")
    # In deterministic mode torch also fills uninitialised memory: one more launch for each output of a kernel.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    transformers.utils.logging.disable_progress_bar()
    with (
        parallel_groups(config.parallel, device, config.run.seed, collective_timeout(config), join) as layouts,
        Watchdog(Path(config.run.dir), config.run.hang_minutes, begun_collectives) if watched else nullcontext(),
    ):
        refuse_shared_gpus(device, local_rank)
        turns, lends = config.parallel.offload, config.rollout.is_colocated
        yield RunContext(config, layouts, device, ModelOffloader(one_at_a_time=turns, lends=lends), machine)


@contextmanager
def exclusive(context: RunContext, command: str) -> Iterator[None]:
    """Lock the run's folder for this job. Collective. Raises InputError, on all ranks, if another job holds it."""
    folder = context.config.run.dir
    lock = FolderLock(Path(folder) / LOCK, f"run.dir={folder}", command, "give another run.dir")
    raise_on_all_ranks(lambda: lock.acquire() if context.is_writer else None)
    try:
        yield
    finally:
        lock.release()


def collective_timeout(config: Config) -> timedelta:
    """How long a rank waits for the others: longer than `run.hang_minutes`, so that the watchdog reports a hang first.

    It is generous since a rank may also wait for one that works, which is no hang.
    """
    minutes = config.run.hang_minutes
    return timedelta(days=1) if minutes is None else timedelta(minutes=2 * minutes)
