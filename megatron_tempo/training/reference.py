"""The reference policy of the KL term: `model.path`, or the policy with which stage 2 starts.

The latter is written to the run's folder when stage 2 starts, because a resumed run needs it too. A resumed run checks
that its weights are the same (`training.inputs`).
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_tempo.models.actor import Actor
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.training.context import RunContext
from megatron_tempo.training.inputs import kept_reference
from megatron_tempo.training.setup import build_reference
from megatron_tempo.types import Batch
from megatron_tempo.weights.export import export_hf


@dataclass(slots=True)
class Reference:
    """The reference policy, which is loaded when it is first needed. All methods but `use` are collective."""

    context: RunContext
    folder: Path  # of its weights
    model: Actor | None = None

    def logprobs(self, batch: Batch) -> Tensor:
        """Its log-probabilities of the held rows' response tokens: float32 [T]."""
        if self.model is None:
            self.model = build_reference(self.context, self.folder)
        return self.model.logprobs(batch)

    def use(self, folder: Path) -> None:
        """Take the weights of another folder."""
        if folder != self.folder:
            self.folder, self.model = folder, None

    def keep(self, actor: Actor) -> None:
        """Write the actor to the run's folder, in the place of what an earlier start has left there, and use it."""
        folder = kept_reference(self.context.config)
        is_writer = dist.get_rank() == 0
        raise_on_all_ranks(lambda: shutil.rmtree(folder) if is_writer and folder.exists() else None)
        export_hf(self.context.config, actor, None, folder.parent)
        self.use(folder)
