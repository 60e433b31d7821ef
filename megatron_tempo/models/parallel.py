"""Process groups: how the ranks are laid out over data, context, pipeline and tensor parallelism.

Actor and critic may have different layouts. Each layout has its own groups, which its model gets (`Layout.groups`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from megatron_tempo.config.pipeline_layers import PipelineLayers
from megatron_tempo.config.schema import ParallelConfig
from megatron_tempo.errors import InputError
from megatron_tempo.models.megatron_compat.gloo_devices import shared_gloo_devices
from megatron_tempo.models.megatron_compat.process_groups import Groups, clear_globals
from megatron_tempo.models.megatron_compat.versions import quiet_deprecations

COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # default


@dataclass(frozen=True, slots=True)
class Layout:
    """This rank's position in a layout.

    Ranks that differ only in `data_rank` and `context_rank` hold the same weights, but for a mixture's experts. Those
    have a layout of their own over the ranks of a pipeline stage: ranks that differ only in `expert_data_rank` hold the
    same experts. In both layouts the tensor rank counts fastest, and the ranks of a stage are consecutive.

    >>> Layout(rank=1, world_size=4, tensor_rank=1, tensor=2, pipeline_rank=0, pipeline=2, data_rank=0, data=1,
    ...        context_rank=0, context=1, sequence_parallel=False)
    """

    rank: int
    world_size: int
    tensor_rank: int
    tensor: int
    pipeline_rank: int
    pipeline: int
    data_rank: int
    data: int
    context_rank: int
    context: int
    sequence_parallel: bool
    first_stage_layers: int | None = None  # as in `PipelineLayers`
    last_stage_layers: int | None = None
    virtual_pipeline: int = 1
    expert_rank: int = 0  # which of a layer's experts this rank has
    expert: int = 1
    expert_tensor_rank: int = 0  # and which part of their matrices
    expert_tensor: int = 1
    expert_data_rank: int = 0
    expert_data: int = 1
    groups: Groups = field(default_factory=Groups, repr=False, compare=False)  # empty: outside a run

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes the run's files, except checkpoints, which all ranks write."""
        return self.rank == 0

    @property
    def pipeline_layers(self) -> PipelineLayers:
        """How layers are divided over the pipeline stages."""
        return PipelineLayers(self.pipeline, self.first_stage_layers, self.last_stage_layers, self.virtual_pipeline)

    @property
    def is_first_stage(self) -> bool:
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pipeline_rank == self.pipeline - 1

    @property
    def is_first_copy(self) -> bool:
        """Whether this is the first of the ranks that hold the same weights."""
        return self.data_rank == 0 and self.context_rank == 0

    @property
    def is_first_expert_copy(self) -> bool:
        """Whether this is the first of the ranks that hold the same experts."""
        return self.expert_data_rank == 0

    @property
    def shares_experts(self) -> bool:
        """Whether tokens of one data-parallel rank may pass experts on the ranks of another.

        Then all data-parallel ranks must compute equally many micro-batches.
        """
        return self.tensor * self.context % (self.expert_tensor * self.expert) != 0

    @property
    def copies(self) -> int:
        """Groups of ranks that hold the whole model, but for a mixture's experts."""
        return self.data * self.context

    @property
    def copy(self) -> int:
        """The number of this rank's copy of the model."""
        return self.data_rank * self.context + self.context_rank

    @property
    def rank_in_stage(self) -> int:
        """This rank's number among those of its pipeline stage."""
        return self.copy * self.tensor + self.tensor_rank

    @property
    def is_reporter(self) -> bool:
        """Whether this rank reports its replica's outputs: last stage, first tensor and context rank."""
        return self.is_last_stage and self.tensor_rank == 0 and self.context_rank == 0

    def has_replicas_of(self, other: Layout) -> bool:
        """Whether the same ranks form the same data-parallel ranks as in another layout of this world."""
        mine, theirs = ((of.tensor, of.context, of.pipeline) for of in (self, other))
        return mine == theirs


@dataclass(frozen=True, slots=True)
class Layouts:
    """This rank's layouts of actor and critic. They are the same object if the critic has no layout of its own."""

    actor: Layout
    critic: Layout


Join = Callable[[str, timedelta], None]  # opens the default process group with a backend and a timeout


