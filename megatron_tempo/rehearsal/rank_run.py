"""One rank's rehearsal: the trainer's models, an iteration of each stage, weight syncs, a checkpoint."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from megatron_tempo.checkpoint.saving import ModelSource
from megatron_tempo.config.choices import EngineKind
from megatron_tempo.config.model_shape import read_model_shape
from megatron_tempo.config.schema import Config
from megatron_tempo.data.seen import Seen
from megatron_tempo.data.sets import QuestionKeys
from megatron_tempo.files import replace_file
from megatron_tempo.models.machine import chosen_layers, described
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.nullgpu import guard
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.profiler import Profiler
from megatron_tempo.rehearsal.faults import fault_of
from megatron_tempo.rehearsal.lengths import Lengths
from megatron_tempo.rehearsal.meter import MeteredOffloader, PhaseMeter
from megatron_tempo.rehearsal.rollouts import MadeUpRequests, WeightSink
from megatron_tempo.rehearsal.scaled import rehearsed_iteration
from megatron_tempo.rehearsal.takeover import UnfilledHostMemory, take_over
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.training.context import RunContext, open_context
from megatron_tempo.training.phases import PhaseTimer
from megatron_tempo.training.reference import Reference
from megatron_tempo.training.row_owners import RowOwners
from megatron_tempo.training.run_state import RunState
from megatron_tempo.training.setup import build_actor, build_critic, build_engine, engine_weights
from megatron_tempo.training.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Task:
    """What a rank's process has to do. `config`: scaled, with the folders of the rehearsal."""

    config: Config
    rank: int
    world: int
    lengths: Lengths
    result: Path  # JSON: the phases, and the fault if there is one
    shared: bool  # whether servers take weights from shared GPU memory


def rehearse_rank(task: Task) -> None:
    """Run a rank, and write `task.result` at the start of each phase and at the end."""
    assert guard.is_rehearsal(), "only the null GPU may run a rehearsal"
    record: dict[str, Any] = {"rank": task.rank, "phases": [], "running": "imports", "fault": None, "machine": ""}
    record["layers"] = None
    meter: PhaseMeter | None = None

    def write(running: str) -> None:
        record["running"] = running
        record["phases"] = [] if meter is None else [asdict(phase) for phase in meter.phases]
        replace_file(task.result, json.dumps(record), fsync=False)

    write("start")
    try:
        with open_context(task.config, take_over(task.rank, task.world), watched=False) as opened:
            record["machine"] = described(task.config, opened.machine)
            record["layers"] = chosen_layers(task.config, opened.machine).value
            meter = PhaseMeter(opened.device, write)
            turns, lends = task.config.parallel.offload, task.config.rollout.is_colocated
            offloader = MeteredOffloader(one_at_a_time=turns, lends=lends, meter=meter)
            context = replace(opened, offloader=offloader)
            with _trainer(context, task, meter) as trainer:
                _run(trainer, meter)
    except Exception as error:  # noqa: BLE001 - every error on the GPU path is a finding
        record["fault"] = asdict(fault_of(error, record["running"] if meter is None else meter.running))
        record["fault"] |= {} if meter is None else meter.at_fault
    write("end")


@contextmanager
def _trainer(context: RunContext, task: Task, meter: PhaseMeter) -> Iterator[Trainer]:
    """The trainer without data, verifiers, evaluation and checkpoints: what those parts would do is taken over."""
    config, below = context.config, Path(context.config.run.dir)
    with Metrics(below, config.metrics, is_writer=False) as metrics, Verifiers(1, 1.0) as verifiers:
        with meter.phase("start"), UnfilledHostMemory():
            actor, critic = build_actor(context), build_critic(context) if config.has_critic else None
            gpus = context.offloader if config.rollout.is_colocated else None
            engine: Any = WeightSink(task.shared, parts=isinstance(config.rollout.engine, EngineKind), gpus=gpus)
            if not config.rollout.is_served:
                engine = build_engine(context)
        vocab, owners = read_model_shape(Path(config.model.path)).vocab, RowOwners(actor, critic)
        requests: Any = MadeUpRequests(config, vocab, task.lengths, owners, verifiers)
        seen = Seen(below, {}, {}, is_writer=False)
        timer = PhaseTimer(metrics, meter, Profiler([], below, context.device, task.rank))
        models = {"actor": actor.model, "critic": None if critic is None else critic.model}
        trained = {name: model for name, model in models.items() if isinstance(model, TrainedModel)}
        nothing: Any = None
        gc.freeze()  # as in a run
        yield Trainer(
            config=config,
            context=context,
            actor=actor,
            critic=critic,
            engine=engine,
            weights=engine_weights(actor, context),
            requests=requests,
            reference=Reference(context, Path(config.model.path)),
            evaluator=nothing,
            keys=QuestionKeys({}, {}, {}, {}, []),
            seen=seen,
            timer=timer,
            state=RunState(config, False, trained, requests, nothing, seen, timer),
            latest=nothing,
        )
        engine.close()


def _run(trainer: Trainer, meter: PhaseMeter) -> None:
    trainer.load_engine()
    for name, stage in trainer.config.stages().items():
        if stage.iterations > 0:
            meter.stage(name)
            trainer.iterate(name, stage, rehearsed_iteration(stage))
            trainer.load_engine()
    meter.stage("")
    trainer.engine.sleep()
    with trainer.phase("checkpoint"):
        for model in trainer.state.models.values():
            with model.at_work(), UnfilledHostMemory():
                ModelSource(model).copy().copy.wait()
    torch.cuda.synchronize()


def with_folders(config: Config, run: Path, model: Path) -> Config:
    """The configuration with the rehearsal's own folders, and without what needs other machines or the user's files."""
    metrics = replace(config.metrics, progress=False, report=False, tensorboard=False, wandb_project=None)
    return replace(
        config,
        run=replace(config.run, dir=str(run), hang_minutes=None),
        model=replace(config.model, path=str(model), critic_path=None),
        rollout=replace(config.rollout, dump=False, replay=None),
        metrics=metrics,
    )
