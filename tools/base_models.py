"""The small base models of both tasks: their Qwen3, and how it is pretrained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM


def small_qwen3(
    tokenizer: PreTrainedTokenizerFast,
    *,
    vocab: int,
    layers: int,
    hidden: int,
    ffn: int,
    head_dim: int,
    positions: int,
) -> Qwen3ForCausalLM:
    """Four heads, of which two have keys and values: for tensor and pipeline parallelism over two ranks."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=head_dim,
            max_position_embeddings=positions,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def pretrain(
    model: Qwen3ForCausalLM, data: Iterator[tuple[torch.Tensor, torch.Tensor]], *, steps: int, lr: float
) -> None:
    """Next-token training on responses: AdamW, 5% warm-up, cosine decay to zero.

    `data`: tokens and labels of each step, both [rows, longest row]. Padding stands at the end of a row, so causal
    attention needs no mask for it; its labels, and those of prompts, are -100.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    for step, (tokens, labels) in enumerate(itertools.islice(data, steps), 1):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.4f} nats per token", flush=True)
