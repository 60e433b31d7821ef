"""The critic V_phi: the probability that a response, as far as it has come, will be right."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tempo.algorithm.value_loss import value_loss
from megatron_tempo.config.schema import CriticUpdateConfig
from megatron_tempo.models.gpt import ValueModel
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.types import Batch


class Critic:
    """Token values and their regression."""

    def __init__(self, model: TrainedModel) -> None:
        assert isinstance(model.net, ValueModel)
        self.model = model

    def values(self, batch: Batch) -> Tensor:
        """V(x), V(x, y_1:1) ... V(x, y_1:T_i), row after row: float32 [T + n], on every rank."""

        def reading(micro: MicroBatch, values: Tensor) -> tuple[Tensor, Tensor]:
            return micro.value_cells, values[micro.valued]

        return self.model.read(batch, int(batch.response_lengths.sum()) + len(batch), reading)

    def update(
        self, batch: Batch, targets: Tensor, config: CriticUpdateConfig, order: list[Tensor]
    ) -> dict[str, float]:
        """One optimizer step for each mini-batch of rows in `order` (int64 each), by `value_loss`.

        `targets` is float32 [n]. Returns figures over all steps.
        """

        def loss(micro: MicroBatch, values: Tensor) -> tuple[Tensor, Tensor]:
            by_row = value_loss(values[micro.valued], targets[micro.rows].to(values.device), micro.response_lengths)
            return by_row, by_row.detach()[:, None]

        steps = [self.model.step(batch, rows, loss, 1, config.optimizer) for rows in order]
        return {
            "critic/loss": float(torch.cat([table for table, _ in steps]).mean()),
            "critic/grad_norm": sum(norm for _, norm in steps) / len(steps),
        }
