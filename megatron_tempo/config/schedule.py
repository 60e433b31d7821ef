"""What is due after which iteration."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig


def total(config: Config) -> int:
    """Iterations of the run, over all stages."""
    return sum(stage.iterations for stage in config.stages().values())


def remaining(config: Config, done: int) -> Iterator[tuple[str, StageConfig, int]]:
    """(stage name, stage, iteration from 0) of every iteration behind the first `done` of the run."""
    steps = [(name, stage, i) for name, stage in config.stages().items() for i in range(stage.iterations)]
    yield from steps[done:]


def position(config: Config, step: int) -> dict[str, int]:
    """How many iterations of each stage are behind a run after `step` of them."""
    done = {}
    for name, stage in config.stages().items():
        done[name] = min(step, stage.iterations)
        step -= done[name]
    return done


def place(config: Config, step: int) -> tuple[str, int]:
    """The stage that the last of `step` iterations was of, and how many of it are done; before the first: its stage."""
    done = position(config, step)
    begun = [name for name, count in done.items() if count]
    first = next((name for name, stage in config.stages().items() if stage.iterations), "stage1")
    name = begun[-1] if begun else first
    return name, done[name]


def evaluation_point(config: Config, step: int) -> str | None:
    """Why an evaluation is due after `step` iterations: before, between, after, during; None if none is."""
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
    """Lines still to be written to evaluations.jsonl by a run that has `done` iterations behind it."""
    first = done + 1 if done else 0
    points = sum(evaluation_point(config, step) is not None for step in range(first, total(config) + 1))
    return points * len(config.evaluation.sets)
