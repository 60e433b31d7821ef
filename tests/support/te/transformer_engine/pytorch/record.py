"""Records the calls of the layers, for the tests, which may also set what TE decides by itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One forward pass of a linear layer."""

    kind: str  # column or row
    recipe: str | None  # the class of the FP8 recipe. None: outside FP8
    group: int  # number of ranks over which delayed scaling reduces the largest magnitudes; 1 without a group
    tokens: int  # of this rank's input
    inner: int  # inputs
    outer: int  # outputs of this rank
    first: bool | None  # is_first_microbatch
    grad: bool
    largest: float  # magnitude in the input, of which delayed scaling makes the next scale


backend = "fused"  # the attention that TE chooses: flash, fused or unfused
out_of_memory = False  # whether the attention fails
calls: list[Call] = []
fused: set[str] = set()  # fused operations that have run: rotary, swiglu, weight gradient
# How often delayed scaling reduces the largest magnitudes of a pass, by the ranks of the group.
reductions: Counter[tuple[int, ...]] = Counter()
# Windows and scales of the attentions that were built, and (sequences, tokens) of their passes.
attentions: list[tuple[tuple[int, int], float]] = []
packed: list[tuple[int, int]] = []
