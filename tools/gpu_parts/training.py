"""Steps of actor and critic, for the parts that compare them."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from gpu_parts.setting import Setting
from megatron_tempo.config.choices import Device, Layers, Precision
from megatron_tempo.config.method_settings import Baseline
from megatron_tempo.config.schema import Config
from megatron_tempo.config.updates import ActorUpdateConfig, CriticUpdateConfig, OptimizerConfig
from megatron_tempo.kernels.policy_loss import Experience
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.training.context import RunContext, open_context
from megatron_tempo.training.setup import build_actor, build_critic
from megatron_tempo.types import Batch

LR = 1e-4  # large enough for three steps to change the outputs


@dataclass(slots=True)
class Seen:
    """Outputs and metrics by the step after which they were seen; 0: before the first one."""

    logprobs: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)

    def metric(self, step: int, name: str) -> float:
        """NaN if the step was skipped."""
        return self.metrics[step].get(name, math.nan)


@dataclass(frozen=True, slots=True)
class Pair:
    """Actor and critic of an open context."""

    context: RunContext
    actor: Actor
    critic: Critic

    def models(self) -> dict[str, Any]:
        return {"actor": self.actor.model, "critic": self.critic.model}

    def look(self, seen: Seen, step: int, batch: Batch) -> None:
        seen.logprobs[step] = self._of_all(batch, self.actor.logprobs(batch))
        seen.values[step] = self.critic.values(batch)  # of all rows on every rank: the batch has no owners

    def _of_all(self, batch: Batch, own: Tensor) -> Tensor:
        """Log-probabilities of all tokens on every rank, from those of the rows that each rank owns: [T] -> [T]."""
        lengths = batch.response_lengths.tolist()
        table = self.actor.gather(batch, pad_sequence(own.split(lengths), batch_first=True))
        return torch.cat([row[:length] for row, length in zip(table, lengths, strict=True)])

    def step(self, seen: Seen, step: int, batch: Batch) -> None:
        """One optimizer step of the critic, then one of the actor, on all rows."""
        assert batch.correct is not None
        order = [torch.arange(len(batch))]
        experience = Experience(self.actor.logprobs(batch), self.critic.values(batch), batch.correct)
        of_critic = CriticUpdateConfig(OptimizerConfig(lr=LR))
        of_actor = ActorUpdateConfig(OptimizerConfig(lr=LR), clip_low=0.2, clip_high=0.2)
        seen.metrics[step] = {
            **self.critic.update(batch, batch.correct, of_critic, order),
            **self.actor.update(batch, experience, Baseline.before_token, of_actor, order),
        }


@contextmanager
def opened(config: Config) -> Iterator[Pair]:
    """Process groups, and both models with the weights of `model.path`. Frees their memory at the end."""
    try:
        with open_context(config) as context:
            yield Pair(context, build_actor(context), build_critic(context))
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def config_of(setting: Setting, model: Path, precision: Precision, layers: Layers = Layers.local) -> Config:
    config = Config()
    config.run.dir, config.run.device = str(setting.folder / "run"), Device[setting.device]
    config.run.precision, config.model.path, config.model.layers = precision, str(model), layers
    config.parallel.micro_batch_tokens = 256 if setting.small else 4096
    return config


def narrow(setting: Setting) -> Precision:
    """The precision that is compared with fp32: bf16, which the trainer has on a GPU only."""
    return Precision.bf16 if setting.device == "cuda" else Precision.fp32


def mean_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


def share_apart(found: float, wanted: float) -> float:
    """The difference as a share of `wanted`."""
    return abs(found - wanted) / max(abs(wanted), 1e-12)
