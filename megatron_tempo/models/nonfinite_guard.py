"""Guards training against non-finite losses and gradients: such steps are skipped, written to disk and counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_tempo.errors import NotFiniteError
from megatron_tempo.files import atomic_paths
from megatron_tempo.models.trained import Step
from megatron_tempo.types import Batch

log = logging.getLogger(__name__)

# The inputs of the loss for these rows of a batch, by name.
LossInputs = Callable[[Tensor], dict[str, Tensor]]


@dataclass(slots=True)
class NonFiniteGuard:
    """Counts consecutive skipped steps of a model.

    Each skipped step is written to `folder`/step_ITERATION_MODEL_K.safetensors. K is the number of the mini-batch in
    the update.
    """

    model: str  # actor, critic
    folder: Path
    limit: int  # maximum consecutive skipped steps
    is_writer: bool
    consecutive: int = field(default=0, init=False)

    def made(self) -> None:
        """Record a step that was taken."""
        self.consecutive = 0

    def skipped(self, iteration: int, number: int, batch: Batch, rows: Tensor, step: Step, inputs: LossInputs) -> None:
        """Record a skipped step: mini-batch `number`, with `rows`, in the update of the run's `iteration` (from 1).

        Raises NotFiniteError, on every rank, after `limit` consecutive skipped steps.
        """
        self.consecutive += 1
        path = self.folder / f"step_{iteration:08d}_{self.model}_{number}.safetensors"
        if self.is_writer:
            try:
                _write(path, batch.select(rows), rows, step, inputs(rows))
            except (OSError, SafetensorError) as error:
                log.warning("%s cannot be written (%s): the run continues without it", path, error)
        if self.consecutive >= self.limit:
            raise NotFiniteError(
                f"the {self.model}'s loss or gradient was not finite at {self.consecutive} optimizer steps in a row, "
                f"the last in iteration {iteration} (run.max_consecutive_nonfinite_steps). All of them were skipped. "
                f"The last mini-batch is in {path}; docs/monitoring.md describes how to read it"
            )


def _write(path: Path, batch: Batch, rows: Tensor, step: Step, inputs: dict[str, Tensor]) -> None:
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
        **inputs,
    }
    about = {"prompt_ids": json.dumps(batch.prompt_ids), "grad_norm": str(step.grad_norm)}
    with atomic_paths([path], fsync=True) as (temporary,):
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, about)
