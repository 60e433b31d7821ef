"""The training methods, one file each. A method turns an iteration's rollouts into updates of critic and actor."""

from __future__ import annotations

from typing import Protocol

from megatron_tempo.config.stages import Method, StageConfig
from megatron_tempo.methods import empo, grpo, ppo, tempo, ttrl
from megatron_tempo.methods.learner import Learner, Rollouts


class Iterate(Protocol):
    """One iteration of a method: what it measured, by name. `iteration` counts from 0 in its stage."""

    def __call__(
        self, learner: Learner, rollouts: Rollouts, stage: StageConfig, iteration: int
    ) -> dict[str, float]: ...


METHODS: dict[Method, Iterate] = {
    Method.ppo: ppo.iterate,
    Method.tempo: tempo.iterate,
    Method.ttrl: ttrl.iterate,
    Method.empo: empo.iterate,
    Method.grpo: grpo.iterate,
}
