"""TensorBoard and Weights & Biases. If one fails, the run continues without it."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_tempo.files import replace_file
from megatron_tempo.observability.records import METRICS

UPLOAD_SECONDS = 120.0  # time limit of Weights & Biases at a run's end


def tensorboard_writer(run_dir: Path, purge_step: int | None = None) -> Any:
    try:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
    except ImportError as error:
        raise ValueError(
            "metrics.tensorboard=true requires the tensorboard package, which is not installed: "
            "pip install tensorboard, or set it to false"
        ) from error
    return tensorboard.SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)


def wandb_run(run_dir: Path, project: str, warn: Callable[[str], None]) -> WandbRun:
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"metrics.wandb_project={project} requires the wandb package, which is not installed: "
            "pip install wandb, or set it to null"
        ) from error
    return WandbRun(module, run_dir, project, warn)


class WandbRun:
    """A Weights & Biases run. Its failure does not end the training."""

    def __init__(self, module: Any, run_dir: Path, project: str, warn: Callable[[str], None]) -> None:
        self._errors = (module.errors.Error, OSError)
        self._warn = warn
        id_file = run_dir / "wandb_id"  # a resumed job continues the same W&B run
        self._run: Any = None
        try:
            if not id_file.exists():
                replace_file(id_file, uuid.uuid4().hex, fsync=True)
            self._run = module.init(
                project=project,
                name=run_dir.name,
                dir=str(run_dir),
                id=id_file.read_text(),
                resume="allow",
                # Without these a run that has lost its connection would wait at its end until the job's time limit.
                settings={"finish_timeout": UPLOAD_SECONDS, "finish_timeout_raises": True},
            )
        except self._errors as error:
            self._give_up(error)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        if self._run is not None:
            try:
                self._run.log(dict(numbers), step=step)
            except self._errors as error:
                self._give_up(error)

    def finish(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except self._errors as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._warn(f"Weights & Biases failed ({error}); training continues without it; {METRICS} has all metrics")
        self._run = None
