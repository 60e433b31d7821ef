"""Guards training against non-finite losses and gradients: such steps are skipped, written to disk and counted."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_tempo.errors import NotFiniteError
from megatron_tempo.files import atomic_paths
from megatron_tempo.models.trained import Step
from megatron_tempo.runtime.row_windows import row_windows
from megatron_tempo.types import Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LossInputs:
    """The inputs of the loss for a batch, by name: n rows, of which m are held, with T response tokens in total."""

    of_rows: dict[str, Tensor]  # [n]
    of_tokens: dict[str, Tensor] = field(default_factory=dict)  # float32 [T]
    of_values: dict[str, Tensor] = field(default_factory=dict)  # float32 [T + m]


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

    def skipped(
        self,
        iteration: int,
        number: int,
        batch: Batch,
        rows: Tensor,
        step: Step,
        inputs: LossInputs,
        reported: Tensor,
    ) -> None:
        """Record a skipped step: mini-batch `number`, with `rows`, in the update of the run's `iteration` (from 1).

        `reported`: bool [n], the rows of the batch whose tokens and inputs this rank gives: each row has one such rank.
        Collective. Raises NotFiniteError, on every rank, after `limit` consecutive skipped steps.
        """
        self.consecutive += 1
        path = self.folder / f"step_{iteration:08d}_{self.model}_{number}.safetensors"
        tensors = _gathered(batch, rows, inputs, reported, keep=self.is_writer)
        if self.is_writer:
            try:
                _write(path, batch, rows, step, tensors | {name: flat[rows] for name, flat in inputs.of_rows.items()})
            except (OSError, SafetensorError) as error:
                log.warning("%s cannot be written (%s): the run continues without it", path, error)
        if self.consecutive >= self.limit:
            raise NotFiniteError(
                f"the {self.model}'s loss or gradient was not finite at {self.consecutive} optimizer steps in a row, "
                f"the last in iteration {iteration} (run.max_consecutive_nonfinite_steps). All of them were skipped. "
                f"The last mini-batch is in {path}; docs/monitoring.md describes how to read it"
            )


def _gathered(batch: Batch, rows: Tensor, inputs: LossInputs, reported: Tensor, *, keep: bool) -> dict[str, Tensor]:
    """Tokens and inputs of these rows, from the ranks that have them, on the ranks that keep them. Collective."""
    own = {"response_tokens": batch.response_tokens, "engine_logprobs": batch.engine_logprobs}
    kinds = [
        ({"prompt_tokens": batch.prompt_tokens}, batch.prompt_lengths),
        (own | inputs.of_tokens, batch.response_lengths),
        (inputs.of_values, batch.response_lengths + 1),
    ]
    found: dict[str, Tensor] = {}
    for flats, lengths in kinds:
        if flats:
            found |= _rows_of(batch, rows, flats, lengths, reported, keep=keep)
    return found


def _rows_of(
    batch: Batch, rows: Tensor, flats: dict[str, Tensor], lengths: Tensor, reported: Tensor, *, keep: bool
) -> dict[str, Tensor]:
    """As `_gathered`, of flat tensors of the held rows; `lengths`: int64 [n], numbers of each row of the batch."""
    of_held = lengths[batch.held].tolist()
    parts = [flat.split(of_held) for flat in flats.values()]
    places, asked = batch.places, rows.tolist()

    def fill(i: int) -> list[Tensor] | None:
        return [part[int(places[asked[i]])] for part in parts] if bool(reported[asked[i]]) else None

    windows = [window.clone() for _, window in row_windows(lengths[rows], fill, len(flats)) if keep]
    columns = torch.cat(windows, dim=1) if windows else torch.empty(len(flats), 0, dtype=torch.int32)
    return {name: column.view(flat.dtype) for (name, flat), column in zip(flats.items(), columns, strict=True)}


def _write(path: Path, batch: Batch, rows: Tensor, step: Step, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        "rows": rows,
        "group": batch.group[rows],
        "prompt_lengths": batch.prompt_lengths[rows],
        "response_lengths": batch.response_lengths[rows],
        "losses": step.losses,
    }
    ids = [batch.prompt_ids[row] for row in rows.tolist()]
    about = {"prompt_ids": json.dumps(ids), "grad_norm": str(step.grad_norm)}
    with atomic_paths([path], fsync=True) as (temporary,):
        save_file({name: tensor.contiguous() for name, tensor in (columns | tensors).items()}, temporary, about)
