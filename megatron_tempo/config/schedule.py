"""The iterations and evaluations of a run."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.config.updates import KlReference


def total(config: Config) -> int:
    """Iterations of the run, over all stages."""
    return sum(stage.iterations for stage in config.stages().values())


def has_reference(config: Config) -> bool:
    """Whether a stage that runs has a KL term, and so a reference policy."""
    return model_is_reference(config) or keeps_start(config)


def keeps_start(config: Config) -> bool:
    """Whether the run keeps the policy with which stage 2 starts, as the reference of its KL term.

    Without a stage 1 in the run, this policy is `model.path`.
    """
    stage = config.stage2
    kept = stage.actor.kl_coef > 0 and stage.actor.kl_reference is KlReference.start
    return kept and config.stage1.iterations > 0 and stage.iterations > 0


def model_is_reference(config: Config) -> bool:
    """Whether a stage that runs has a KL term to the weights of `model.path`."""
    return any(
        stage.iterations > 0 and stage.actor.kl_coef > 0 and not (name == "stage2" and keeps_start(config))
        for name, stage in config.stages().items()
    )


def first_step(config: Config, stage_name: str) -> int:
    """Iterations of the run before a stage."""
    stages = config.stages()
    return sum(stages[name].iterations for name in list(stages)[: list(stages).index(stage_name)])


def remaining(config: Config, done: int) -> Iterator[tuple[str, StageConfig, int]]:
    """(stage name, stage, iteration from 0) of every iteration after the first `done` of the run."""
    for name, stage in config.stages().items():
        for iteration in range(min(done, stage.iterations), stage.iterations):
            yield name, stage, iteration
        done = max(0, done - stage.iterations)


def position(config: Config, step: int) -> dict[str, int]:
    """Completed iterations of each stage after `step` iterations of the run."""
    done = {}
    for name, stage in config.stages().items():
        done[name] = min(step, stage.iterations)
        step -= done[name]
    return done


def place(config: Config, step: int) -> tuple[str, int]:
    """The stage of the last of `step` iterations, and its completed iterations; for step 0 the first stage, and 0."""
    done = position(config, step)
    begun = [name for name, count in done.items() if count]
    first = next((name for name, stage in config.stages().items() if stage.iterations), "stage1")
    name = begun[-1] if begun else first
    return name, done[name]


def evaluation_point(config: Config, step: int) -> str | None:
    """Which evaluation is due after `step` iterations: before, between, after or during; None if none is."""
    if step == 0:
        return "before"
    if step == total(config):
        return "after"
    ends = 0
    for stage in config.stages().values():
        if step <= ends + stage.iterations:
            if step == ends + stage.iterations:
                return "between"
            every = config.evaluation.every
            return "during" if every and (step - ends) % every == 0 else None
        ends += stage.iterations
    raise AssertionError(f"step {step} is behind the run's end")


def evaluations_left(config: Config, done: int) -> int:
    """Number of records that a run with `done` completed iterations has yet to write to evaluations.jsonl."""
    points, start = int(done == 0), 0
    for stage in config.stages().values():
        end, every = start + stage.iterations, config.evaluation.every
        if end > max(start, done):
            points += 1  # at its end
            if every:  # at multiples of `every` before it, counted from the stage's start
                points += (stage.iterations - 1) // every - max(0, done - start) // every
        start = end
    return points * len(config.evaluation.sets)
