"""Sizes for building models that plans also need, without torch."""

from __future__ import annotations

# The padded grid of a micro-batch in attention has at most this multiple of the micro-batch's token budget.
GRID_SLACK = 1.25
# Tokens by which the embedded engine's KV cache grows at a time: a cache without room is copied for each token.
CACHE_ROOM = 32


def expert_cut(tensor: int, expert_tensor: int | None) -> int:
    """Ranks that share an expert's matrices. `expert_tensor`: None for as many as share the dense ones."""
    return tensor if expert_tensor is None else expert_tensor


def padded_vocab(vocab: int, tensor: int) -> int:
    """The vocabulary padded to a multiple of 16 on each tensor rank.

    The kernels then read rows of logits 16 bytes at a time: Triton requires a stride that 16 divides.
    """
    return vocab + -vocab % (16 * tensor)
