"""The two jobs: training and evaluation."""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tempo.config.extensions import digests
from megatron_tempo.config.sampled import evaluation_stop
from megatron_tempo.config.schedule import remaining, total
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.trained_with import defaults_for, read_trained_with
from megatron_tempo.config.tree import save as save_config
from megatron_tempo.config.updates import CriticTargets
from megatron_tempo.data.copies import repeated
from megatron_tempo.data.seen import read_seen, seen_of
from megatron_tempo.data.sets import QuestionKeys, evaluation_sets, tokenizer_findings, unchanged_files
from megatron_tempo.data.tokenizer import load_tokenizer
from megatron_tempo.errors import InputError, UnwrittenError
from megatron_tempo.evaluation.results import response_records, result
from megatron_tempo.evaluation.unread import diagnose
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.records import EVALUATIONS, RESPONSES, STARTS, Record, append, extend, read_starts
from megatron_tempo.observability.start import changed_extensions, start_record
from megatron_tempo.observability.terminal import show
from megatron_tempo.report import results as report
from megatron_tempo.report.summary import printable
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.runtime.stop_request import StopRequests, ctrl_c
from megatron_tempo.training.context import RunContext, exclusive, open_context
from megatron_tempo.training.setup import build_critic, build_engine, build_evaluator, build_verifiers, folder_weights
from megatron_tempo.training.trainer import Trainer, judge_counts
from megatron_tempo.weights.export import targets_of

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train by the config. Resume from the newest complete checkpoint of `run.dir` if there is one.

    Raises ValueError for input that does not fit the config, UnwrittenError for a record that cannot be written,
    NotFiniteError if losses or gradients are repeatedly not finite, EngineError if no engine is left, and Stopped if a
    stop was requested. EngineError and Stopped are raised after a checkpoint is written.
    """
    grace = config.cluster.slurm.grace_seconds if config.cluster is not None else None
    with (
        StopRequests(Path(config.run.dir), grace) as stop_requests,
        open_context(config) as context,
        stop_requests.agreed(),
        exclusive(context, "train"),
        Trainer.open(context) as trainer,
        _short_garbage_collections(),
    ):
        state = trainer.state
        trainer.resume()
        if state.step < total(config):
            _record_start(context, trainer.metrics, state.step)
        with state.rescued():
            state.stop_if_requested(stop_requests)
            trainer.evaluate_if_due()
            for stage_name, stage, iteration in remaining(config, state.step):
                state.stop_if_requested(stop_requests)
                trainer.choose_reference(stage_name, iteration)
                with trainer.timer.profiler.iteration(state.step + 1):
                    record = trainer.iterate(stage_name, stage, iteration)
                    raise_on_all_ranks(partial(trainer.metrics.step, record))
                    trainer.sync_engine()
                    trainer.check_engine()
                state.stop_if_requested(stop_requests)
                trainer.evaluate_if_due()
                state.checkpoint_if_due()
            trainer.finish()


def _record_start(context: RunContext, metrics: Metrics, step: int) -> None:
    """Add this start to starts.jsonl: the command, the code's version and the machine, for the report.

    Warns if the user's code is not that of the last start: the metrics before and after may not be comparable.
    """
    if not context.is_writer:
        return
    run_dir, extensions = Path(context.config.run.dir), digests(to_plain(context.config))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    record = start_record(step, dist.get_world_size(), gpus if context.device.type == "cuda" else [], extensions)
    with metrics.spare(STARTS):
        for name in changed_extensions(read_starts(run_dir), extensions):
            text = "%s: its module changed since the last start; step %d is the first with the new code"
            log.warning(text, name, step + 1)
        append(run_dir / STARTS, record)


@contextmanager
def _short_garbage_collections() -> Iterator[None]:
    """Exempt all objects that exist now from garbage collection. The imports alone make half a million.

    A full collection, which Python begins on its own, takes 0.25 to 0.5 s on one CPU core; milliseconds with this.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def evaluate(config: Config) -> None:
    """Score `model.path` on the evaluation sets, and the critic of `model.critic_path`, if any, on the calibration set.

    Writes the config, evaluations.jsonl, samples.jsonl, every response and results.json to `run.dir` and prints the
    table. Raises InputError if the folder belongs to another job, UnwrittenError for what cannot be written.
    """
    out = Path(config.run.dir)
    try:
        _evaluate(config, out)
    except UnwrittenError as error:
        raise UnwrittenError(f"{error}; an evaluation begins anew: give another run.dir") from error


