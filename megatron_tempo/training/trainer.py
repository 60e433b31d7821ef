"""A run: everything it works with, one iteration of it, and what stands between iterations."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from megatron_tempo.checkpoint.checkpoints import Checkpoints
from megatron_tempo.config import schedule
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.stages import Prompts, StageConfig
from megatron_tempo.config.tree import differences
from megatron_tempo.config.tree import load as load_config
from megatron_tempo.config.tree import save as save_config
from megatron_tempo.data.seen import Seen
from megatron_tempo.data.sets import QuestionKeys, evaluation_sets, prompt_streams
from megatron_tempo.data.stream import PromptStream
from megatron_tempo.errors import EngineError, InputError, Stopped, UnwrittenError
from megatron_tempo.evaluation.evaluator import Evaluator
from megatron_tempo.methods import iterate_of
from megatron_tempo.methods.learner import Learner, Rollouts
from megatron_tempo.models.actor import Actor
from megatron_tempo.models.critic import Critic
from megatron_tempo.models.machine import described
from megatron_tempo.models.trained import TrainedModel
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.profiler import Profiler
from megatron_tempo.report.summary import summary_table, unreadable
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.rollout import dump
from megatron_tempo.rollout.batches import Asked, ask, batch_of, collect, summed_counts
from megatron_tempo.rollout.engine import Engine, Sampling
from megatron_tempo.runtime import progress_marker
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.runtime.stop_request import StopRequests
from megatron_tempo.training.context import RunContext, collective_timeout
from megatron_tempo.training.peak_memory import PeakMemory, planned
from megatron_tempo.training.setup import (
    build_actor,
    build_critic,
    build_engine,
    build_evaluator,
    build_reference,
    build_verifiers,
    engine_weights,
)
from megatron_tempo.types import Batch, LabelledPrompt, UnlabelledPrompt, Weights
from megatron_tempo.weights.export import export_hf

# How much each model of an engine says when it is checked.
PARITY_PROMPTS, PARITY_TOKENS = 4, 256

_P = TypeVar("_P", LabelledPrompt, UnlabelledPrompt)
_Stream = PromptStream[LabelledPrompt] | PromptStream[UnlabelledPrompt]


@dataclass(frozen=True, slots=True)
class _Questions:
    """An iteration's prompts, which the engine is answering. `before` is where the streams stood without them."""

    labelled: list[LabelledPrompt]
    unlabelled: list[UnlabelledPrompt]
    asked: Asked
    before: dict[str, Any]


