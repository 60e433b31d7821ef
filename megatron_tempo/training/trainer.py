"""One iteration of a run: rollouts, the method's updates, weight sync and evaluation. `training.jobs` has the loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.checkpoint.checkpoints import Checkpoints, LatestCheckpoint
from megatron_tempo.config import schedule
from megatron_tempo.config.method_settings import Prompts
from megatron_tempo.config.resume import check_run_folder
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.data.seen import Seen
from megatron_tempo.data.sets import SAMPLED, QuestionKeys, evaluation_sets, prompt_streams, tokenizer_findings
from megatron_tempo.data.tokenizer import load_tokenizer
from megatron_tempo.evaluation.evaluator import Evaluator
from megatron_tempo.methods import iterate_of
from megatron_tempo.methods.learner import Learner, Rollouts, iteration_seed
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.machine import chosen_layers, described
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.profiler import Profiler
from megatron_tempo.observability.terminal import show
from megatron_tempo.report.summary import judge_warning, summary_table
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout.batches import summed_counts
from megatron_tempo.rollout.engine import Engine
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.training import inputs
from megatron_tempo.training.context import RunContext, collective_timeout
from megatron_tempo.training.parity import ParityGate
from megatron_tempo.training.peak_memory import PeakMemory, planned
from megatron_tempo.training.phases import PhaseTimer
from megatron_tempo.training.reference import Reference
from megatron_tempo.training.resume_point import find
from megatron_tempo.training.rollout_requests import RolloutRequests
from megatron_tempo.training.row_owners import RowOwners
from megatron_tempo.training.run_state import RunState
from megatron_tempo.training.setup import (
    build_actor,
    build_critic,
    build_engine,
    build_evaluator,
    build_verifiers,
    engine_weights,
)
from megatron_tempo.types import Batch, TokenCount, Weights
from megatron_tempo.weights.export import export_hf

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Trainer:
    """Actor, critic and engine of a run, and what an iteration does with them."""

    config: Config
    context: RunContext
    actor: Actor
    critic: Critic | None  # None: no stage has one
    engine: Engine
    weights: Weights  # the actor's, for the engine
    requests: RolloutRequests
    evaluator: Evaluator
    keys: QuestionKeys
    seen: Seen
    timer: PhaseTimer
    state: RunState
    latest: LatestCheckpoint
    reference: Reference
    gate: ParityGate | None = None  # None: the engine's numbers are not compared (rehearsals)

    @classmethod
    @contextmanager
    def open(cls, context: RunContext) -> Iterator[Trainer]:
        """Read the data, build the models, open the run's files. The data comes first: it is the quickest to fail.

        Nothing is written before all inputs have been checked.
        """
        config, below = context.config, Path(context.config.run.dir)
        raise_on_all_ranks(lambda: check_run_folder(config) if context.is_writer else None)
        tokenizer = load_tokenizer(Path(config.model.path))
        with ExitStack() as stack:
            verifiers = stack.enter_context(build_verifiers(config))
            metrics = stack.enter_context(Metrics(below, config.metrics, context.is_writer, begun=False))
            keys = QuestionKeys.read(config, warn=context.is_writer)
            labelled, unlabelled = prompt_streams(config, tokenizer, verifiers, keys)
            sets = evaluation_sets(config, tokenizer, verifiers)
            firsts = [stream.first(SAMPLED) for stream in (labelled, unlabelled) if stream is not None]
            for line in tokenizer_findings(config, tokenizer, [*firsts, *sets.values()]):
                log.info("%s", line)
            read = inputs.fingerprints(config, sets)
            layers = chosen_layers(config, context.machine)
            peaks = PeakMemory(context.device, planned(config, layers, dist.get_world_size(), context.device))
            log.info("%s", described(config, context.machine))
            log.info("%s", peaks.plan())
            actor, critic = build_actor(context), build_critic(context) if config.has_critic else None
            models = _trained_models(actor, critic)
            checkpoints = _open_checkpoints(context)
            stack.callback(checkpoints.close)
            streams = {"labelled": labelled, "unlabelled": unlabelled}
            drawn = {name: stream for name, stream in streams.items() if stream is not None}
            latest = find(config, checkpoints, models, drawn, read, context.is_writer)
            _begin(metrics, checkpoints, latest, is_writer=context.is_writer)
            engine = build_engine(context)
            stack.callback(engine.close)
            metrics.watch(engine.health, engine.work.spans)
            owners = RowOwners(actor, critic)
            requests = RolloutRequests(config, engine, tokenizer, verifiers, labelled, unlabelled, owners)
            stack.callback(requests.close)
            seen = Seen(below, keys.labelled, keys.unlabelled, context.is_writer)
            profiler = Profiler(config.profile.steps, below / "profile", context.device, dist.get_rank())
            timer = PhaseTimer(metrics, peaks, profiler)
            trainer = cls(
                config=config,
                context=context,
                actor=actor,
                critic=critic,
                engine=engine,
                weights=engine_weights(actor, context),
                requests=requests,
                reference=Reference(context, Path(config.model.path)),
                evaluator=build_evaluator(config, engine, verifiers, tokenizer, sets, keys.evaluation, critic),
                keys=keys,
                seen=seen,
                timer=timer,
                latest=latest,
                state=RunState(config, context.is_writer, models, requests, checkpoints, seen, timer, read),
            )
            trainer.gate = ParityGate(requests, actor, trainer.weights, trainer.send_weights)
            yield trainer

    @property
    def step(self) -> int:
        """The number of completed iterations, over both stages."""
        return self.state.step

    @property
    def metrics(self) -> Metrics:
        return self.timer.metrics

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Measure the code inside as phase `name`: time, peak memory, name in traces."""
        return self.timer.phase(name, self.step)

    def resume(self) -> None:
        """Resume from the newest complete checkpoint, if there is one, and give the engine the actor's weights."""
        self.state.resume(self.latest)
        self.load_engine()
        if self.gate is not None:
            with self.phase("parity"):
                self.gate.at_start(self.step)

    def check_engine(self) -> None:
        """Compare the engine's log-probabilities with the actor's, if `rollout.parity_every` requires it. After a sync.

        Raises DriftError if they are further apart than `rollout.parity_tolerance`.
        """
        if self.gate is not None:
            with self.phase("parity"):
                self.gate.after_sync(self.step)

    def check_before_sleep(self) -> None:
        """As `check_engine`, of servers on the trainer's GPUs that generate ahead, before they sleep."""
        if self.gate is not None and self.config.rollout.is_colocated:
            with self.phase("parity"):
                self.gate.before_sleep(self.step)

    def iterate(self, stage_name: str, stage: StageConfig, iteration: int) -> dict[str, Any]:
        """Rollouts and the method's updates. Returns the line for metrics.jsonl."""
        started, tokens_before, number = time.monotonic(), self._token_count(), self.step + 1
        rollouts = self.rollouts(stage_name, stage, iteration)
        self.check_before_sleep()
        self.engine_sleeps()
        labelled = (*_ids(rollouts.labelled), *self.requests.dropped(Prompts.labelled))
        unlabelled = (*_ids(rollouts.unlabelled), *self.requests.dropped(Prompts.unlabelled))
        raise_on_all_ranks(lambda: self.seen.add(number, labelled, unlabelled))
        learner = Learner(
            self.actor,
            self.critic,
            self.reference.logprobs,
            self.phase,
            seed=iteration_seed(self.config.run.seed, stage_name, iteration),
            iteration=number,
            max_response_tokens=self.config.rollout.max_response_tokens,
            accepts=self._accepts,
        )
        metrics = iterate_of(stage.method)(learner, rollouts, stage, iteration)
        metrics |= _rollout_metrics(rollouts, self.step, time.monotonic() - started) | self.requests.metrics()
        peaks = self.timer.peaks.take()
        if iteration == stage.critic.warmup_iterations:  # the first with all its phases
            log.info("%s", self.timer.peaks.comparison(peaks))
        self.state.advance()
        return {
            "stage": stage_name,
            "method": stage.method.name,
            "iteration": iteration + 1,
            "step": number,
            **metrics,
            **judge_counts(self.requests.verifiers),
            "engine/resyncs": 0 if self.gate is None else self.gate.take_resyncs(),
            **({} if self.gate is None else self.gate.take_gaps()),
            "padding": self._token_count().padding_since(tokens_before),
            **peaks,
        }

    def rollouts(self, stage_name: str, stage: StageConfig, iteration: int) -> Rollouts:
        """This iteration's rollouts, generated or read from the folder `rollout.replay`. Collective."""
        config = self.config.rollout
        if config.replay is not None:
            return self.requests.replay(stage_name, stage, iteration)
        self.wake_engine()
        with self.phase("generate"), ExitStack() as stack:
            recorder = None
            if config.dump and self.context.is_writer:
                stack.enter_context(self.metrics.spare("rollouts/"))
                recorder = stack.enter_context(self.requests.recorder(stage_name, iteration))
            return self.requests.generate(stage_name, stage, iteration, recorder)

    def choose_reference(self, stage_name: str, iteration: int) -> None:
        """Before an iteration: the reference policy of its KL term. Kept when stage 2 starts, if it is that policy."""
        if stage_name != "stage2" or not schedule.keeps_start(self.config):
            return
        if iteration > 0:
            self.reference.use(inputs.kept_reference(self.config))
            return
        self.engine_sleeps()
        with self.phase("checkpoint"):
            self.reference.keep(self.actor)
        self.state.inputs |= inputs.of_reference(self.config)

    def load_engine(self) -> None:
        """Send the actor's weights to the engine, and wake it if it sleeps."""
        with self.phase("sync"):
            self.send_weights()

    def send_weights(self) -> None:
        """As `load_engine`, in the phase that calls it."""
        self.engine.load_weights(self.weights, self.step)

    def sync_engine(self) -> None:
        """Send the actor's weights to the engine. One that sleeps gets them when it wakes."""
        if not self.engine.asleep:
            self.load_engine()

    def wake_engine(self) -> None:
        """Before the engine generates: wake it, if it sleeps, with the actor's weights."""
        if self.engine.asleep:
            self.load_engine()

    def engine_sleeps(self) -> None:
        """Before a model is loaded: let a colocated engine sleep. Others stay awake."""
        if self.config.rollout.is_colocated and not self.engine.asleep:
            with self.phase("sleep"):
                self.engine.sleep()

    def evaluate_if_due(self) -> None:
        """Evaluate if the schedule requires it at this step and the record does not exist yet."""
        if (due := self.state.due_evaluation()) is not None:
            self.evaluate(*due)
        self.state.mark_evaluated()

    def evaluate(self, point: str, stage_name: str, iteration: int) -> None:
        """Score the actor on every evaluation set; measure the critic, if any, on the calibration set."""
        where = {"stage": stage_name, "iteration": iteration, "step": self.step, "point": point}
        targets = self.config.critic_targets(stage_name)
        for name in self.evaluator.sets:
            self.wake_engine()
            with self.phase("evaluate"):
                answered, shows = self.evaluator.answer(name), point != "during"
                if self.evaluator.reads_values(name, show=shows):
                    self.engine.sleep()
                scores, samples = self.evaluator.measure(name, answered, targets, show=shows)
            seen = self.seen.count(self.keys.evaluation[name].values())
            record = where | scores | {"seen": seen} | judge_counts(self.requests.verifiers)
            raise_on_all_ranks(partial(self.metrics.evaluation, record))
            self.metrics.samples({**where, "set": name, **sample} for sample in samples)

    def finish(self) -> None:
        """Hugging Face folders of actor and, if any, critic; the report, and the table of results."""
        self.engine_sleeps()
        self.state.wait_for_checkpoint()
        out = Path(self.config.run.dir)
        exported = out / f"hf_step_{self.step:08d}"
        if self.config.checkpoint.export_hf:
            export_hf(
                self.config,
                self.actor,
                self.critic,
                exported,
                self.seen.path,
                self.state.origin(),
                seen_summary=self.seen.summary(),
            )
        if self.context.is_writer:
            lines = [f"checkpoints: {self.state.checkpoints.folder}"]
            if self.config.checkpoint.export_hf:
                lines.append(f"Hugging Face: {exported}")
            if self.config.metrics.report:
                from megatron_tempo.report.html import write_report  # jinja2: for this rank and moment only

                with self.metrics.spare("report.html"):
                    lines.append(f"report: {write_report(out)}")
            show("\n".join([summary_table(out), "", *lines]))

    def _accepts(self, batch: Batch, logprobs: Tensor) -> bool:
        return self.gate is None or self.gate.accepts(batch, logprobs, self.step)

    def _token_count(self) -> TokenCount:
        """The tokens that this rank's trained models and engine have processed so far."""
        models = _trained_models(self.actor, self.critic).values()
        return TokenCount.total([*(model.counted for model in models), self.engine.counted])