def join_launched(backend: str, timeout: timedelta) -> None:
    """Join the processes that were launched: by torchrun's rendezvous, or without torchrun as a single process."""
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def parallel_groups(
    config: ParallelConfig,
    device: torch.device,
    seed: int,
    timeout: timedelta = COLLECTIVE_TIMEOUT,
    join: Join = join_launched,
) -> Iterator[Layouts]:
    """Open the process groups of a run and close them at the end of the block.

    `timeout`: how long a rank waits for the others in a collective. `join`: how this process joins the others.

    On CUDA, gloo still sends CPU tensors, so rollouts do not use the GPUs' links.
    """
    quiet_deprecations()
    with shared_gloo_devices():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        join(backend, timeout)
        try:
            actor = initialize_model_parallel(config, seed, timeout)
            critic = actor
            if config.of_critic() != config:
                clear_globals()
                critic = initialize_model_parallel(config.of_critic(), seed, timeout)
                clear_globals()
            yield Layouts(actor, critic)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def initialize_model_parallel(config: ParallelConfig, seed: int, timeout: timedelta) -> Layout:
    """Create Megatron's groups. The default process group is initialised already.

    Raises InputError if the number of processes is not a multiple of tensor * pipeline * context, and of
    expert_tensor * expert * pipeline.
    """
    world = dist.get_world_size()
    if world % config.ranks_of_a_replica:
        raise InputError(
            f"{world} processes are not a multiple of parallel.tensor={config.tensor} * pipeline={config.pipeline} * "
            f"context={config.context}: launch a multiple of {config.ranks_of_a_replica}"
        )
    of_experts = config.expert_cut * config.expert * config.pipeline
    if world % of_experts:
        raise InputError(
            f"{world} processes are not a multiple of parallel.expert_tensor={config.expert_cut} * "
            f"expert={config.expert} * pipeline={config.pipeline}: launch a multiple of {of_experts}"
        )
    parallel_state.destroy_global_memory_buffer()  # of the layout before
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_cut,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=math.ceil(timeout.total_seconds() / 60),
    )
    model_parallel_cuda_manual_seed(seed)
    groups = Groups.of_globals()
    return Layout(
        rank=dist.get_rank(),
        world_size=world,
        tensor_rank=groups.tp.rank(),
        tensor=config.tensor,
        pipeline_rank=groups.pp.rank(),
        pipeline=config.pipeline,
        data_rank=groups.dp.rank(),
        data=groups.dp.size(),
        context_rank=groups.cp.rank(),
        context=config.context,
        sequence_parallel=config.sequence,
        first_stage_layers=config.num_layers_in_first_pipeline_stage,
        last_stage_layers=config.num_layers_in_last_pipeline_stage,
        virtual_pipeline=config.virtual_pipeline,
        expert_rank=groups.ep.rank(),
        expert=config.expert,
        expert_tensor_rank=groups.expt_tp.rank(),
        expert_tensor=config.expert_cut,
        expert_data_rank=groups.expt_dp.rank(),
        expert_data=groups.expt_dp.size(),
        groups=groups,
    )


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place. If all ranks but one hold zeros, this is an exact gather."""
    dist.all_reduce(tensor)
    return tensor


def share_reported(tensor: Tensor, layout: Layout) -> Tensor:
    """Give all ranks of a replica the CPU tensor of its reporter (`Layout.is_reporter`), in place. Collective."""
    if layout.is_last_stage and layout.tensor * layout.context > 1:
        dist.broadcast(tensor, group=layout.groups.tp_cp, group_src=0)
    if layout.pipeline > 1:
        dist.broadcast(tensor, group=layout.groups.pp, group_src=layout.pipeline - 1)
    return tensor


def gather_rows(own: Tensor, rows: Tensor, count: int, layout: Layout) -> Tensor:
    """Numbers of each row, from the replica that owns it, on every rank: [m, ...] -> [count, ...]. Collective.

    `rows`: int64 [m], the rows that this rank's replica owns; each row has one owner. The result does not depend on the
    layout: all ranks but one add zeros.
    """
    table = own.new_zeros(count, *own.shape[1:])
    if layout.is_reporter:
        table[rows] = own
    return sum_over_ranks(table)
