"""Sizes of a network and of its micro-batches: what models are built by, and plans are made by without torch."""

from __future__ import annotations

from dataclasses import dataclass

# The attention's grid of a micro-batch has at most this many times the budget's tokens.
GRID_SLACK = 1.25


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a decoder with grouped attention and a gated feed-forward part."""

    layers: int
    hidden: int
    heads: int
    groups: int  # key/value heads
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    tied: bool = False  # input and output embeddings are one matrix

    @property
    def queries(self) -> int:
        """Width of the query projection."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the key projection, and of the value projection."""
        return self.groups * self.head_dim


def padded_vocab(vocab: int, tensor: int) -> int:
    """The vocabulary filled up to a multiple of 16 on each tensor rank.

    The kernels then read rows of logits 16 bytes at a time: Triton asks for a stride that 16 divides.
    """
    return vocab + -vocab % (16 * tensor)
