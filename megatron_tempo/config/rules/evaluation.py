"""Rules on evaluation and metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.util import find_spec

from megatron_tempo.config.problem import Problem, did_you_mean
from megatron_tempo.config.rules.data import check_answers, check_columns, check_file
from megatron_tempo.config.schema import Config


def check(config: Config, *, required: bool) -> Iterator[Problem]:
    """`required`: there must be something to evaluate."""
    evaluation = config.evaluation
    if required and not evaluation.sets:
        fix = "data=FILE, or evaluation.sets.NAME.path=FILE"
        yield Problem("evaluation.sets", evaluation.sets, "there is no set to evaluate", fix)
    for name, dataset in evaluation.sets.items():
        field = f"evaluation.sets.{name}"
        if not re.fullmatch(r"\w+", name):
            wrong = "a set's name becomes part of file and metric names"
            yield Problem("evaluation.sets", name, wrong, "name it with letters, digits and _ only")
        yield from check_file(field, dataset)
        if required:
            yield from check_columns(field, dataset)
        yield from check_answers(field, dataset)
    for k in evaluation.pass_k:
        if not 1 <= k <= evaluation.samples:
            wrong = f"pass@{k} needs a k from 1 to evaluation.samples={evaluation.samples}"
            fix = f"evaluation.samples={k}, or a smaller k" if k > 0 else "a k of 1 or more"
            yield Problem("evaluation.pass_k", evaluation.pass_k, wrong, fix)
    if evaluation.calibration_set is not None and evaluation.calibration_set not in evaluation.sets:
        fix = did_you_mean(evaluation.calibration_set, evaluation.sets)
        yield Problem("evaluation.calibration_set", evaluation.calibration_set, "is not in evaluation.sets", fix)
    yield from _trackers(config)


def _trackers(config: Config) -> Iterator[Problem]:
    wanted = {
        "tensorboard": (config.metrics.tensorboard, "metrics.tensorboard", "false"),
        "wandb": (config.metrics.wandb_project is not None, "metrics.wandb_project", "null"),
    }
    for package, (asked, field, off) in wanted.items():
        if asked and find_spec(package) is None:
            value = getattr(config.metrics, field.rpartition(".")[2])
            fix = f"pip install {package}, or {field}={off}"
            yield Problem(field, value, f"the package {package} is not installed", fix)
