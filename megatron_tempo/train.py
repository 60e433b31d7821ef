"""The two jobs: training and evaluation."""

from __future__ import annotations

from contextlib import ExitStack, closing
from pathlib import Path

import transformers

from megatron_tempo.config.schema import Config, CriticTargets
from megatron_tempo.config.tree import save as save_config
from megatron_tempo.errors import InputError
from megatron_tempo.metrics import Metrics
from megatron_tempo.records import EVALUATIONS
from megatron_tempo.report.summary import summary_table
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.run import Run
from megatron_tempo.schedule import remaining
from megatron_tempo.wiring import (
    build_critic,
    build_engine,
    build_evaluator,
    evaluation_sets,
    folder_weights,
    open_workplace,
    targets_of,
)


def train(config: Config) -> None:
    """Train as the config says, going on from the newest whole checkpoint of `run.dir` if there is one.

    Raises ValueError for input that does not fit the config, OSError for what cannot be written, NotFiniteError for
    losses or gradients that are not finite again and again, EngineError where no engine is left; a checkpoint is then
    written first.
    """
    with open_workplace(config) as place, Run.open(place) as run:
        done = run.resume()
        with run.rescued():
            run.evaluate_if_due()
            for stage_name, stage, iteration in remaining(config, done):
                with run.profiler.iteration(run.step + 1):
                    figures = run.iterate(stage_name, stage, iteration)
                    run.metrics.step(figures)
                    run.sync_engine()
                run.evaluate_if_due()
                run.checkpoint_if_due()
        run.finish()


def evaluate(config: Config) -> None:
    """Score `model.path` on the evaluation sets, and the critic of `model.critic_path`, if any, on the calibration set.

    Writes evaluations.jsonl, samples.jsonl and the config to `run.dir` and prints the table. Raises InputError if the
    folder belongs to another job.
    """
    out = Path(config.run.dir)
    if (out / EVALUATIONS).exists() or (out / "config.json").exists():
        raise InputError(f"run.dir={out} belongs to another job: give a folder of its own")
    with (
        open_workplace(config) as place,
        Verifiers() as verifiers,
        Metrics(out, config.metrics, place.is_writer) as metrics,
        ExitStack() as stack,
    ):
        tokenizer = transformers.AutoTokenizer.from_pretrained(config.model.path)
        sets = evaluation_sets(config, tokenizer, verifiers)
        engine = stack.enter_context(closing(build_engine(place, metrics.warn)))
        metrics.watch(engine.health)
        engine.load_weights(folder_weights(place), version=0)
        critic_path = config.model.critic_path
        critic = build_critic(place) if critic_path else None
        targets = targets_of(Path(critic_path)) if critic_path else CriticTargets.zero_one
        evaluator = build_evaluator(config, engine, verifiers, tokenizer, sets, critic)
        where = {"stage": "stage1", "iteration": 0, "step": 0, "point": "alone"}
        for name in sets:
            scores, samples = evaluator.evaluate(name, targets, show=True)
            metrics.evaluation(where | scores)
            metrics.samples({**where, "set": name, **sample} for sample in samples)
        if place.is_writer:
            save_config(config, out / "config.json")
            metrics.message(f"{summary_table(out)}\n\nwritten to {out}")
