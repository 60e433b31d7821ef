"""What both programs do: a model, its prompts, and the sizes of an iteration."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
QUESTIONS = 4096  # more than any benchmark reads


@dataclass(frozen=True, slots=True)
class Work:
    """An iteration of GRPO: `prompts` * `samples` rows, in optimizer steps of `mini_batch` prompts each."""

    about: str
    prompts: int
    samples: int
    mini_batch: int
    prompt_tokens: int
    response_tokens: int
    model: dict[str, int] | None  # sizes of a model that is made; None: the quickstart's
    lr: float = 1e-5

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    @property
    def steps(self) -> int:
        return self.prompts // self.mini_batch


WORKS = {
    "quickstart": Work("156 thousand parameters, 512 rows of up to 15 tokens", 64, 8, 16, 7, 15, None),
    "jagged": Work(
        "9.5 million parameters, 128 rows of 1 to 256 tokens",
        16, 8, 4, 24, 256,
        {"layers": 8, "hidden": 256, "ffn": 1024, "heads": 4, "groups": 2, "head_dim": 64, "vocab": 3200, "ends": 32},
        lr=1e-6,  # the lengths stay as they are
    ),
    "tiny": Work(
        "a test of the benchmark itself", 4, 2, 2, 8, 12,
        {"layers": 2, "hidden": 32, "ffn": 64, "heads": 4, "groups": 2, "head_dim": 8, "vocab": 64, "ends": 4},
    ),
}  # fmt: skip


def reward(prompt: str, response: str, answer: str) -> float:
    """A verdict that costs nothing and differs within a prompt group: whether the response has an odd length."""
    return float(len(response) % 2)


def write(work: Work, folder: Path) -> tuple[Path, Path]:
    """The model's folder and the file of prompts, {"prompt": ..., "answer": ...} a line."""
    if work.model is None:
        return QUICKSTART / "model", QUICKSTART / "labelled.jsonl"
    model, prompts = folder / "model", folder / "prompts.jsonl"
    _write_model(work.model, 2 * (work.prompt_tokens + work.response_tokens), model)
    draws, words = random.Random(0), work.model["vocab"] - 1 - work.model["ends"]
    with prompts.open("w", encoding="utf-8") as file:
        for index in range(QUESTIONS):
            length = draws.randint(max(1, work.prompt_tokens // 6), work.prompt_tokens)
            text = " ".join(f"w{draws.randrange(words)}" for _ in range(length))
            file.write(json.dumps({"id": f"q:{index}", "prompt": text, "answer": "1"}) + "\n")
    return model, prompts


def _write_model(sizes: dict[str, int], positions: int, folder: Path) -> None:
    """An untrained Qwen3: all tokens are about equally likely. A token is an end with probability ends / vocab.

    Its last tokens each end a response. So lengths are geometric, cut off at the longest.
    """
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocab, ends = sizes["vocab"], sizes["ends"]
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["ffn"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["groups"],
            head_dim=sizes["head_dim"],
            max_position_embeddings=positions,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=vocab - 1,
            pad_token_id=vocab - ends - 1,
        )
    )
    tokens = list(range(vocab - ends, vocab))
    model.generation_config = GenerationConfig(eos_token_id=tokens, pad_token_id=vocab - ends - 1, do_sample=True)
    model.save_pretrained(folder)
    names = {f"w{index}": index for index in range(vocab - ends - 1)} | {"<pad>": vocab - ends - 1}
    names |= {f"end{index}": index for index in tokens}
    tokenizer = Tokenizer(WordLevel(names))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=f"end{vocab - 1}",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


class Turns:
    """Runs iterations when the benchmark asks for them: a line on standard input is a turn, a line out is its result.

    Whatever else the program prints goes to standard error.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.phases: dict[str, float] = {}
        self._since = 0.0

    def wait(self) -> None:
        """Wait for the next turn. Ends the program if there is none."""
        self._say({"ready": True})
        if not sys.stdin.readline():
            os._exit(0)
        self.phases.clear()
        self._since = time.process_time()

    def done(self, tokens: int) -> None:
        """The end of an iteration. `tokens`: of its responses."""
        seconds = time.process_time() - self._since
        self._say({"seconds": seconds, "phases": dict(self.phases), "tokens": tokens})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the processor time of the block to a phase."""
        since = time.process_time()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + time.process_time() - since

    def _say(self, answer: dict[str, Any]) -> None:
        self._out.write(json.dumps(answer) + "\n")
        self._out.flush()
