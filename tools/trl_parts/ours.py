"""Our GRPO: python -m trl_parts.ours WORK MODEL PROMPTS FOLDER, as `megatron-tempo train` runs it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from megatron_tempo.cli import build
from megatron_tempo.config.schedule import remaining
from megatron_tempo.runtime.collective_call import raise_on_all_ranks
from megatron_tempo.training.context import open_context
from megatron_tempo.training.phases import PhaseTimer
from megatron_tempo.training.trainer import Trainer
from trl_parts.work import WORKS, Turns, Work


def words(work: Work, model: str, prompts: str, folder: str) -> list[str]:
    """The command line of a run: the preset's defaults, but for the sizes of the work."""
    return [
        "algorithm=grpo",
        f"run.dir={folder}",
        "run.precision=fp32",
        f"model.path={model}",
        f"data.labelled.path={prompts}",
        "data.labelled.answer_field=answer",
        "data.labelled.verifier=import:trl_parts.work:reward",
        "data.labelled.chat_template=false",
        f"rollout.max_prompt_tokens={work.prompt_tokens}",
        f"rollout.max_response_tokens={work.response_tokens}",
        f"rollout.batch_rows={work.rows}",
        "stage1.iterations=0",
        "stage2.iterations=1000000",
        f"stage2.labelled_prompts={work.prompts}",
        f"stage2.responses_per_prompt={work.samples}",
        f"stage2.actor.mini_batch_prompts={work.mini_batch}",
        f"stage2.actor.optimizer.lr={work.lr}",
        "checkpoint.every=0",
        "checkpoint.export_hf=false",
        "metrics.progress=false",
        "metrics.report=false",
    ]


def main() -> None:
    name, model, prompts, folder = sys.argv[1:5]
    turns, work = Turns(), WORKS[name]
    phase = PhaseTimer.phase

    @contextmanager
    def timed(self: PhaseTimer, name: str, step: int) -> Iterator[None]:
        with phase(self, name, step), turns.phase(name):
            yield

    PhaseTimer.phase = timed  # type: ignore[method-assign]
    config = build(words(work, model, prompts, folder), world_size=1)
    with open_context(config) as context, Trainer.open(context) as trainer:
        trainer.resume()
        gc.collect()
        gc.freeze()  # as a training job does
        for stage_name, stage, iteration in remaining(config, 0):
            turns.wait()
            record = trainer.iterate(stage_name, stage, iteration)
            raise_on_all_ranks(partial(trainer.metrics.step, record))
            trainer.sync_engine()
            turns.done(round(record["response_length/mean"] * work.rows))


if __name__ == "__main__":
    main()