@dataclass(slots=True)
class Trainer:
    """Everything that a run works with. `step` counts its iterations over both stages.

    `questions` are those of iterations that are not done: of the one under way and, with `rollout.max_staleness`, of
    the next.
    """

    config: Config
    context: RunContext
    tokenizer: transformers.PreTrainedTokenizerBase
    verifiers: Verifiers
    labelled: PromptStream[LabelledPrompt] | None
    unlabelled: PromptStream[UnlabelledPrompt] | None
    actor: Actor
    critic: Critic | None  # none: no stage has one
    engine: Engine
    weights: Weights
    evaluator: Evaluator
    metrics: Metrics
    peaks: PeakMemory
    checkpoints: Checkpoints
    keys: QuestionKeys
    seen: Seen
    profiler: Profiler
    step: int = 0
    questions: list[_Questions] = field(default_factory=list)
    evaluated: bool = True  # what was due at `step` is written
    reference: Actor | None = field(default=None)

    @classmethod
    @contextmanager
    def open(cls, context: RunContext) -> Iterator[Trainer]:
        """Read the data, build the models, open the run's files. The data comes first: it is the quickest to fail."""
        config = context.config
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
        with ExitStack() as stack:
            verifiers = stack.enter_context(build_verifiers(config))
            metrics = stack.enter_context(
                raise_on_all_ranks(lambda: Metrics(Path(config.run.dir), config.metrics, context.is_writer))
            )
            keys = QuestionKeys.read(config)
            labelled, unlabelled = prompt_streams(config, tokenizer, verifiers, keys, metrics.message)
            sets = evaluation_sets(config, tokenizer, verifiers)
            peaks = PeakMemory(context.device, planned(config, dist.get_world_size(), context.device))
            metrics.message(described(config, context.machine))
            metrics.message(peaks.plan())
            actor, critic = build_actor(context), build_critic(context) if config.has_critic else None
            engine = build_engine(context, metrics.warn)
            stack.callback(engine.close)
            metrics.watch(engine.health)
            below = Path(config.run.dir)
            checkpoints = Checkpoints(
                below / "checkpoints",
                config.checkpoint.keep,
                context.layouts.actor,
                metrics.message,
                asynchronous=config.checkpoint.asynchronous,
                timeout=collective_timeout(config),
            )
            stack.callback(checkpoints.close)
            yield cls(
                config=config,
                context=context,
                tokenizer=tokenizer,
                verifiers=verifiers,
                labelled=labelled,
                unlabelled=unlabelled,
                actor=actor,
                critic=critic,
                engine=engine,
                weights=engine_weights(actor, context),
                evaluator=build_evaluator(config, engine, verifiers, tokenizer, sets, critic),
                metrics=metrics,
                peaks=peaks,
                checkpoints=checkpoints,
                keys=keys,
                seen=Seen(below, keys.labelled, keys.unlabelled, context.is_writer),
                profiler=Profiler(config.profile.steps, below / "profile", context.device, dist.get_rank()),
            )

    # One iteration

    def iterate(self, stage_name: str, stage: StageConfig, iteration: int) -> dict[str, Any]:
        """Rollouts and the method's updates. Returns the line for metrics.jsonl."""
        started = time.monotonic()
        self._begin(self.step + 1)
        self._padding()  # of evaluations and of the engine's check, which a resumed run makes elsewhere
        rollouts = self.rollouts(stage_name, stage, iteration)
        raise_on_all_ranks(lambda: self.seen.add(self.step + 1, _ids(rollouts.labelled), _ids(rollouts.unlabelled)))
        learner = Learner(
            self.actor,
            self.critic,
            self.reference_logprobs,
            self.phase,
            seed=f"{self.config.run.seed}/{stage_name}/{iteration}",
        )
        metrics = iterate_of(stage.method)(learner, rollouts, stage, iteration)
        metrics |= _rollout_metrics(rollouts, self.step, time.monotonic() - started)
        peaks = self.peaks.take()
        if iteration == stage.critic.warmup_iterations:  # the first with all its phases
            self.metrics.message(self.peaks.comparison(peaks))
        self.step += 1
        self.questions = self.questions[1:]
        self.evaluated = False
        return {
            "stage": stage_name,
            "method": stage.method.name,
            "iteration": iteration + 1,
            "step": self.step,
            **metrics,
            **judge_counts(self.verifiers, self.metrics),
            **self._padding(),
            **peaks,
        }

    def rollouts(self, stage_name: str, stage: StageConfig, iteration: int) -> Rollouts:
        """This iteration's prompts, labelled and unlabelled in one pass, answered and (the labelled ones) verified.

        With `rollout.max_staleness` the next iteration's are asked then, to be answered while this one's are learnt
        from: not over the end of a stage.
        """
        config, classes_by = self.config.rollout, self._classes_by(stage)
        classed = classes_by is not None
        if config.replay is not None:
            labelled, unlabelled = self._draw(stage, iteration)
            path = dump.path_of(Path(config.replay), stage_name, iteration + 1)
            return Rollouts(*dump.read(path, labelled, unlabelled, stage.samples, classes=classed))
        with self.phase("generate"):
            if not self.questions:
                self._ask(stage_name, stage, iteration)
            current = self.questions[0]
            completions, verdicts, classes = collect(current.asked, self.verifiers, self.tokenizer, classes_by)
            if config.max_staleness and iteration + 1 < stage.iterations:
                self._ask(stage_name, stage, iteration + 1)
        labelled, unlabelled = current.labelled, current.unlabelled
        n = len(labelled)
        rollouts = Rollouts(
            batch_of(labelled, completions[:n], verdicts[:n]) if labelled else None,
            batch_of(unlabelled, completions[n:], None, classes[n:] if classed else None) if unlabelled else None,
        )
        if config.dump and self.context.is_writer:
            path = dump.path_of(Path(self.config.run.dir) / "rollouts", stage_name, iteration + 1)
            with self.metrics.spare("rollouts/"):
                dump.write(path, rollouts.labelled, rollouts.unlabelled, self.tokenizer)
        return rollouts

    def _begin(self, step: int) -> None:
        for guard in (self.actor.guard, None if self.critic is None else self.critic.guard):
            if guard is not None:
                guard.iteration = step

    def _ask(self, stage_name: str, stage: StageConfig, iteration: int) -> None:
        config, before = self.config.rollout, self._stream_states()
        labelled, unlabelled = self._draw(stage, iteration)
        sampling = Sampling(config.temperature, config.max_response_tokens)
        seed = (self.config.run.seed, stage_name, iteration, "rollout")
        asked = ask(self.engine, [*labelled, *unlabelled], stage.samples, sampling, *seed)
        self.questions.append(_Questions(labelled, unlabelled, asked, before))

    def _draw(self, stage: StageConfig, iteration: int) -> tuple[list[LabelledPrompt], list[UnlabelledPrompt]]:
        needed = stage.prompts_at(iteration)
        return (
            _take(self.labelled, stage.labelled_prompts) if Prompts.labelled in needed else [],
            _take(self.unlabelled, stage.unlabelled_prompts) if Prompts.unlabelled in needed else [],
        )

    def _classes_by(self, stage: StageConfig) -> str | None:
        """The verifier that tells which answers to an unlabelled prompt are equal; none: the method does not ask."""
        if not stage.needs.classes:
            return None
        dataset = self.config.data.unlabelled
        assert dataset is not None
        assert dataset.verifier is not None, "the config's rules ask for it"
        return dataset.verifier.name

    def reference_logprobs(self, batch: Batch) -> Tensor:
        """Log-probabilities of the policy that the run began with, which is loaded at the first need."""
        if self.reference is None:
            self.reference = build_reference(self.context)
        return self.reference.logprobs(batch)

    def sync_engine(self) -> None:
        """The actor's weights into the engine."""
        with self.phase("sync"):
            self.engine.load_weights(self.weights, self.step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done inside, takes its peak of memory, and names it in traces."""
        with (
            progress_marker.phase(name, self.step),
            self.metrics.phase(name),
            self.peaks.phase(name),
            self.profiler.phase(name),
        ):
            yield

    # Between iterations

    def resume(self) -> int:
        """Go on from the newest whole checkpoint: the number of iterations that are behind it, 0 for a fresh run."""
        path = self.checkpoints.newest()
        state: dict[str, Any] = {} if path is None else self.checkpoints.load(path, self._models())
        self.step = state.get("step", 0)
        self.evaluated = state.get("evaluated", self.step > 0)
        self._check_position(path, state)
        for name, stream in self._streams().items():
            if name in state.get("streams", {}):
                stream.restore(state["streams"][name])
        if path is not None:
            self.metrics.message(f"resumed from {path}, {self.step} iterations done")
        if self.step < schedule.total(self.config):
            self.checkpoints.check_room(self._models())
        raise_on_all_ranks(self._go_on)
        self.sync_engine()
        self.check_engine()
        return self.step

    def _go_on(self) -> None:
        """The run's files, as they were at its step."""
        self.metrics.rewind(self.step)
        self.seen.resume(self.step, Path(self.config.model.path))
        self._remember_config()
        self.metrics.plan(self.config.stages(), schedule.evaluations_left(self.config, self.step), self.step)

    def check_engine(self) -> None:
        """Let the engine answer a few questions, and hold its log-probabilities against the actor's.

        Raises EngineError where they are further apart than `rollout.parity_tolerance`: what such an engine generates
        would be learnt from as if the actor had said it.
        """
        config, stream = self.config.rollout, self.labelled or self.unlabelled
        assert stream is not None
        prompts = stream.first(PARITY_PROMPTS * self.engine.replicas)
        sampling = Sampling(config.temperature, min(config.max_response_tokens, PARITY_TOKENS))
        asked = ask(self.engine, prompts, 1, sampling, self.config.run.seed, "parity", self.step)
        batch = batch_of(prompts, collect(asked, self.verifiers, self.tokenizer).completions, None)
        gap = float((self.actor.logprobs(batch) - batch.engine_logprobs).abs().mean())
        if not gap <= config.parity_tolerance:
            tokens = int(batch.response_lengths.sum())
            raise EngineError(
                f"the engine's log-probabilities are {gap:.2g} nats from the actor's, a mean over {tokens} tokens, but "
                f"rollout.parity_tolerance={config.parity_tolerance:g}: {_blame(self.engine.differences(self.weights))}"
            )

    def evaluate_if_due(self) -> None:
        point = schedule.evaluation_point(self.config, self.step)
        if point is not None and not self.evaluated:
            self.evaluate(point, *schedule.place(self.config, self.step))
        self.evaluated = True

    def evaluate(self, point: str, stage_name: str, iteration: int) -> None:
        """Score the actor on every evaluation set; measure the critic, if any, on the calibration set."""
        where = {"stage": stage_name, "iteration": iteration, "step": self.step, "point": point}
        targets = self.config.critic_targets(stage_name)
        for name in self.evaluator.sets:
            with self.phase("evaluate"):
                scores, samples = self.evaluator.evaluate(name, targets, show=point != "during")
            seen = self.seen.count(self.keys.evaluation[name].values())
            record = where | scores | {"seen": seen} | judge_counts(self.verifiers, self.metrics)
            raise_on_all_ranks(partial(self.metrics.evaluation, record))
            self.metrics.samples({**where, "set": name, **sample} for sample in samples)

    def checkpoint_if_due(self) -> None:
        self.checkpoints.check()
        every, total = self.config.checkpoint.every, schedule.total(self.config)
        if self.step == total or (every and self.step % every == 0):
            self.checkpoint()

    def checkpoint(self) -> None:
        """Save the run as it stands between two iterations; questions that are being answered will be asked again."""
        with self.phase("checkpoint"):
            state = {
                "streams": self.questions[0].before if self.questions else self._stream_states(),
                "position": schedule.position(self.config, self.step),
                "evaluated": self.evaluated,
                "config": to_plain(self.config),
            }
            self.checkpoints.save(self.step, self._models(), state)

    @contextmanager
    def rescued(self) -> Iterator[None]:
        """Where the engine is lost inside, save what was learnt since the last checkpoint before the run stops.

        Where a record or a checkpoint could not be written, the one before is what the run goes on from.
        """
        try:
            yield
        except UnwrittenError as error:
            with suppress(UnwrittenError):
                self.checkpoints.wait()
            raise UnwrittenError(f"{error}{self._goes_on()}") from error
        except EngineError as error:
            raise EngineError(f"{error}{self._saved()}") from error

    def stop_if_requested(self, stop_requests: StopRequests) -> None:
        """Where somebody wants the run to stop, save it as it stands and raise Stopped. Collective."""
        if warning := stop_requests.late():
            self.metrics.message(warning)
        why = stop_requests.requested(is_writer=self.context.is_writer)
        if why is None:
            return
        where = self._saved()
        if self.context.is_writer:
            stop_requests.acknowledge(self.step, why)
        raise Stopped(f"stopped after {self.step} iterations, as told by {why}{where}")

    def _saved(self) -> str:
        """Save what was learnt since the last checkpoint; where the run will go on, in words."""
        self.checkpoints.wait()
        if self.step and self.checkpoints.saved != self.step:
            self.checkpoint()
            self.checkpoints.wait()
        return self._goes_on()

    def _goes_on(self) -> str:
        saved = self.checkpoints.saved
        return "" if saved is None else f"; the same command goes on from {self.checkpoints.path(saved)}"

    def finish(self) -> None:
        """Hugging Face folders of actor and, if any, critic; the report, and the table of results."""
        with self.phase("checkpoint"):
            self.checkpoints.wait()
        out = Path(self.config.run.dir)
        exported = out / f"hf_step_{self.step:08d}"
        if self.config.checkpoint.export_hf:
            export_hf(self.config, self.actor, self.critic, exported, self.seen.path)
        if self.context.is_writer:
            lines = [f"checkpoints: {self.checkpoints.folder}"]
            if self.config.checkpoint.export_hf:
                lines.append(f"Hugging Face: {exported}")
            if self.config.metrics.report:
                from megatron_tempo.report.html import write_report  # matplotlib: for this rank and moment only

                with self.metrics.spare("report.html"):
                    lines.append(f"report: {write_report(out)}")
            self.metrics.message("\n".join([summary_table(out), "", *lines]))

    def _models(self) -> dict[str, TrainedModel]:
        models = {"actor": self.actor.model, "critic": None if self.critic is None else self.critic.model}
        return {name: model for name, model in models.items() if isinstance(model, TrainedModel)}

    def _streams(self) -> dict[str, _Stream]:
        streams: dict[str, _Stream | None] = {"labelled": self.labelled, "unlabelled": self.unlabelled}
        return {name: stream for name, stream in streams.items() if stream is not None}

    def _stream_states(self) -> dict[str, Any]:
        return {name: stream.state() for name, stream in self._streams().items()}

    def _check_position(self, path: Path | None, state: dict[str, Any]) -> None:
        """Raises InputError where other stage lengths than the checkpoint's would put its step elsewhere."""
        if path is None:
            return
        now = schedule.position(self.config, self.step)
        for name, done in state["position"].items():
            if now[name] != done:
                raise InputError(
                    f"{name}.iterations={self.config.stages()[name].iterations}: the run in {self.config.run.dir} has "
                    f"{state['position']} iterations behind it, which this schedule would count as {now}; "
                    f"give the earlier stages' lengths as they were, or another run.dir"
                )

    def _remember_config(self) -> None:
        """Keep the config beside the run. Where it differs from the last start's, say so and keep that one too."""
        path = Path(self.config.run.dir) / "config.json"
        if not self.context.is_writer:
            return
        if path.exists():
            changes = differences(load_config(path), self.config)
            if not changes:
                return
            older = path.with_name(f"config_until_step_{self.step:08d}.json")
            self.metrics.message("\n  ".join([f"the config differs from the last start's, kept as {older}:", *changes]))
            os.replace(path, older)
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        save_config(self.config, partial)
        os.replace(partial, path)

    def _padding(self) -> dict[str, float]:
        """The share of padding among the tokens that went through this rank's models and engine since last asked."""
        counters = [model.counted for model in self._models().values()]
        counts = [counted.take() for counted in (*counters, self.engine.counted)]
        return {"padding": sum(c.padding for c in counts) / max(sum(c.tokens for c in counts), 1)}


def judge_counts(verifiers: Verifiers, metrics: Metrics) -> dict[str, int]:
    """What a judge was asked since the last call; responses that got no verdict are told of. Collective."""
    counts = summed_counts(verifiers)
    if message := unreadable(counts):
        metrics.message(message)
    return counts


def _take(stream: PromptStream[_P] | None, count: int) -> list[_P]:
    assert stream is not None, "the config's rules ask for the set that a stage draws from"
    return stream.take(count)


def _ids(batch: Batch | None) -> tuple[str, ...]:
    return () if batch is None else batch.prompt_ids


def _blame(differences: list[tuple[str, float]] | None) -> str:
    """What a gap comes from, by the tensors that the engine holds otherwise."""
    if differences is None:
        return "its tensors cannot be compared here, so its weights, temperature or reading of config.json may be wrong"
    if not differences:
        return "every tensor is as it should be, so its temperature or its reading of config.json is wrong"
    name, apart = differences[0]
    size = "" if math.isnan(apart) else f", off by {apart:.1%} of its size"
    return f"{len(differences)} of its tensors are not the actor's, the worst {name}{size}"


def _rollout_metrics(rollouts: Rollouts, step: int, seconds: float) -> dict[str, float]:
    batches = [batch for batch in (rollouts.labelled, rollouts.unlabelled) if batch is not None]
    lengths = torch.cat([batch.response_lengths for batch in batches]).float()
    stopped = torch.cat([batch.stopped for batch in batches]).float()
    staleness = step - torch.cat([batch.versions for batch in batches]).double()
    metrics = {
        "response_length/mean": float(lengths.mean()),
        "truncated": 1.0 - float(stopped.mean()),
        "engine/staleness_mean": float(staleness.mean()),
        "engine/staleness_max": float(staleness.max()),
        "tokens_per_second": sum(int(batch.lengths.sum()) for batch in batches) / seconds,
    }
    if rollouts.labelled is not None and rollouts.labelled.correct is not None:
        metrics["reward/labelled"] = float(rollouts.labelled.correct.mean())
    return metrics
