"""The optimizer steps of an update. Those whose loss or gradient is not finite are not made, but told of and kept."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_tempo.config.stages import OptimizerConfig
from megatron_tempo.errors import NotFiniteError
from megatron_tempo.models.trained import Loss, Step, TrainedModel
from megatron_tempo.types import Batch

log = logging.getLogger(__name__)

# What the losses of these rows of a batch were made of, by name.
Given = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps that were made of an update, and how many were not."""

    rows: Tensor  # int64 [n]: the rows that they learnt from, in their order
    figures: Tensor  # float32 [n, metrics]
    grad_norms: list[float]  # of each step
    skipped: int


@dataclass(slots=True)
class Skips:
    """The skipped steps of a model. `iteration` is the run's, from 1.

    What was seen of a skipped step is written to `folder`/step_ITERATION_MODEL_K.safetensors, K being the mini-batch's
    number in the update.
    """

    model: str  # actor, critic
    folder: Path
    limit: int  # so many in a row are too many
    is_writer: bool
    iteration: int = 0
    in_a_row: int = field(default=0, init=False)

    def steps(
        self,
        trained: TrainedModel,
        batch: Batch,
        order: Sequence[Tensor],
        loss: Loss,
        metrics: int,
        config: OptimizerConfig,
        given: Given,
    ) -> Steps:
        """One step for each mini-batch of rows in `order` (int64 each); see `TrainedModel.step`. Collective.

        Raises NotFiniteError on every rank, with the weights as they were before the first of the row, where `limit`
        steps in a row cannot be made.
        """
        made: list[tuple[Tensor, Step]] = []
        for number, rows in enumerate(order, start=1):
            step = trained.step(batch, rows, loss, metrics, config)
            if step.made:
                self.in_a_row = 0
                made.append((rows, step))
                continue
            self.in_a_row += 1
            path = self.folder / f"step_{self.iteration:08d}_{self.model}_{number}.safetensors"
            if self.is_writer:
                try:
                    _write(path, batch.select(rows), rows, step, given(rows))
                except (OSError, SafetensorError) as error:
                    log.warning("%s cannot be written (%s): the run goes on, and leaves it out", path, error)
            if self.in_a_row >= self.limit:
                raise NotFiniteError(
                    f"the {self.model}'s loss or gradient was not finite at {self.in_a_row} optimizer steps in a row, "
                    f"the last in iteration {self.iteration}; none of them was made. The last mini-batch is in {path}; "
                    "docs/monitoring.md says how to read it (run.max_skipped)"
                )
        return Steps(
            torch.cat([rows for rows, _ in made]) if made else torch.empty(0, dtype=torch.int64),
            torch.cat([step.figures for _, step in made]) if made else torch.empty(0, metrics),
            [step.grad_norm for _, step in made],
            len(order) - len(made),
        )


def _write(path: Path, batch: Batch, rows: Tensor, step: Step, given: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "rows": rows,
        "group": batch.group,
        "prompt_tokens": batch.prompt_tokens,
        "prompt_lengths": batch.prompt_lengths,
        "response_tokens": batch.response_tokens,
        "response_lengths": batch.response_lengths,
        "engine_logprobs": batch.engine_logprobs,
        "losses": step.losses,
        **given,
    }
    about = {"prompt_ids": json.dumps(batch.prompt_ids), "grad_norm": str(step.grad_norm)}
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, about)
    os.replace(partial, path)
