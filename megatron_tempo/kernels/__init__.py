"""The losses and log-probabilities.

Each is a plain PyTorch function with its derivation. NAME_triton.py has the fused Triton kernels that compute the same
on CUDA. Only `kernels_for` chooses between them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tempo.kernels import advantages, linear_logprobs, logprobs, policy_loss, value_loss


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of each function. Signatures and shapes are those of the plain functions of the same names."""

    advantage_moments: Callable[..., Tensor]
    policy_loss: Callable[..., tuple[Tensor, Tensor]]
    value_loss: Callable[..., tuple[Tensor, Tensor]]
    logprobs_and_entropy: Callable[..., tuple[Tensor, Tensor]]
    linear_logprobs_and_entropy: Callable[..., tuple[Tensor, Tensor]]


REFERENCE = Kernels(
    advantages.advantage_moments,
    policy_loss.policy_loss,
    value_loss.value_loss,
    logprobs.logprobs_and_entropy,
    linear_logprobs.linear_logprobs_and_entropy,
)


def kernels_for(device: torch.device) -> Kernels:
    """The Triton kernels on CUDA, the plain functions elsewhere. Called once, when a model is built."""
    if device.type != "cuda":
        return REFERENCE
    # Imported here because Triton is installed only where CUDA is.
    from megatron_tempo.kernels import (
        advantages_triton,
        linear_logprobs_triton,
        logprobs_triton,
        policy_loss_triton,
        value_loss_triton,
    )

    return Kernels(
        advantages_triton.advantage_moments,
        policy_loss_triton.policy_loss,
        value_loss_triton.value_loss,
        logprobs_triton.logprobs_and_entropy,
        linear_logprobs_triton.linear_logprobs_and_entropy,
    )
