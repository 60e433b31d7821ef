"""Small models and batches for tests. The vocabulary, 67, is not divisible by any tensor-parallel size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers.modeling_layers import GenericForTokenClassification
from transformers.models.olmo3.modeling_olmo3 import Olmo3PreTrainedModel

from megatron_tempo.types import Batch, picked

WORDS = [*map(str, range(50)), *"+-*=>:yrn$?", "<pad>", "a", "b", "c", "d", "e"]
VOCAB = len(WORDS)
CONFIGS = {
    "llama": transformers.LlamaConfig,
    "olmo3": transformers.Olmo3Config,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "qwen3_moe": transformers.Qwen3MoeConfig,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


POSITIONS = 256
WINDOW, TRAINED = 5, 16  # tokens, of the OLMo3; rows are longer, so that windows and YaRN have an effect
EXPERTS, PER_TOKEN, EXPERT_FFN = 8, 2, 24  # of the Qwen3-MoE

# Of the Llama's six pairs, two keep their frequency, one is slowed partly, the others fully.
LLAMA3 = ROPE | {
    "rope_type": "llama3",
    "factor": POSITIONS / TRAINED,
    "original_max_position_embeddings": TRAINED,
    "low_freq_factor": 0.05,
    "high_freq_factor": 0.5,
}


class Olmo3ForTokenClassification(GenericForTokenClassification, Olmo3PreTrainedModel):
    """The class of an exported critic, which transformers does not have."""


# `exist_ok`, because transformers otherwise refuses to register a model for its own config classes.
transformers.AutoModelForTokenClassification.register(
    transformers.Olmo3Config, Olmo3ForTokenClassification, exist_ok=True
)


def write_model(
    folder: Path,
    *,
    tied: bool = False,
    family: str = "qwen3",
    seed: int = 0,
    layers: int = 4,
    ffn: int = 48,
    head_dim: int = 12,
    hidden: int = 32,
    std: float = 0.2,
    normalized: bool = True,
) -> Path:
    """Write a folder with random weights, large enough for every weight to matter, and a tokenizer of words.

    `normalized`: `norm_topk_prob` of a Qwen3-MoE.
    """
    torch.manual_seed(seed)
    config = CONFIGS[family](
        vocab_size=VOCAB,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        # heads * head_dim differs from hidden_size, as in Qwen3-0.6B. A Qwen2's does not.
        **({} if family == "qwen2" else {"head_dim": head_dim}),
        intermediate_size=ffn,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=tied,
        **_of_family(family, layers, normalized=normalized),
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0.0, std)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="$", pad_token="<pad>", unk_token="?"
    ).save_pretrained(folder)
    return folder


def _of_family(family: str, layers: int, *, normalized: bool) -> dict[str, Any]:
    """What the config of this family has besides sizes."""
    if family == "olmo3":
        return _olmo3(layers)
    experts = {"num_experts": EXPERTS, "num_experts_per_tok": PER_TOKEN, "moe_intermediate_size": EXPERT_FFN}
    # A Llama's config names tokens 1 and 2 if it is not asked, and SGLang ends a response at its end token too.
    llama = {"rope_parameters": LLAMA3, "bos_token_id": None, "eos_token_id": None}
    plain = llama if family == "llama" else {"rope_parameters": ROPE}
    return plain | experts | {"norm_topk_prob": normalized} if family == "qwen3_moe" else plain


def _olmo3(layers: int) -> dict[str, Any]:
    """Full attention on layers 1, 5, ..., so that pipeline stages differ."""
    yarn = {
        "rope_type": "yarn",
        "factor": POSITIONS / TRAINED,
        "original_max_position_embeddings": TRAINED,
        "beta_fast": 2.0,  # with these two, one pair is not interpolated, one partly, the others fully
        "beta_slow": 0.25,
    }
    return {
        "layer_types": ["full_attention" if layer % 4 == 1 else "sliding_attention" for layer in range(layers)],
        "sliding_window": WINDOW,
        "rope_parameters": {"full_attention": ROPE | yarn, "sliding_attention": ROPE},
        "pad_token_id": None,
        "eos_token_id": WORDS.index("$"),
    }


def one_version(lengths: Tensor) -> Tensor:
    """`Batch.versions` of rows of these lengths by weights of version 0."""
    rows = torch.arange(len(lengths))
    return torch.stack([rows, torch.zeros_like(rows), lengths], dim=1)


def held_by(batch: Batch, rows: Tensor) -> Batch:
    """The batch, all of whose rows are held, as a rank has it that holds these (int64, ascending)."""
    return replace(
        batch,
        prompt_tokens=picked(batch.prompt_tokens, batch.prompt_lengths, rows),
        response_tokens=picked(batch.response_tokens, batch.response_lengths, rows),
        engine_logprobs=picked(batch.engine_logprobs, batch.response_lengths, rows),
        experts=None if batch.experts is None else picked(batch.experts, batch.lengths, rows),
        held=rows,
    )


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
        prompt_tokens=torch.randint(0, VOCAB, (int(prompt_lengths.sum()),), generator=generator).int(),
        prompt_lengths=prompt_lengths,
        response_tokens=torch.randint(0, VOCAB, (total,), generator=generator).int(),
        response_lengths=response_lengths,
        engine_logprobs=-torch.rand(total, generator=generator),
        stopped=torch.ones(rows, dtype=torch.bool),
        versions=one_version(response_lengths),
        correct=torch.randint(0, 2, (rows,), generator=generator).float() if correct else None,
    )
