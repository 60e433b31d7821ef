"""What is due after which iteration, by cases worked out by hand."""

from __future__ import annotations

import pytest

from megatron_tempo.config.schedule import evaluation_point, evaluations_left, remaining, total
from megatron_tempo.config.schema import Config


def config_of(stage1: int, stage2: int, every: int, sets: int = 1) -> Config:
    config = Config()
    config.stage1.iterations, config.stage2.iterations = stage1, stage2
    config.evaluation.every = every
    config.evaluation.sets = {f"set{i}": None for i in range(sets)}  # type: ignore[misc]
    return config


@pytest.mark.parametrize(
    ("stage1", "stage2", "every", "points"),
    [
        # every third iteration of a stage, counted from its start
        (4, 7, 3, "before - - during between - - during - - during after"),
        # where a multiple of `every` is a stage's end, the end counts
        (3, 3, 3, "before - - between - - after"),
        (2, 2, 1, "before during between during after"),
        # 0: only before, between and after
        (2, 3, 0, "before - between - - after"),
        (1, 1, 10, "before between after"),
        # a stage of no iterations has no end of its own
        (0, 4, 2, "before - during - after"),
        (4, 0, 2, "before - during - after"),
        (0, 1, 1, "before after"),
        (0, 0, 5, "before"),
    ],
)
def test_evaluation_points(stage1: int, stage2: int, every: int, points: str) -> None:
    config = config_of(stage1, stage2, every, sets=2)
    wanted = [None if word == "-" else word for word in points.split()]
    assert total(config) == stage1 + stage2
    assert [evaluation_point(config, step) for step in range(stage1 + stage2 + 1)] == wanted
    # A resumed run has the evaluation of the step it resumes at behind it; a fresh one has all before it.
    assert evaluations_left(config, 0) == 2 * sum(point is not None for point in wanted)
    for done in range(1, stage1 + stage2 + 1):
        assert evaluations_left(config, done) == 2 * sum(point is not None for point in wanted[done + 1 :])


def test_a_step_behind_the_end_is_an_error() -> None:
    with pytest.raises(AssertionError, match="step 3"):
        evaluation_point(config_of(1, 1, 1), 3)


def test_no_sets_no_evaluations() -> None:
    assert evaluations_left(config_of(2, 2, 1, sets=0), 0) == 0


def test_remaining_iterations() -> None:
    config = config_of(2, 3, 1)
    one, two = config.stage1, config.stage2
    steps = [("stage1", one, 0), ("stage1", one, 1), ("stage2", two, 0), ("stage2", two, 1), ("stage2", two, 2)]
    for done in range(6):
        iterations = list(remaining(config, done))
        assert iterations == steps[done:]
        assert all(stage is wanted for (_, stage, _), (_, wanted, _) in zip(iterations, steps[done:], strict=True))
    assert [name for name, _, _ in remaining(config_of(0, 2, 1), 0)] == ["stage2", "stage2"]
    assert [name for name, _, _ in remaining(config_of(2, 0, 1), 1)] == ["stage1"]
    assert list(remaining(config_of(0, 0, 1), 0)) == []
