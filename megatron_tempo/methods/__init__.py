"""The training methods, one file each. A method turns an iteration's rollouts into updates of critic and actor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megatron_tempo.config.extensions import Extension, wrong_result
from megatron_tempo.config.method_settings import Method
from megatron_tempo.config.stages import StageConfig, load_method
from megatron_tempo.methods import empo, entropy_min, grpo, intuitor, ppo, scrl, tempo, ttrl, ttrl_guard
from megatron_tempo.methods.learner import Learner, Rollouts, critic_rows, mini_batches, trainable_rows
from megatron_tempo.types import Batch


class Iterate(Protocol):
    """One iteration of a method. Returns metrics by name. `iteration` counts from 0 in its stage."""

    def __call__(
        self, learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int
    ) -> dict[str, float]: ...


METHODS: dict[Method, Iterate] = {
    Method.ppo: ppo.iterate,
    Method.tempo: tempo.iterate,
    Method.ttrl: ttrl.iterate,
    Method.ttrl_guard: ttrl_guard.iterate,
    Method.scrl: scrl.iterate,
    Method.empo: empo.iterate,
    Method.grpo: grpo.iterate,
    Method.intuitor: intuitor.iterate,
    Method.entropy_min: entropy_min.iterate,
}


# The rows that a method trains the actor on, from a batch's columns. Methods that are not here train on all that a
# stage allows.
_ACTOR_ROWS: dict[Method | Extension, Callable[[Batch, StageConfig], Tensor]] = {
    Method.ttrl: ttrl.actor_rows,
    Method.ttrl_guard: ttrl.actor_rows,
    Method.scrl: ttrl.actor_rows,
    Method.empo: empo.actor_rows,
}


def actor_order(batch: Batch, stage: StageConfig, seed: str) -> list[Tensor]:
    """The rows of each mini-batch, int64, of the actor's first epoch on `batch`, which needs no tokens for this.

    `seed`: as the learner's.
    """
    rows = _ACTOR_ROWS.get(stage.method, trainable_rows)(batch, stage)
    chosen = mini_batches(batch.group[rows], stage.actor.mini_batch_prompts, 1, f"{seed}/actor")
    return [rows[part] for part in chosen]


def critic_order(batch: Batch, stage: StageConfig, seed: str) -> list[Tensor]:
    """As `actor_order`, of the critic."""
    dropped = critic_rows(batch, stage)
    rows = torch.arange(len(batch)) if dropped is None else dropped
    chosen = mini_batches(batch.group[rows], stage.critic.mini_batch_prompts, 1, f"{seed}/critic")
    return [rows[part] for part in chosen]


def iterate_of(method: Method | Extension) -> Iterate:
    """The `iterate` function of a built-in method or of a user's method. A wrong result of the latter names it."""
    return imported(method) if isinstance(method, Extension) else METHODS[method]


def imported(extension: Extension) -> Iterate:
    """A user's method with a check of its metrics. Exceptions that it raises pass unchanged, with their traceback."""

    def iterate(learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int) -> dict[str, float]:
        metrics: object = load_method(extension).iterate(learner, rollouts, stage, iteration)
        if not isinstance(metrics, dict):
            raise wrong_result(extension, metrics, "a dict of metrics: {name: number}")
        for name, value in metrics.items():
            if not isinstance(name, str) or not isinstance(value, int | float):
                raise wrong_result(extension, {name: value}, "a dict of metrics: {name: number}; float(x) of a tensor")
        return metrics

    return iterate
