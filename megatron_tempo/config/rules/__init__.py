"""The rules of the configuration, checked before anything is allocated. They only read the file system, except for an
unnamed temporary file that shows whether the run's folder can be written.

There is one file per topic; each yields all problems that it finds. A rule is skipped if it needs a value that another
rule rejected. If a number is above its bound, only the bounds are reported: other rules would count up to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

from megatron_tempo.config import resume
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.rules import (
    correction,
    data,
    evaluation,
    experts,
    extensions,
    layout,
    numbers,
    precision,
    rewards,
    rollout,
    router_replay,
    run,
    sampling,
    stages,
)
from megatron_tempo.config.rules.model import read_models
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import MISSING, walk


class Purpose(Enum):
    train = "train"
    eval = "eval"  # without stages, training data and checkpoints
    rehearse = "rehearse"  # the rules of megatron_tempo/rehearsal/problems.py instead
    plan = "plan"  # the rules of megatron_tempo/plan/split.py instead
    serve = "serve"  # numbers, and the rules of the engine
    convert = "convert"  # only numbers: a converter reads no configuration


def check(config: Config, *, world_size: int | None, purpose: Purpose = Purpose.train) -> list[Problem]:
    """All problems of `config`, in the order of its groups.

    `world_size`: number of launched processes; None: `parallel.world_size`. If that is None too, the rules on data
    parallelism are skipped.
    """
    refused_numbers = list(numbers.check(config))
    if not numbers.are_usable(config) or purpose is Purpose.convert:
        return refused_numbers
    if purpose is Purpose.serve:
        return [*refused_numbers, *rollout.check_serve(config)]
    shapes, problems = read_models(config)
    problems += refused_numbers
    problems += run.check(config, training=purpose is Purpose.train)
    refused = list(extensions.check_methods(config))
    config = extensions.without_methods(config, refused)
    problems += _missing(config, purpose)
    problems += layout.check(config, shapes, world_size)
    problems += experts.check(config, shapes, world_size)
    problems += precision.check(config, shapes)
    problems += rollout.check(config, world_size)
    problems += sampling.check(config, training=purpose is Purpose.train)
    problems += rewards.check(config, training=purpose is Purpose.train)
    problems += evaluation.check(config, required=purpose is Purpose.eval)
    problems += extensions.check(config, training=purpose is Purpose.train)
    if purpose is Purpose.train:
        problems += router_replay.check(config, shapes)
        problems += refused
        problems += data.check(config)
        if not refused or any(stage.iterations > 0 for stage in config.stages().values()):
            problems += stages.check(config)
            problems += correction.check(config)
        problems += stages.check_data_parallel(config, world_size)
        if not problems and (changed := resume.problem(config)):  # a wrong value would be reported as a change
            problems.append(changed)
    order = [path for path, _ in walk(config)]
    return sorted(problems, key=lambda problem: order.index(_group(problem.field, order)))


def _group(field: str, groups: list[str]) -> str:
    """The innermost group that holds `field`."""
    while field not in groups:
        field = field.rpartition(".")[0]
    return field


def _missing(config: Config, purpose: Purpose) -> Iterator[Problem]:
    """Mandatory values that are missing. Prompt sets that no stage uses need no file."""
    needed = {kind.name for stage in config.stages().values() if stage.iterations > 0 for kind in stage.prompts()}
    for path, node in walk(config):
        group, _, name = path.partition(".")
        if group == "data" and name and (purpose is Purpose.eval or name not in needed):
            continue
        for field in node.__dataclass_fields__:
            if getattr(node, field) == MISSING:
                full = f"{path}.{field}"
                yield Problem(
                    full, MISSING, "has no value", f"give {full}={_WANTED.get(full, 'FILE (.jsonl or .parquet)')}"
                )


_WANTED = {
    "run.dir": "FOLDER, where the run writes",
    "model.path": "FOLDER, the actor's Hugging Face folder",
    "model.critic_path": "FOLDER, the critic's Hugging Face folder, or null",
}
