"""What ranks of a rehearsal do in place of an iteration: save a checkpoint on the disk, and go on from others'.

A rank is the only one of its world. It says what it finds in a file of its own, next to the checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tempo.checkpoint.checkpoints import Checkpoints
from megatron_tempo.models.megatron_compat import rehearsed
from megatron_tempo.rehearsal import rank_run
from megatron_tempo.rehearsal.meter import PhaseMeter
from megatron_tempo.training.trainer import Trainer

FOLDER = "TEMPO_TEST_CHECKPOINTS"  # a variable with the folder of all checkpoints
STEP = 7
_STORE = dist.HashStore()


def saves() -> None:
    """Take a step with each model, and write a checkpoint under the name of this rank's layers."""
    _plant(_save)


def resumes() -> None:
    """Read each checkpoint that there is, and take a step with each model after it."""
    _plant(_resume)


def _plant(run: Callable[[Trainer, PhaseMeter], None]) -> None:
    """Run `run` as the whole of a world: a world of one needs no stand-ins for gloo and for object collectives."""
    rehearsed.join_alone, rehearsed.echo_objects, rank_run._run = _join, lambda: None, run


def _join(rank: int, world: int, timeout: timedelta) -> None:
    dist.init_process_group("cpu:gloo,cuda:nccl", store=_STORE, rank=rank, world_size=world, timeout=timeout)


def name_of(trainer: Trainer) -> str:
    return f"{trainer.config.model.layers.name}-{trainer.config.run.precision.name}"


def _save(trainer: Trainer, meter: PhaseMeter) -> None:
    _step(trainer)
    _mark(trainer)
    with trainer.phase("checkpoint"):
        checkpoints = _checkpoints(trainer, name_of(trainer))
        checkpoints.save(STEP, trainer.state.models, {})
        checkpoints.wait()


def _resume(trainer: Trainer, meter: PhaseMeter) -> None:
    told: dict[str, Any] = {}
    for name in sorted(path.name for path in Path(os.environ[FOLDER]).iterdir() if path.is_dir()):
        with trainer.phase("checkpoint"):
            checkpoints = _checkpoints(trainer, name)
            latest = checkpoints.find()
            assert not latest.damaged, latest.damaged
            checkpoints.load(latest, trainer.state.models)
        told[name] = {
            "marked": _marks(trainer),
            "steps": {role: model.step_count for role, model in trainer.state.models.items()},
        }
        _step(trainer)
    path = Path(os.environ[FOLDER]) / f"{name_of(trainer)}.json"
    path.write_text(json.dumps(told))


def _checkpoints(trainer: Trainer, name: str) -> Checkpoints:
    return Checkpoints(Path(os.environ[FOLDER]) / name, 2, trainer.context.layouts.actor)


def _step(trainer: Trainer) -> None:
    trainer.iterate("stage1", trainer.config.stage1, rank_run.rehearsed_iteration(trainer.config.stage1))


def _mark(trainer: Trainer) -> None:
    """Give the models' vectors, the norms' weights, values that a copy keeps: nothing on this GPU can compute them."""
    for model in trainer.state.models.values():
        with model.at_work():
            for parameter in _vectors(model.net):
                parameter.data.copy_(_values(parameter))


def _marks(trainer: Trainer) -> dict[str, int]:
    """How many of each model's vectors have the values that the saved one had."""
    found = {}
    for role, model in trainer.state.models.items():
        with model.at_work():
            found[role] = sum(torch.equal(one.data.cpu(), _values(one)) for one in _vectors(model.net))
            for parameter in _vectors(model.net):
                parameter.data.copy_(torch.zeros_like(_values(parameter)))  # so that the next one cannot inherit them
    return found


def _vectors(net: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [parameter for parameter in net.parameters() if parameter.dim() == 1]


def _values(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.arange(1, parameter.numel() + 1, dtype=torch.float32).to(parameter.dtype)
