"""The critic V_phi: the probability that a response will be correct, given its tokens so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tempo.config.updates import CriticUpdateConfig
from megatron_tempo.kernels.value_loss import VALUE_METRICS
from megatron_tempo.models.gpt import ValueModel
from megatron_tempo.models.nonfinite_guard import LossInputs, NonFiniteGuard
from megatron_tempo.models.packing import MicroBatch, row_owners, row_work
from megatron_tempo.models.parallel import Layout, gather_rows
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.models.update import run_mini_batches
from megatron_tempo.runtime.row_windows import row_windows
from megatron_tempo.types import Batch


class Critic:
    """Computes token values, and fits them by regression."""

    def __init__(self, model: TrainedModel, guard: NonFiniteGuard, of_actor: Layout | None = None) -> None:
        """`of_actor`: the layout of the actor, if there is one with a layout of its own."""
        assert all(isinstance(chunk, ValueModel) for chunk in model.net.chunks)
        self.model, self.guard = model, guard
        self.kernels = model.net.kernels
        self.shares_replicas = of_actor is None or of_actor.has_replicas_of(model.layout)

    def values(self, batch: Batch) -> Tensor:
        """V(x), V(x, y_1:1) ... V(x, y_1:T_i), of the rows that this rank's actor owns: float32 [T + m].

        They are computed where the actor needs them. If the actor's replicas are other ranks than the critic's, the
        critic's owners compute them and send them to all ranks that hold the row.
        """
        if not self.shares_replicas or (batch.owners is None and self.model.layout.data > 1):
            return self._sent(batch, self._read(batch, self.owners(batch)))
        return self._read(batch, self.owners(batch) if batch.owners is None else batch.owners.actor)

    def values_at(self, batch: Batch, positions: Tensor) -> Tensor:
        """The values after `positions` tokens of each response: int64 [n, k] -> float32 [n, k], on every rank."""
        owners, held = self.owners(batch), batch.held
        flat = self._read(batch, owners)
        counts = batch.held_responses + 1
        by_row = flat[(counts.cumsum(0) - counts)[:, None] + positions[held]]
        own = owners[held] == self.model.layout.data_rank
        return gather_rows(by_row[own], held[own], len(batch), self.model.layout)

    def owners(self, batch: Batch) -> Tensor:
        """The data-parallel rank that computes each row: int64 [n]."""
        return self.divided(batch) if batch.owners is None else batch.owners.critic

    def divided(self, batch: Batch, order: Sequence[Tensor] = ()) -> Tensor:
        """The rows divided by work, each mini-batch of `order` and all other rows: a data-parallel rank each, [n]."""
        return row_owners(row_work(batch.lengths, self.model.net.shape), order, self.model.layout.data)

    def _read(self, batch: Batch, owners: Tensor) -> Tensor:
        """As `values`, of the rows that this data-parallel rank has in `owners`."""

        def cells(micro: MicroBatch) -> Tensor:
            return micro.value_cells

        size = len(batch.response_tokens) + len(batch.held)
        return self.model.read(batch, owners, size, cells, lambda output: output)

    def _sent(self, batch: Batch, own: Tensor) -> Tensor:
        """The values of all held rows, from those of the rows that the critic's replicas own: [T + m] -> [T + m]."""
        layout, places = self.model.layout, batch.places.tolist()
        mine = ((self.owners(batch) == layout.data_rank) & layout.is_reporter).tolist()
        counts = (batch.held_responses + 1).tolist()
        values = torch.zeros_like(own)
        sources, targets = own.split(counts), values.split(counts)
        for rows, window in row_windows(
            batch.response_lengths + 1, lambda row: [sources[places[row]]] if mine[row] else None
        ):
            parts = window[0].view(torch.float32).split((batch.response_lengths[rows.start : rows.stop] + 1).tolist())
            for row, part in zip(rows, parts, strict=True):
                if places[row] >= 0:
                    targets[places[row]].copy_(part)
        return values

    def update(
        self, batch: Batch, targets: Tensor, config: CriticUpdateConfig, order: list[Tensor], iteration: int = 0
    ) -> dict[str, float]:
        """Take one optimizer step on `value_loss` for each mini-batch of rows in `order` (int64 each).

        `targets`: float32 [n]. `iteration`: the run's, from 1; 0 outside a run. Returns metrics over all steps that
        were not skipped. Raises NotFiniteError.
        """
        owners = self.owners(batch)
        old = self._read(batch, owners) if config.clip is not None else None

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            before = None if old is None else old[micro.value_cells].to(output.device)
            of_rows = targets[micro.rows].to(output.device)
            return self.kernels.value_loss(output, of_rows, micro.value_rows, clip=config.clip, old_values=before)

        def given() -> LossInputs:
            return LossInputs({"targets": targets})

        steps = run_mini_batches(
            self.model, self.guard, batch, owners, order, loss, len(VALUE_METRICS), config.optimizer, given, iteration
        )
        metrics = {"critic/skipped": float(steps.skipped)}
        if len(steps.rows):
            means = steps.metrics.mean(0).tolist()
            metrics |= {f"critic/{name}": mean for name, mean in zip(VALUE_METRICS, means, strict=True)}
            metrics["critic/grad_norm"] = sum(steps.grad_norms) / len(steps.grad_norms)
            metrics |= {f"critic/{name}": number for name, number in steps.routing.items()}
        return metrics
