"""Finds and checks the checkpoint to resume from, before anything is written: a rejected start changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tempo.checkpoint.checkpoints import LAST, Checkpoints, LatestCheckpoint, last_step
from megatron_tempo.config import resume, schedule
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import read
from megatron_tempo.data.seen import SEEN, read_seen
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.errors import InputError
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.observability.records import STARTS, read_metrics
from megatron_tempo.observability.records import read as read_records
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.training import inputs

log = logging.getLogger(__name__)

Streams = Mapping[str, PromptStream[Any]]


def find(
    config: Config,
    checkpoints: Checkpoints,
    models: dict[str, TrainedModel],
    streams: Streams,
    read_now: Mapping[str, str],
    is_writer: bool,
) -> LatestCheckpoint:
    """The checkpoint to resume from, if there is one. Sets the streams to its positions. Collective.

    `read_now`: fingerprints of this start's inputs other than training prompts (`training.inputs`).
    Raises InputError if the run's folder holds records of a run whose checkpoints are lost or cannot be read, or if the
    checkpoint does not fit the configuration, its schedule, the models or the questions.
    """
    run = Path(config.run.dir)
    raise_on_all_ranks(lambda: _check_records(config) if is_writer else None)
    latest = checkpoints.find()
    if latest.path is None:
        raise_on_all_ranks(lambda: _check_nothing_lost(run, latest) if is_writer else None)
    else:
        if absent := [name for name in _ENTRIES if not isinstance(latest.state.get(name), dict)]:
            raise InputError(f"{latest.path}/run.json has no {absent[0]}: no run has written it; give another run.dir")
        checkpoints.require(latest, models)
        _check_config(config, latest.path, latest.state)
        _check_position(config, latest.state)
        saved = latest.state.get("inputs", {})
        kept = inputs.of_reference(config) if inputs.REFERENCE in saved else {}  # from the start of stage 2
        inputs.check(saved, {**read_now, **kept})
        if is_writer:
            _warn_of_lost_records(run, latest.state["step"])
        for name, stream in streams.items():
            if name in latest.state["streams"]:
                stream.restore(latest.state["streams"][name])
    if latest.state.get("step", 0) < schedule.total(config):
        checkpoints.check_room(models)
        checkpoints.reserve(models)
    return latest


_ENTRIES = ("config", "position", "streams")  # of a run's state


def _check_records(config: Config) -> None:
    """Raises InputError for a bad line in a file that is read after the first write, or when the run ends."""
    read_seen(Path(config.model.path))
    for name in (SEEN, STARTS):
        read_records(Path(config.run.dir) / name)


def _check_nothing_lost(run: Path, latest: LatestCheckpoint) -> None:
    """Raises InputError if a run that had a checkpoint has none now. Starting at 0 would erase its records."""
    if latest.damaged:
        wrong = "; ".join(f"{path.name}: {problem}" for path, problem in latest.damaged)
        raise InputError(_LOST.format(run=run, what=f"no checkpoint is whole ({wrong})"))
    if what := _evidence(run):
        raise InputError(_LOST.format(run=run, what=what))


def _warn_of_lost_records(run: Path, step: int) -> None:
    recorded = max((record.get("step", 0) for record in read_metrics(run)), default=0)
    if recorded < step:  # an iteration is recorded before its checkpoint is saved
        text = "%s/metrics.jsonl has no records of iterations %d to %d, which the checkpoint has: the report lacks them"
        log.warning(text, run, recorded + 1, step)


_LOST = (
    "run.dir={run}: {what}; nothing was changed. Bring the checkpoints back to {run}/checkpoints, or mount them, then "
    "run the same command again. To begin anew, give another run.dir"
)


def _evidence(run: Path) -> str | None:
    """What shows that the run had a checkpoint; None if nothing does."""
    if exported := sorted(run.glob("hf_step_*")):
        return f"{exported[-1].name} is there, but no checkpoint of the run that exported it"
    steps = [record.get("step", 0) for record in read_metrics(run)]
    last = max(steps, default=0)
    try:
        noted = last_step(run)
    except FileNotFoundError:
        noted = last or None  # of a version that wrote no note: records without a checkpoint are not discarded
        return f"the records end with step {last}, but there is no checkpoint" if noted else None
    except (OSError, ValueError) as error:
        return f"there is no checkpoint, and {LAST} cannot be read ({error})"
    return None if noted is None else f"its checkpoint of step {noted} is gone, and there is no other"


def _check_config(config: Config, path: Path, state: Mapping[str, Any]) -> None:
    """Raises InputError if the checkpoint is of a run with another configuration."""
    if changes := resume.refused_changes(read(state["config"])[0], config):
        raise InputError(
            f"{path} is of a run with another configuration: {', '.join(changes)}; give another run.dir, or the "
            f"earlier values (docs/checkpoints.md lists what may change)"
        )


def _check_position(config: Config, state: Mapping[str, Any]) -> None:
    """Raises InputError if changed stage lengths put the checkpoint's step into another stage or iteration."""
    now = schedule.position(config, state["step"])
    for name, done in state["position"].items():
        if now.get(name, done) != done:
            raise InputError(
                f"{name}.iterations={config.stages()[name].iterations}: the run in {config.run.dir} has "
                f"{state['position']} iterations behind it, which this schedule would count as {now}; "
                f"give the earlier stages' lengths as they were, or another run.dir"
            )
