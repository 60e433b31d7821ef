"""Sizes that models are built by and that plans need without torch."""

from __future__ import annotations

# The attention's grid of a micro-batch has at most this many times the budget's tokens.
GRID_SLACK = 1.25


def padded_vocab(vocab: int, tensor: int) -> int:
    """The vocabulary filled up to a multiple of 16 on each tensor rank.

    The kernels then read rows of logits 16 bytes at a time: Triton asks for a stride that 16 divides.
    """
    return vocab + -vocab % (16 * tensor)
