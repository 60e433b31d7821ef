"""Fits how each part's cost grows with tokens and ranks, from measured sizes and numbers of ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

# The terms of a law, as functions of an iteration's tokens (rows grow with them) and the number of ranks.
TERMS = {
    "constant": lambda tokens, ranks: 1.0,
    "tokens": lambda tokens, ranks: tokens,
    "tokens / ranks": lambda tokens, ranks: tokens / ranks,
    "tokens x ranks": lambda tokens, ranks: tokens * ranks,
    "ranks": lambda tokens, ranks: float(ranks),
    "log2(ranks)": lambda tokens, ranks: math.log2(ranks),
}
_MOST_TERMS, _NOISE = 4, 0.15
_NOTABLE = 0.1  # of the sum: a term that a law is said to grow with


@dataclass(frozen=True, slots=True)
class Law:
    """factors[term] * TERMS[term](tokens, ranks), summed. `error`: mean relative error where it was fitted."""

    factors: dict[str, float]
    error: float

    def at(self, tokens: float, ranks: int) -> float:
        return sum(factor * TERMS[name](tokens, ranks) for name, factor in self.factors.items())

    def grows_with(self, tokens: float, ranks: int) -> list[str]:
        """The terms that make up at least a tenth of the cost there, the largest first."""
        parts = {name: factor * TERMS[name](tokens, ranks) for name, factor in self.factors.items()}
        whole = sum(parts.values()) or 1.0
        return [name for name in sorted(parts, key=lambda name: -parts[name]) if parts[name] >= _NOTABLE * whole]


def fit(points: Sequence[tuple[float, int, float]], least: float) -> Law:
    """The law with factors >= 0 and few terms that fits the relative errors best. `points`: (tokens, ranks, cost).

    A further term must reduce the errors by more than chance would (Bayesian information criterion; an error of
    `_NOISE` counts as none), because a small term in ranks is a large one at 4,096. `least`: costs below it count as
    equal. It needs three numbers of ranks, and two of tokens, to tell the terms apart.
    """
    mean = sum(cost for _, _, cost in points) / len(points)
    if all(abs(cost - mean) <= _NOISE * max(mean, least) for _, _, cost in points):
        return Law({"constant": mean}, 0.0)
    weights = np.array([1 / max(cost, least) for _, _, cost in points])
    table = np.array([[term(tokens, ranks) for term in TERMS.values()] for tokens, ranks, _ in points])
    target = np.array([cost for _, _, cost in points]) * weights
    weighted = table * weights[:, None]
    scale = np.abs(weighted).max(0)
    scale[scale == 0] = 1.0  # log2(ranks) where all measurements are of one rank
    best, found = math.inf, (np.zeros(0), ())
    for number in range(1, _MOST_TERMS + 1):
        for chosen in itertools.combinations(range(len(TERMS)), number):
            solution, norm = nnls(weighted[:, chosen] / scale[list(chosen)], target)
            errors = norm**2 / len(points) + _NOISE**2
            score = len(points) * math.log(errors) + number * math.log(len(points))
            if score < best - 1e-9:
                best, found = score, (solution / scale[list(chosen)], chosen)
    names = list(TERMS)
    factors = {names[i]: float(value) for value, i in zip(*found, strict=True) if value > 0}
    law = Law(factors, 0.0)
    error = float(np.mean([abs(law.at(t, r) - cost) / max(cost, least) for t, r, cost in points]))
    return Law(factors, error)
