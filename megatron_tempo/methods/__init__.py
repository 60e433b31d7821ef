"""The training methods, one file each. A method turns an iteration's rollouts into updates of critic and actor."""

from __future__ import annotations

from typing import Protocol

from megatron_tempo.config.extensions import Extension, wrong_result
from megatron_tempo.config.stages import Method, StageConfig, load_method
from megatron_tempo.methods import empo, grpo, ppo, tempo, ttrl
from megatron_tempo.methods.learner import Learner, Rollouts


class Iterate(Protocol):
    """One iteration of a method. Returns metrics by name. `iteration` counts from 0 in its stage."""

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
