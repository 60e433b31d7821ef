"""The mini-batch loop of an update: one optimizer step for each mini-batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from megatron_tempo.config.updates import OptimizerConfig
from megatron_tempo.models.nonfinite_guard import LossInputs, NonFiniteGuard
from megatron_tempo.models.trained import Loss, Step, TrainedModel
from megatron_tempo.types import Batch


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of an update that were taken, and the number of skipped ones."""

    rows: Tensor  # int64 [n]: the rows that were trained on, in order
    metrics: Tensor  # float32 [n, num_metrics]
    grad_norms: list[float]  # of each step
    skipped: int
    routing: dict[str, float]  # metrics of the routers of a mixture of experts; empty without them


def run_mini_batches(
    trained: TrainedModel,
    guard: NonFiniteGuard,
    batch: Batch,
    owners: Tensor,
    order: Sequence[Tensor],
    loss: Loss,
    num_metrics: int,
    config: OptimizerConfig,
    inputs: Callable[[], LossInputs],
    iteration: int,
) -> Steps:
    """Take one step for each mini-batch of rows in `order` (int64 each); see `TrainedModel.step`. Collective.

    `owners`: int64 [n], the data-parallel rank of each row. `inputs`: what the loss is computed from.
    Steps whose loss or gradient is not finite are skipped. `guard` counts them and writes them to files, which it names
    by `iteration`, the run's, from 1. At the guard's limit, raises NotFiniteError on every rank. The weights are then
    those before the first of the consecutive skipped steps.
    """
    made: list[tuple[Tensor, Step]] = []
    for number, rows in enumerate(order, start=1):
        step = trained.step(batch, rows, owners, loss, num_metrics, config)
        if step.made:
            guard.made()
            made.append((rows, step))
        else:
            reported = (owners == trained.layout.data_rank) & trained.layout.is_reporter
            guard.skipped(iteration, number, batch, rows, step, inputs(), reported)
    reports = [step.routing for _, step in made if step.routing is not None]
    return Steps(
        torch.cat([rows for rows, _ in made]) if made else torch.empty(0, dtype=torch.int64),
        torch.cat([step.metrics for _, step in made]) if made else torch.empty(0, num_metrics),
        [step.grad_norm for _, step in made],
        len(order) - len(made),
        reduce(operator.add, reports).metrics() if reports else {},
    )
