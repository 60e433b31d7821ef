"""A run whose rewards are programs' verdicts: it learns which program each question asks for.

Each token of the model is a whole program, so that a model without training writes some that run.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from megatron_tempo.config.choices import Verifier
from megatron_tempo.config.method_settings import Method
from megatron_tempo.config.schema import Config
from megatron_tempo.observability.records import read_evaluations, read_metrics, read_samples
from megatron_tempo.rewards.code_tests import ProgramTests
from megatron_tempo.training.jobs import train
from tests.support.project import config_of

DOUBLES, SQUARES, WRITES = "double", "square", "write"
RIGHT = {
    DOUBLES: "```python\nprint(2 * int(input()))\n```",
    SQUARES: "```python\nprint(int(input()) ** 2)\n```",
    WRITES: "```python\nprint(input())\n```",
}
WRONG = ("```python\nwhile True: pass\n```", "```python\nraise SystemExit\n```", "print(input())", "```python\nprint(")
TESTS = {DOUBLES: (("3", "6"), ("5", "10")), SQUARES: (("3", "9"), ("5", "25")), WRITES: (("3", "3"), ("5", "5"))}


def write_model_of_programs(folder: Path) -> None:
    words = [*RIGHT, *RIGHT.values(), *WRONG, "<end>", "<pad>"]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": False}
    config = Qwen3Config(vocab_size=len(words), eos_token_id=words.index("<end>"), **sizes, **heads)
    Qwen3ForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """GRPO on three questions for 12 iterations, with responses of one token."""
    project = tmp_path / "project"
    write_model_of_programs(project / "model")
    rows = [
        {"id": name, "prompt": name, "answer": ProgramTests("inputs", cases=tests).write()}
        for name, tests in TESTS.items()
    ]
    (project / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(project, tmp_path / "run")
    config.data.labelled = replace(config.data.labelled, verifier=Verifier.code)
    config.data.unlabelled = None
    config.evaluation.sets = {"programs": config.data.labelled}
    config.evaluation.calibration_set, config.evaluation.samples = None, 16
    config.evaluation.every = 0
    config.rewards.code.seconds = 0.5
    config.rollout.max_prompt_tokens, config.rollout.max_response_tokens, config.rollout.temperature = 1, 1, 1.0
    stage = config.stage2
    stage.method, stage.iterations, stage.unlabelled_prompts = Method.grpo, 12, 0
    stage.labelled_prompts = stage.actor.mini_batch_prompts = 3
    stage.responses_per_prompt = 32
    stage.actor.optimizer.lr, stage.actor.entropy_coef = 2e-2, 0.0
    return config


def test_a_run_learns_from_the_verdicts_of_programs(config: Config) -> None:
    train(config)
    rewards = [record["reward/labelled"] for record in read_metrics(Path(config.run.dir))]
    before, after = (record["avg"] for record in read_evaluations(Path(config.run.dir)))
    assert rewards[0] < 0.3
    assert np.mean(rewards[-3:]) > 0.8
    assert after > 0.8 > 0.3 > before
    for sample in read_samples(Path(config.run.dir)):
        assert bool(sample["correct"]) == (RIGHT[sample["prompt"]] == "".join(sample["tokens"])), sample
