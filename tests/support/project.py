"""A small complete project: a model, questions, and a config that trains on them in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.schema import Config, DatasetConfig
from megatron_tempo.config.updates import CriticTargets, Ratio
from megatron_tempo.errors import InputError
from tests.support.tiny import write_model

ROOT = Path(__file__).parents[2]


# Models with random weights, which answer nothing correctly. Their configs also need `from_nothing`.
RANDOM: dict[str, dict[str, Any]] = {
    "tied": {"tied": True},
    "olmo3": {"family": "olmo3"},
    "mixture": {"family": "qwen3_moe"},
}


def write_project(folder: Path, kind: str = "untied") -> Path:
    """Write the first questions of the quickstart's sets, and a model: the quickstart's (`untied`), or a random one."""
    examples = ROOT / "examples/quickstart"
    folder.mkdir(parents=True, exist_ok=True)
    if kind in RANDOM:
        write_model(folder / "model", **RANDOM[kind])
    else:
        (folder / "model").symlink_to(examples / "model")
    for name in ("labelled", "unlabelled"):
        lines = (examples / f"{name}.jsonl").read_text().splitlines()[:8]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def config_of(project: Path, run_dir: Path) -> Config:
    """One iteration of TEMPO on 8 + 8 questions with 4 responses each, in mini-batches of 4."""
    config = Config()
    config.run.dir = str(run_dir)
    config.model.path = str(project / "model")
    dataset = DatasetConfig(path=str(project / "labelled.jsonl"), chat_template=False)
    labelled = replace(dataset, answer_field="answer", verifier=Verifier.countdown)
    config.data.labelled = labelled
    config.data.unlabelled = replace(dataset, path=str(project / "unlabelled.jsonl"))
    config.evaluation.sets = {"unlabelled": replace(labelled, path=str(project / "unlabelled.jsonl"))}
    config.evaluation.calibration_set = "unlabelled"
    config.evaluation.samples, config.evaluation.pass_k = 2, [1, 2]
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens = 7, 18
    config.rollout.temperature = 1.3  # at this temperature the model makes errors, and response lengths differ
    config.parallel.micro_batch_tokens = 300
    for stage in config.stages().values():
        stage.labelled_prompts = 8
        stage.responses_per_prompt = 4
        stage.actor.mini_batch_prompts = stage.critic.mini_batch_prompts = 4
        stage.actor.optimizer.lr, stage.critic.optimizer.lr = 1e-3, 2e-3
    config.stage1.actor.ratio = Ratio.token
    config.stage1.actor.clip_low = config.stage1.actor.clip_high = 0.2
    config.stage1.iterations = 0
    config.stage2.unlabelled_prompts = 8
    config.stage2.iterations = 1
    config.metrics.progress = config.metrics.report = False
    return config


def from_nothing(config: Config) -> Config:
    """Set critic targets of -1 for wrong responses, so that a model without correct ones has something to learn."""
    for stage in config.stages().values():
        stage.critic.targets = CriticTargets.plus_minus_one
    return config


def refusal(config: Config) -> str | None:
    """The message with which `train` refuses a config; None if it trains. For `tests.support.ranks.run_ranks`."""
    from megatron_tempo.training.jobs import train  # takes seconds to import

    try:
        train(config)
    except InputError as error:
        return str(error)
    return None


def stopping_at(step: int, config: Config) -> None:
    """Train, and stop after the checkpoint of iteration `step` of the run. For `tests.support.ranks.run_ranks`."""
    from megatron_tempo.training.jobs import train  # these take seconds to import
    from megatron_tempo.training.trainer import Trainer

    iterate = Trainer.iterate

    def until(self: Trainer, *where: object) -> object:
        if self.step == step:
            raise KeyboardInterrupt
        return iterate(self, *where)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "iterate", until)
        with pytest.raises(KeyboardInterrupt):
            train(config)