def _evaluate(config: Config, out: Path) -> None:
    with (
        ctrl_c(raises=False),
        open_context(config) as context,
        ctrl_c(raises=True),
        exclusive(context, "eval"),
        build_verifiers(config) as verifiers,
        Metrics(out, config.metrics, context.is_writer, begun=False) as metrics,
        ExitStack() as stack,
    ):
        raise_on_all_ranks(lambda: _check_unused(out) if context.is_writer else None)
        raise_on_all_ranks(partial(read_seen, Path(config.model.path)))  # a bad line is refused before a write
        tokenizer = load_tokenizer(Path(config.model.path))
        with unchanged_files(config) as digests:
            sets = evaluation_sets(config, tokenizer, verifiers)
            keys = QuestionKeys.evaluated(config)
        copies = [line for name in sets if (line := repeated(f"evaluation.sets.{name}", keys[name]))]
        for line in [*tokenizer_findings(config, tokenizer, sets.values()), *copies]:
            log.info("%s", line)
        weights, critic_path = folder_weights(context), config.model.critic_path
        critic = build_critic(context) if critic_path else None
        targets = targets_of(Path(critic_path)) if critic_path else CriticTargets.zero_one
        raise_on_all_ranks(metrics.begin)
        engine = stack.enter_context(closing(build_engine(context, trains=False)))
        metrics.watch(engine.health)
        engine.load_weights(weights, version=0)
        evaluator = build_evaluator(config, engine, verifiers, tokenizer, sets, keys, critic, keeps_all=True)
        where = {"stage": "stage1", "iteration": 0, "step": 0, "point": "alone"}
        raise_on_all_ranks(lambda: save_config(config, out / "config.json") if context.is_writer else None)
        _record_start(context, metrics, 0)
        log.info("%s", _prompt_forms(config))
        results, unread = _about(config), []
        for name in sets:
            if engine.asleep:
                engine.load_weights(weights, version=0)
            answered = evaluator.answer(name)
            if evaluator.reads_values(name, show=True):
                engine.sleep()
            scores, samples = evaluator.measure(name, answered, targets, show=True)
            seen = seen_of(Path(config.model.path), keys[name].values())
            counts = judge_counts(verifiers)
            raise_on_all_ranks(partial(metrics.evaluation, where | scores | {"seen": seen} | counts))
            metrics.samples({**where, "set": name, **sample} for sample in samples)
            file = {"path": config.evaluation.sets[name].path, "sha256": digests[name]}
            results["sets"][name] = result(answered) | {"seen": seen, **counts, **file}
            responses = list(response_records(name, answered, keys[name], tokenizer)) if context.is_writer else []
            raise_on_all_ranks(partial(extend, out / RESPONSES, responses))
            if context.is_writer:
                texts = [response["text"] for response in responses]
                message, is_meaningless = diagnose(name, answered, texts, verifiers)
                unread += [message] if is_meaningless else []
                if message is not None and not is_meaningless:
                    log.warning("%s", message)
        raise_on_all_ranks(lambda: report.write(out / report.RESULTS, results) if context.is_writer else None)
        if context.is_writer:
            show(f"{report.results_table(results, config.evaluation.pass_k)}\n\nwritten to {out}")
        raise_on_all_ranks(partial(_refuse_unread, unread))


def _refuse_unread(unread: Sequence[str | None]) -> None:
    if unread:
        raise InputError("\n  ".join(["these scores do not measure the model:", *filter(None, unread)]))


def _prompt_forms(config: Config) -> str:
    """One line per set: its prompt form and verifier, and whether they are those of the model's training."""
    entry = read_trained_with(Path(config.model.path))
    lines = []
    for name, dataset in config.evaluation.sets.items():
        verifier = f"the column {dataset.verifier_field}" if dataset.verifier is None else dataset.verifier.name
        form = "chat template" if dataset.chat_template else "plain text"
        suffix = f", suffix {dataset.suffix!r}" if dataset.suffix else ""
        plain, offered = to_plain(dataset), defaults_for(entry, dataset.path)
        other = [f"{field}={offered[field]!r}" for field in offered if plain[field] != offered[field]]
        trained = "" if not offered else f"; trained with {', '.join(other)}" if other else "; as in training"
        lines.append(f"{name}: verifier {verifier}, {form}{suffix}{trained}")
    return printable("\n".join(lines))


def _check_unused(out: Path) -> None:
    if (out / EVALUATIONS).exists() or (out / "config.json").exists():
        raise InputError(f"run.dir={out} belongs to another job: give a folder of its own")


def _sampling(config: Config) -> Record:
    """How responses are sampled: the settings of `evaluation`, and the stop strings that it takes from `rollout`."""
    own = {name: getattr(config.evaluation, name) for name in ("temperature", "top_p", "top_k", "min_p")}
    return own | {"stop": evaluation_stop(config), "sampling_seed": config.evaluation.seed}


def _about(config: Config) -> Record:
    """results.json without its sets: what was evaluated, and how. The hash covers all settings but `run.dir`."""
    settings = to_plain(config)
    settings["run"]["dir"] = None
    return {
        "model": config.model.path,
        "critic": config.model.critic_path,
        "config": "config.json",
        "config_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "seed": config.run.seed,
        **_sampling(config),
        "max_response_tokens": config.evaluation.max_response_tokens or config.rollout.max_response_tokens,
        "sets": {},
    }
