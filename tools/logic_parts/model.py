"""The task's tokenizer and base models: byte-level BPE, and a Qwen3 of 1.2 million parameters."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import torch
from base_models import small_qwen3
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
TOKENS = 576
POSITIONS = 256
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SORTED = 8  # batches whose rows are sorted by length together, so that rows of a batch are of like length


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the texts. A token has at most two digits, as in Qwen's one and Llama 3's three."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = Sequence([Split(Regex(r"\d{1,2}"), "isolated"), ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=[PAD, START, END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int, ffn: int) -> Qwen3ForCausalLM:
    """Heads of 32, the smallest that vLLM supports on a CPU."""
    sizes = {"layers": layers, "hidden": hidden, "ffn": ffn, "head_dim": 32, "positions": POSITIONS}
    return small_qwen3(tokenizer, vocab=TOKENS, **sizes)


# Token ids of a prompt in the chat template, and of its response with the end token.
Tokens = tuple[list[int], list[int]]


def encoded(tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]) -> list[Tokens]:
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
        for prompt, _ in pairs
    ]
    prompts = tokenizer(chats)["input_ids"]
    responses = tokenizer([response + END for _, response in pairs])["input_ids"]
    return list(zip(prompts, responses, strict=True))


def batches(
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[tuple[str, str]], rows: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded tokens and labels, both [rows, longest row]. Labels of prompts and padding are -100."""
    rng = random.Random(f"batches {seed}")
    while True:
        several = encoded(tokenizer, list(itertools.islice(stream, rows * SORTED)))
        several.sort(key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(several), rows))
        rng.shuffle(starts)
        for start in starts:
            yield _padded(several[start : start + rows], int(tokenizer.pad_token_id))


def _padded(rows: list[Tokens], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    tokens = torch.full((len(rows), longest), padding)
    labels = torch.full((len(rows), longest), -100)
    for number, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        tokens[number, :end] = torch.tensor(prompt + response)
        labels[number, len(prompt) : end] = torch.tensor(response)
    return tokens, labels
