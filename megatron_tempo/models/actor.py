"""The actor: the policy pi_theta, which is trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_tempo.config.stages import ActorUpdateConfig, Baseline
from megatron_tempo.kernels.advantages import token_advantages
from megatron_tempo.kernels.policy_loss import ROW_METRICS, Experience
from megatron_tempo.kernels.rows import Rows
from megatron_tempo.models.gpt import LanguageModel
from megatron_tempo.models.nonfinite_guard import NonFiniteGuard
from megatron_tempo.models.packing import MicroBatch, data_share, value_cells
from megatron_tempo.models.trained import Model, TrainedModel
from megatron_tempo.models.update import Steps, run_mini_batches
from megatron_tempo.types import Batch


class Actor:
    """Computes log-probabilities and policy updates, at the temperature of the rollouts."""

    def __init__(self, model: Model, guard: NonFiniteGuard | None = None) -> None:
        """`guard`: None if the model is not trained."""
        assert isinstance(model.net, LanguageModel)
        self.model, self.guard = model, guard
        self.kernels = model.net.kernels

    def logprobs(self, batch: Batch) -> Tensor:
        """log pi(y_t | x, y_<t) of every response token: float32 [T], on every rank."""

        def extract(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            return micro.response_cells, output[0]

        return self.model.read(batch, int(batch.response_lengths.sum()), extract)

    def update(
        self,
        batch: Batch,
        experience: Experience,
        baseline: Baseline,
        config: ActorUpdateConfig,
        order: list[Tensor],
        iteration: int = 0,
    ) -> dict[str, float]:
        """Take one optimizer step on `policy_loss` for each mini-batch of rows in `order` (int64 each).

        `experience`: of the whole batch, on the CPU. `iteration`: the run's, from 1; 0 outside a run. Returns metrics
        over all steps that were not skipped. Raises NotFiniteError.
        """
        assert isinstance(self.model, TrainedModel)
        assert self.guard is not None
        experience = replace(
            experience,
            moments=self._moments(batch, experience, baseline) if config.whiten_advantages else None,
            engine_logprobs=None if config.importance_cap is None else experience.engine_logprobs,
        )

        def loss(micro: MicroBatch, output: Tensor) -> tuple[Tensor, Tensor]:
            logprobs, entropy = output
            given = _of_micro_batch(experience, micro)
            return self.kernels.policy_loss(logprobs, entropy, given, micro.response_rows, baseline, config)

        def given(rows: Tensor) -> dict[str, Tensor]:
            return _loss_inputs(batch, experience, baseline, rows)

        steps = run_mini_batches(
            self.model, self.guard, batch, order, loss, len(ROW_METRICS), config.optimizer, given, iteration
        )
        metrics = _summary(steps, batch.response_lengths[steps.rows]) if len(steps.rows) else {}
        return metrics | {"actor/skipped": float(steps.skipped)}

    def _moments(self, batch: Batch, experience: Experience, baseline: Baseline) -> Tensor:
        """The moments of all advantages of the batch. Each data-parallel rank computes those of its share."""
        layout, device = self.model.layout, self.model.device
        mine = data_share(batch.response_lengths, layout.data_rank, layout.data)
        values = experience.values[value_cells(batch, mine)].to(device)
        rows = Rows.of(batch.response_lengths[mine], device)
        with layout.groups.current():
            group = parallel_state.get_data_parallel_group()
        return self.kernels.advantage_moments(values, experience.rewards[mine].to(device), rows, baseline, group)


def _of_micro_batch(experience: Experience, micro: MicroBatch) -> Experience:
    """The experience of a micro-batch's rows, on its device."""

    def pick(flat: Tensor | None, cells: Tensor) -> Tensor | None:
        return None if flat is None else flat[cells].to(micro.tokens.device)

    tokens = micro.response_cells
    return Experience(
        old_logprobs=experience.old_logprobs[tokens].to(micro.tokens.device),
        values=experience.values[micro.value_cells].to(micro.tokens.device),
        rewards=experience.rewards[micro.rows].to(micro.tokens.device),
        engine_logprobs=pick(experience.engine_logprobs, tokens),
        reference_logprobs=pick(experience.reference_logprobs, tokens),
        moments=experience.moments,
    )


def _loss_inputs(batch: Batch, experience: Experience, baseline: Baseline, rows: Tensor) -> dict[str, Tensor]:
    """The inputs of the loss of these rows, to be written to disk for the analysis of a skipped step."""
    lengths = batch.response_lengths
    advantages = token_advantages(experience.values, experience.rewards, Rows.of(lengths, lengths.device), baseline)
    by_token = {
        "old_logprobs": experience.old_logprobs,
        "reference_logprobs": experience.reference_logprobs,
        "advantages": advantages,
    }
    picked = {name: _select_rows(flat, lengths, rows) for name, flat in by_token.items() if flat is not None}
    values = _select_rows(experience.values, lengths + 1, rows)
    return {**picked, "values": values, "rewards": experience.rewards[rows]}


def _select_rows(flat: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
    parts = flat.split(lengths.tolist())
    return torch.cat([parts[row] for row in rows.tolist()])


def _summary(steps: Steps, lengths: Tensor) -> dict[str, float]:
    """Metrics from the rows of all steps. `lengths`: int64 [rows]. Advantages are averaged over tokens."""
    table = dict(zip(ROW_METRICS, steps.metrics.unbind(1), strict=True))
    share = lengths / lengths.sum()
    advantage, square = (float(table.pop(name).double() @ share.double()) for name in ("advantage", "advantage_square"))
    count = int(lengths.sum())
    variance = max(0.0, square - advantage**2) * count / max(count - 1, 1)
    least, greatest = table.pop("token_ratio_min"), table.pop("token_ratio_max")
    return {
        **{f"actor/{name}": float(column.mean()) for name, column in table.items()},
        "actor/clip_fraction": float((table["clip_high"] + table["clip_low"]).mean()),
        "actor/ratio_min": float(table["ratio"].min()),
        "actor/ratio_max": float(table["ratio"].max()),
        "actor/token_ratio_min": float(least.min()),
        "actor/token_ratio_max": float(greatest.max()),
        "actor/grad_norm": sum(steps.grad_norms) / len(steps.grad_norms),
        "advantage/mean": advantage,
        "advantage/std": variance**0.5,
    }
