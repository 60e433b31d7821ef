"""The critic V_phi: the probability that a response will be correct, given its tokens so far."""

from __future__ import annotations

from torch import Tensor

from megatron_tempo.config.stages import CriticUpdateConfig
from megatron_tempo.kernels.value_loss import VALUE_METRICS
from megatron_tempo.models.gpt import ValueModel
from megatron_tempo.models.nonfinite_guard import NonFiniteGuard
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.models.update import run_mini_batches
from megatron_tempo.types import Batch


class Critic:
    """Computes token values, and fits them by regression."""

    def __init__(self, model: TrainedModel, guard: NonFiniteGuard) -> None:
        assert isinstance(model.net, ValueModel)
        self.model, self.guard = model, guard
        self.kernels = model.net.kernels

    def values(self, batch: Batch) -> Tensor:
        """V(x), V(x, y_1:1) ... V(x, y_1:T_i), row after row: float32 [T + n], on every rank."""

        def extract(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            return micro.value_cells, output

        return self.model.read(batch, int(batch.response_lengths.sum()) + len(batch), extract)

    def update(
        self, batch: Batch, targets: Tensor, config: CriticUpdateConfig, order: list[Tensor], iteration: int = 0
    ) -> dict[str, float]:
        """Take one optimizer step on `value_loss` for each mini-batch of rows in `order` (int64 each).

        `targets`: float32 [n]. `iteration`: the run's, from 1; 0 outside a run. Returns metrics over all steps that
        were not skipped. Raises NotFiniteError.
        """
        old = self.values(batch) if config.clip is not None else None

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            before = None if old is None else old[micro.value_cells].to(output.device)
            of_rows = targets[micro.rows].to(output.device)
            return self.kernels.value_loss(output, of_rows, micro.value_rows, clip=config.clip, old_values=before)

        def given(rows: Tensor) -> dict[str, Tensor]:
            return {"targets": targets[rows]}

        steps = run_mini_batches(
            self.model, self.guard, batch, order, loss, len(VALUE_METRICS), config.optimizer, given, iteration
        )
        metrics = {"critic/skipped": float(steps.skipped)}
        if len(steps.rows):
            means = steps.metrics.mean(0).tolist()
            metrics |= {f"critic/{name}": mean for name, mean in zip(VALUE_METRICS, means, strict=True)}
            metrics["critic/grad_norm"] = sum(steps.grad_norms) / len(steps.grad_norms)
        return metrics
