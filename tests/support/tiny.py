"""Small models and batches for tests. The vocabulary, 67, divides by no tensor-parallel size."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from megatron_tempo.types import Batch

WORDS = [*map(str, range(50)), *"+-*=>:yrn$?", "<pad>", "a", "b", "c", "d", "e"]
VOCAB = len(WORDS)


def write_model(folder: Path, *, tied: bool, seed: int = 0, layers: int = 4, ffn: int = 48, head_dim: int = 12) -> Path:
    """A Qwen3 folder with random weights, large enough for every weight to matter, and a word tokenizer."""
    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,  # heads * head_dim differs from hidden_size, as in Qwen3-0.6B
        intermediate_size=ffn,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="$", pad_token="<pad>", unk_token="?"
    ).save_pretrained(folder)
    return folder


def ragged_batch(rows: int, seed: int = 1, *, per_prompt: int = 2, correct: bool = True) -> Batch:
    """Random tokens in rows of many lengths, one of them a response of a single token."""
    generator = torch.Generator().manual_seed(seed)
    prompts = rows // per_prompt
    group = torch.arange(prompts).repeat_interleave(per_prompt)
    prompt_lengths = torch.randint(1, 9, (prompts,), generator=generator)[group]
    response_lengths = torch.randint(2, 20, (rows,), generator=generator)
    response_lengths[0] = 1
    total = int(response_lengths.sum())
    return Batch(
        prompt_ids=tuple(f"p{i}" for i in group.tolist()),
        group=group,
        prompt_tokens=torch.randint(0, VOCAB, (int(prompt_lengths.sum()),), generator=generator),
        prompt_lengths=prompt_lengths,
        response_tokens=torch.randint(0, VOCAB, (total,), generator=generator),
        response_lengths=response_lengths,
        engine_logprobs=-torch.rand(total, generator=generator),
        stopped=torch.ones(rows, dtype=torch.bool),
        versions=torch.zeros(total, dtype=torch.int32),
        correct=torch.randint(0, 2, (rows,), generator=generator).float() if correct else None,
    )