def judge_counts(verifiers: Verifiers) -> dict[str, int]:
    """The judge's request counts since the last call. Logs how many responses got no verdict. Collective."""
    counts = summed_counts(verifiers)
    if message := judge_warning(counts):
        log.info("%s", message)
    return counts


def _begin(metrics: Metrics, checkpoints: Checkpoints, latest: LatestCheckpoint, *, is_writer: bool) -> None:
    """The first writes of a start. Collective."""

    def begin() -> None:
        metrics.begin()
        if is_writer and latest.path is None:
            checkpoints.note(None)

    raise_on_all_ranks(begin)
    checkpoints.set_aside(latest)


def _open_checkpoints(context: RunContext) -> Checkpoints:
    config = context.config
    return Checkpoints(
        Path(config.run.dir) / "checkpoints",
        config.checkpoint.keep,
        context.layouts.actor,
        asynchronous=config.checkpoint.asynchronous,
        timeout=collective_timeout(config),
    )


def _trained_models(actor: Actor, critic: Critic | None) -> dict[str, TrainedModel]:
    models = {"actor": actor.model, "critic": None if critic is None else critic.model}
    return {name: model for name, model in models.items() if isinstance(model, TrainedModel)}


def _ids(batch: Batch | None) -> tuple[str, ...]:
    return () if batch is None else batch.prompt_ids


def _rollout_metrics(rollouts: Rollouts, step: int, seconds: float) -> dict[str, float]:
    batches = [batch for batch in (rollouts.labelled, rollouts.unlabelled) if batch is not None]
    lengths = torch.cat([batch.response_lengths for batch in batches]).float()
    stopped = torch.cat([batch.stopped for batch in batches]).float()
    runs = torch.cat([batch.versions for batch in batches])
    staleness, tokens = (step - runs[:, 1]).double(), runs[:, 2].double()
    metrics = {
        "response_length/mean": float(lengths.mean()),
        "truncated": 1.0 - float(stopped.mean()),
        "engine/staleness_mean": float((staleness * tokens).sum() / tokens.sum()),
        "engine/staleness_max": float(staleness.max()),
        "tokens_per_second": sum(int(batch.lengths.sum()) for batch in batches) / seconds,
    }
    if rollouts.labelled is not None and rollouts.labelled.correct is not None:
        metrics["reward/labelled"] = float(rollouts.labelled.correct.mean())
    return metrics
