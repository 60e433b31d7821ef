"""How far a run has come: its step, its checkpoints, and how it resumes and stops."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tempo.checkpoint.checkpoints import Checkpoints, LatestCheckpoint
from megatron_tempo.config import schedule
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.tree import as_json, differences
from megatron_tempo.config.tree import load as load_config
from megatron_tempo.data.seen import Seen
from megatron_tempo.errors import EngineError, RejectedRolloutsError, Stopped, UnwrittenError
from megatron_tempo.files import replace_file
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.runtime.stop_request import StopRequests
from megatron_tempo.training.inputs import REFERENCE
from megatron_tempo.training.phases import PhaseTimer
from megatron_tempo.training.rollout_requests import RolloutRequests
from megatron_tempo.weights.export import origin_of

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RunState:
    """A run's position, in memory and on disk. `step` counts its iterations over both stages."""

    config: Config
    is_writer: bool
    models: dict[str, TrainedModel]  # of the checkpoints
    requests: RolloutRequests
    checkpoints: Checkpoints
    seen: Seen
    timer: PhaseTimer
    inputs: dict[str, str] = field(default_factory=dict)  # of inputs other than training prompts (training.inputs)
    step: int = 0
    evaluated: bool = True  # the evaluations due at `step` are written

    # Position

    def advance(self) -> None:
        """Count a completed iteration."""
        self.step += 1
        self.requests.discard_oldest()
        self.evaluated = False

    def due_evaluation(self) -> tuple[str, str, int] | None:
        """The evaluation that is due: its point (`schedule.evaluation_point`), stage and iteration. None if none is."""
        point = schedule.evaluation_point(self.config, self.step)
        return None if point is None or self.evaluated else (point, *schedule.place(self.config, self.step))

    def mark_evaluated(self) -> None:
        """Note that the evaluations due at this step are written."""
        self.evaluated = True

    # Resuming

    def resume(self, latest: LatestCheckpoint) -> None:
        """Load the checkpoint that was found, if there is one, and cut the run's files back to its step. Collective."""
        if latest.path is not None:
            self.checkpoints.load(latest, self.models)
            saved = latest.state.get("inputs", {})
            self.inputs |= {REFERENCE: saved[REFERENCE]} if REFERENCE in saved else {}
        self.step = latest.state.get("step", 0)
        self.evaluated = latest.state.get("evaluated", self.step > 0)
        self.requests.restore(latest.state.get("asked_ahead"))
        self.requests.votes.restore(latest.state.get("votes"))
        if latest.path is not None:
            log.info("resumed from %s, %d iterations done", latest.path, self.step)
        raise_on_all_ranks(partial(self._restore_files, latest.state.get("seen")))

    def _restore_files(self, seen: dict[str, Any] | None) -> None:
        metrics = self.timer.metrics
        metrics.rewind(self.step)
        if warning := self.seen.resume(self.step, Path(self.config.model.path), seen):
            log.warning("%s", warning)
        self._record_config()
        metrics.plan(self.config.stages(), schedule.evaluations_left(self.config, self.step), self.step)

    def _record_config(self) -> None:
        """Write the config to the run's folder. If it differs from the last start's, report that and keep both."""
        path = Path(self.config.run.dir) / "config.json"
        if not self.is_writer:
            return
        if path.exists():
            changes = differences(load_config(path), self.config)
            if not changes:
                return
            older = path.with_name(f"config_until_step_{self.step:08d}.json")
            log.info("%s", "\n  ".join([f"the config differs from the last start's, kept as {older}:", *changes]))
            replace_file(older, path.read_bytes(), fsync=True)  # not renamed: there is always a config.json
        replace_file(path, as_json(self.config), fsync=True)

    # Saving

    def checkpoint_if_due(self) -> None:
        """Raise the error of an earlier checkpoint that could not be written; save one if it is due. Collective."""
        self.checkpoints.check()
        every, total = self.config.checkpoint.every, schedule.total(self.config)
        if self.step == total or (every and self.step % every == 0):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save the run between two iterations. A resumed run asks again what was asked ahead. Collective."""
        self.requests.engine.sleep()  # a colocated one: its GPUs hold the models
        with self.timer.phase("checkpoint", self.step):
            state = {
                "streams": self.requests.resume_point(),
                "asked_ahead": self.requests.asked_ahead(),
                "votes": self.requests.votes.state(),
                "position": schedule.position(self.config, self.step),
                "evaluated": self.evaluated,
                "inputs": self.inputs,
                "seen": self.seen.summary(),
                "config": to_plain(self.config),
            }
            self.checkpoints.save(self.step, self.models, state)

    def wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on disk. Raises the error if it could not be written."""
        with self.timer.phase("checkpoint", self.step):
            self.checkpoints.wait()

    def origin(self) -> dict[str, Any]:
        """The origin that an export of this step records: `weights.export.origin_of`. Collective."""
        return origin_of(self.config, self.step, self.checkpoints.manifest_sha256(self.step))

    # Stopping

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """If the engine fails inside, save what was trained since the last checkpoint before the run ends.

        Nothing is saved in an iteration whose rollouts are rejected: a resumed run does it from its beginning.

        If a record or a checkpoint cannot be written, the error names the checkpoint to resume from.
        """
        try:
            yield
        except UnwrittenError as error:
            with suppress(UnwrittenError):
                self.checkpoints.wait()
            raise UnwrittenError(f"{error}{self._resume_hint()}") from error
        except RejectedRolloutsError as error:  # in an iteration, in which the critic may have learnt
            self.checkpoints.wait()
            raise EngineError(f"{error}{self._resume_hint()}") from error
        except EngineError as error:
            raise EngineError(f"{error}{self._save_progress()}") from error

    def stop_if_requested(self, stop_requests: StopRequests) -> None:
        """If a stop is requested, save the run and raise Stopped. Collective."""
        if (warning := stop_requests.late()) and self.is_writer:
            log.warning("%s", warning)
        why = stop_requests.requested(is_writer=self.is_writer)
        if why is None:
            return
        hint = self._save_progress()
        if self.is_writer:
            stop_requests.acknowledge(self.step, why)
        raise Stopped(f"stopped after {self.step} iterations, as requested by {why}{hint}")

    def _save_progress(self) -> str:
        """Save what was trained since the last checkpoint. Returns a message that says where the run will resume."""
        self.checkpoints.wait()
        if self.step and self.checkpoints.saved != self.step:
            self.checkpoint()
            self.checkpoints.wait()
        return self._resume_hint()

    def _resume_hint(self) -> str:
        saved = self.checkpoints.saved
        return "" if saved is None else f"; rerun the same command to resume from {self.checkpoints.path(saved)}"
