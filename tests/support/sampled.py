"""What transformers says of a sampling and of the responses to it: an independent reference for the engines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_tempo.rollout.engine import Sampling
from megatron_tempo.types import Completion


def by_transformers(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities of a sampling by transformers' processors, in vLLM's order: [tokens, vocabulary]."""
    warpers: list[Any] = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    nothing = torch.zeros(len(logits), 0, dtype=torch.int64)
    return LogitsProcessorList(warpers)(nothing, logits.clone()).log_softmax(dim=1)


@torch.no_grad()
def logits_of(model: Any, prompt: tuple[int, ...], completion: Completion) -> Tensor:
    """transformers' logits for each token of a completion: [tokens, vocabulary]."""
    tokens = torch.tensor([[*prompt, *completion.token_ids.tolist()]])
    logits: Tensor = model(tokens).logits[0, len(prompt) - 1 : -1]
    return logits
