"""What keeps a configuration from being rehearsed: all that `check` refuses, except files of the job's machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_tempo.config.choices import Device
from megatron_tempo.config.problem import Problem
from megatron_tempo.config.recipes import GPUS
from megatron_tempo.config.rules import check
from megatron_tempo.config.schema import Config
from megatron_tempo.plan.split import problems as plan_problems
from megatron_tempo.plan.split import split_of

# Fields whose rules look for files, folders and programs of the machines that train.
_ELSEWHERE = (
    *("run.dir", "model.path", "model.critic_path", "data", "evaluation.sets", "rollout.replay"),
    *("rollout.servers.python", "rollout.servers.key_file", "rollout.servers.addresses", "rewards.judge.key_file"),
)
_NOWHERE = "rehearsal-of-no-folder"  # run.dir while the rules are checked: they may not look at the user's


def problems(config: Config) -> list[Problem]:
    """All problems, those of `plan` first."""
    found = plan_problems(config)
    if any(problem.field.split(".")[0] in ("cluster", "model") for problem in found):
        return found
    reported = {problem.field for problem in found}
    without_folder = replace(config, run=replace(config.run, dir=_NOWHERE))
    rules = check(without_folder, world_size=split_of(config).trainers)
    own = [*rules, *_gpu(config)]
    return found + [one for one in own if one.field not in reported and not _is_elsewhere(one.field)]


def _is_elsewhere(field: str) -> bool:
    return any(field == name or field.startswith(f"{name}.") for name in _ELSEWHERE)


def _gpu(config: Config) -> Iterator[Problem]:
    if config.run.device is Device.cpu:
        fix = "run.device=auto; to try a configuration on a CPU, train it for an iteration"
        yield Problem("run.device", config.run.device.name, "a rehearsal is of a run on GPUs", fix)
    assert config.cluster is not None
    if config.cluster.gpu not in GPUS:
        wrong = "the GPU's compute capability is unknown, so kernels cannot be compiled for it"
        yield Problem("cluster.gpu", config.cluster.gpu, wrong, f"cluster.gpu=one of {', '.join(GPUS)}")
