"""Rules on the off-policy correction (`stageN.actor.correction`)."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tempo.config.correction import CorrectionConfig, CorrectionLevel, OutOfBounds
from megatron_tempo.config.problem import Problem, show
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig

# An upper bound to start with, which the fixes name: Yao et al. (2025) use 2 for tokens. A geometric mean of ratios is
# close to 1.
_HIGH = {CorrectionLevel.token: "2", CorrectionLevel.sequence: "2", CorrectionLevel.geometric: "1.01"}


def check(config: Config) -> Iterator[Problem]:
    for name, stage in config.stages().items():
        if stage.iterations > 0:
            yield from _bounds(f"{name}.actor.correction", stage.actor.correction)
            yield from _stale(config, name, stage)


def _stale(config: Config, name: str, stage: StageConfig) -> Iterator[Problem]:
    """Tokens of earlier weights, which the policy loss would take as the actor's own."""
    staleness, field = config.rollout.max_staleness, f"{name}.actor.correction"
    if staleness < 1 or stage.actor.correction.level is not None or _only_warms_up(stage):
        return
    wrong = f"with rollout.max_staleness={staleness} the actor is trained on tokens of earlier weights as if they were "
    wrong += "of its own, and may collapse"
    bound = "" if stage.actor.correction.high is not None else f" and {field}.high={_HIGH[CorrectionLevel.token]}"
    yield Problem(f"{field}.level", None, wrong, f"{field}.level=token{bound}, or rollout.max_staleness=0")


def _only_warms_up(stage: StageConfig) -> bool:
    return stage.warms_up(stage.iterations - 1)


def _bounds(field: str, given: CorrectionConfig) -> Iterator[Problem]:
    low, high = given.low, given.high
    if any(bound is not None and not bound > 0 for bound in (low, high)):
        return  # reported as numbers
    if given.level is None:
        for name, bound in (("low", low), ("high", high)):
            if bound is not None:
                fix = f"{field}.{name}=null" if high is None else f"{field}.level=token, or {field}.{name}=null"
                yield Problem(f"{field}.{name}", bound, "nothing is bounded without a level", fix)
        if given.out_of_bounds is not OutOfBounds.truncate:
            fix = f"{field}.out_of_bounds=truncate, or {field}.level=token and {field}.high=2"
            yield Problem(f"{field}.out_of_bounds", given.out_of_bounds.name, "nothing is bounded without a level", fix)
        return
    if high is None:
        wrong = f"weights of level={given.level.name} have no upper bound: one sample may outweigh all others"
        yield Problem(f"{field}.high", None, wrong, f"{field}.high={_HIGH[given.level]}")
    elif low is not None and low >= high:
        yield Problem(f"{field}.low", low, f"no ratio lies between it and high={high}", f"{field}.low=null")
    elif given.out_of_bounds is OutOfBounds.mask and not (low or 0.0) <= 1.0 <= high:
        wrong = f"tokens of the actor's own policy, whose ratio is 1, are masked by low={show(low)}, high={show(high)}"
        fix = f"{field}.low=null and {field}.high={_HIGH[given.level]}, or {field}.out_of_bounds=truncate"
        yield Problem(f"{field}.out_of_bounds", "mask", wrong, fix)
