"""The actor: the policy pi_theta in training."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tempo.algorithm.policy_loss import ROW_METRICS, policy_loss
from megatron_tempo.config.schema import ActorUpdateConfig
from megatron_tempo.models.gpt import LanguageModel
from megatron_tempo.models.logprobs import logprobs_and_entropy
from megatron_tempo.models.packing import MicroBatch
from megatron_tempo.models.trained import Model, TrainedModel
from megatron_tempo.types import Batch


class Actor:
    """Log-probabilities and policy updates, at the temperature of the rollouts."""

    def __init__(self, model: Model, temperature: float) -> None:
        assert isinstance(model.net, LanguageModel)
        self.model = model
        self.temperature = temperature

    def logprobs(self, batch: Batch) -> Tensor:
        """log pi(y_t | x, y_<t) of every response token: float32 [T], on every rank."""

        def reading(micro: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
            return micro.response_cells, self._logprobs(micro, logits)[0]

        return self.model.read(batch, int(batch.response_lengths.sum()), reading)

    def update(
        self,
        batch: Batch,
        advantages: Tensor,
        old_logprobs: Tensor,
        reference_logprobs: Tensor | None,
        config: ActorUpdateConfig,
        order: list[Tensor],
    ) -> dict[str, float]:
        """One optimizer step for each mini-batch of rows in `order` (int64 each), by `policy_loss`.

        `advantages`, `old_logprobs` and `reference_logprobs` are float32 [T]. Returns figures over all steps.
        """

        def loss(micro: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
            logprobs, entropy = self._logprobs(micro, logits)

            def pick(flat: Tensor) -> Tensor:
                return flat[micro.response_cells].to(logits.device)

            return policy_loss(
                logprobs,
                entropy,
                pick(old_logprobs),
                pick(advantages),
                None if reference_logprobs is None else pick(reference_logprobs),
                micro.response_lengths,
                config,
            )

        assert isinstance(self.model, TrainedModel)
        steps = [self.model.step(batch, rows, loss, len(ROW_METRICS), config.optimizer) for rows in order]
        return _summary(steps)

    def _logprobs(self, micro: MicroBatch, logits: Tensor) -> tuple[Tensor, Tensor]:
        vocab = self.model.net.shape.vocab
        return logprobs_and_entropy(logits[micro.predicting], micro.targets, vocab, self.temperature)


def _summary(steps: list[tuple[Tensor, float]]) -> dict[str, float]:
    rows = torch.cat([table for table, _ in steps])
    names = {name: f"actor/{name}" for name in ROW_METRICS}
    figures = {names[name]: float(rows[:, i].mean()) for i, name in enumerate(ROW_METRICS)}
    ratio = rows[:, ROW_METRICS.index("ratio")]
    return figures | {
        "actor/ratio_min": float(ratio.min()),
        "actor/ratio_max": float(ratio.max()),
        "actor/grad_norm": sum(norm for _, norm in steps) / len(steps),
    }
