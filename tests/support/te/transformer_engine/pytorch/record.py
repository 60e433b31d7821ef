"""What the layers were called with, for the tests to look at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Call:
    """One forward pass of a linear layer."""

    kind: str  # column or row
    recipe: str | None  # the class of the FP8 recipe; none: outside FP8
    group: int  # ranks over which delayed scaling would look for the largest magnitudes; 1 if none was given
    tokens: int  # of the input as this rank has it
    inner: int  # inputs
    outer: int  # outputs of this rank
    first: bool | None  # is_first_microbatch
    grad: bool


calls: list[Call] = []
# Windows and scales of the attentions that were built, and (sequences, tokens) of their passes.
attentions: list[tuple[tuple[int, int], float]] = []
packed: list[tuple[int, int]] = []
