"""What a measured run reads: a small model with a large vocabulary, questions, and its configuration."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from megatron_tempo.config.compose import compose_tree
from megatron_tempo.config.problem import ConfigErrors
from megatron_tempo.config.rules import Purpose, check
from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import read

VOCAB = 151_936  # Qwen3's: token ids have as many digits in JSON as a real run's
END, UNKNOWN = "<end>", "<unknown>"
MATH = [*map(str, range(1000)), "\\boxed{", "}", "=", "+", "-", "\\frac{", "}{", "$", "x", "^2", "\n", ".", "Therefore"]
WORDS = [END, UNKNOWN, *MATH, *(f"\u0120word{number}" for number in range(VOCAB - len(MATH) - 2))]
ANSWER = 42
QUESTION_WORDS = 150
LOGPROB = -0.5  # of every made-up token, by engine and trainer: the parity check passes
KEY = "made-up"


@dataclass(frozen=True, slots=True)
class Size:
    """A part of the preset's iteration. `share`: of its prompts; responses are as long as in the whole.

    `mean`: tokens of a response before the cut-off (log-normal, sigma 0.8).
    """

    preset: str = "qwen3_8b_aime"
    share: float = 1.0
    mean: float = 8000.0
    dump: bool = True
    iterations: int = 2  # the last one is measured: the first loads what later ones find loaded


def write_inputs(folder: Path, questions: int) -> None:
    """Model, tokenizer and two data files of different questions."""
    folder.mkdir()
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    shape = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(folder / "model")
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN
    ).save_pretrained(folder / "model")
    (folder / "key").write_text(KEY)
    (folder / "key").chmod(0o600)
    for name in ("labelled", "unlabelled"):
        drawn = random.Random(name)
        lines = [
            {"question": f"{name} {i}: {_words(drawn)}", **({"answer": str(ANSWER)} if name == "labelled" else {})}
            for i in range(questions)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _words(drawn: random.Random) -> str:
    return " ".join(f"word{drawn.randrange(VOCAB // 2)}" for _ in range(QUESTION_WORDS))


def configuration(size: Size, folder: Path, run: Path, addresses: Sequence[str], ranks: int) -> Config:
    """The preset with fewer prompts, on CPUs, with data ranks only: the layout in which most ranks exchange rows."""
    stage = preset_of(size.preset).stage2

    def part(count: int) -> int:
        return max(1, round(count * size.share)) if count else 0

    words = [
        f"model.path={folder / 'model'}",
        "model.shape=null",
        *(f"run.{name}" for name in (f"dir={run}", "device=cpu", "precision=fp32", "hang_minutes=null")),
        *(f"parallel.{name}" for name in ("tensor=1", "sequence=false", "recompute=none", "offload=false")),
        *(f"data.{name}.path={folder / f'{name}.jsonl'}" for name in ("labelled", "unlabelled")),
        *(f"data.{name}.{field}" for name in ("labelled", "unlabelled") for field in _FIELDS),
        "rollout.engine=sglang",
        f"rollout.servers.addresses=[{','.join(addresses)}]",
        f"rollout.servers.key_file={folder / 'key'}",
        *(f"rollout.servers.{name}" for name in ("transport=shared", "checksums_every=0", "tensor=1", "devices=null")),
        *(f"rollout.servers.{name}" for name in ("each_node=false", "host=127.0.0.1")),
        f"rollout.dump={str(size.dump).lower()}",
        "stage1.iterations=0",
        f"stage2.iterations={size.iterations}",
        f"stage2.labelled_prompts={part(stage.labelled_prompts)}",
        f"stage2.unlabelled_prompts={part(stage.unlabelled_prompts)}",
        f"stage2.actor.mini_batch_prompts={part(stage.actor.mini_batch_prompts)}",
        f"stage2.critic.mini_batch_prompts={part(stage.critic.mini_batch_prompts)}",
        *(f"checkpoint.{name}" for name in ("every=1", "keep=2", "export_hf=false")),
        *(f"metrics.{name}" for name in ("progress=false", "report=false", "log_level=warning")),
    ]
    config = preset_of(size.preset, words)
    config.evaluation.sets = {}
    if problems := check(config, world_size=ranks):
        raise ConfigErrors(problems)
    return config


_FIELDS = ("prompt_field=question", "chat_template=false", "suffix=''")


def preset_of(name: str, words: Sequence[str] = ()) -> Config:
    """A preset as it is, unchecked: its files are the user's to give."""
    plain, problems = compose_tree([f"experiment={name}", *words], Purpose.plan, None, None)
    if problems:
        raise ConfigErrors(problems)
    return read(plain)[0]
