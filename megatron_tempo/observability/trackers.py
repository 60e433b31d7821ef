"""TensorBoard and Weights & Biases. If one fails, the run continues without it."""

from __future__ import annotations

import importlib
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tempo.files import replace_file
from megatron_tempo.observability.records import METRICS

log = logging.getLogger(__name__)

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


def wandb_run(run_dir: Path, project: str) -> WandbRun:
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"metrics.wandb_project={project} requires the wandb package, which is not installed: "
            "pip install wandb, or set it to null"
        ) from error
    return WandbRun(module, run_dir, project)


class WandbRun:
    """A Weights & Biases run. Its failure does not end the training."""

    def __init__(self, module: Any, run_dir: Path, project: str) -> None:
        self._errors = (module.errors.Error, OSError)
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
        log.warning("Weights & Biases failed (%s); training continues without it; %s has all metrics", error, METRICS)
        self._run = None
