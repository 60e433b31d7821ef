"""The design of the study's factorial part: seven factors of TEMPO in 16 runs a seed, and their effects.

The design is 2^(7-3) of resolution IV (Box and Hunter 1961), with E = ABC, F = BCD and G = ACD. So the columns of
two factors are orthogonal, and no factor's effect is mixed with that of two others together. Interactions of two
factors are: each is the sum of those in its row of `ALIASES`. With eight runs, resolution IV has room for four
factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

import numpy as np
from scipy import stats

Levels = Mapping[str, int]  # of each factor in a run: 1 on, -1 off


@dataclass(frozen=True, slots=True)
class Factor:
    """A change of TEMPO that a run has or has not."""

    letter: str
    what: str
    words: tuple[str, ...]  # the overrides with which it is on; off, they are left out


FACTORS = (
    Factor("A", "labelled rows in the M-step", ("stage2.actor_on_labelled=true",)),
    Factor("B", "a KL term, 0.02, to the policy of stage 1", ("stage2.actor.kl_coef=0.02",)),
    Factor("C", "lambda-returns, 0.95", ("stage2.gae_lambda=0.95",)),
    Factor("D", "the best of 4 responses", ("stage2.pass_at_k=4",)),
    Factor("E", "truncated responses masked", ("stage2.truncated_responses=masked",)),
    Factor("F", "E-steps only above a calibration error of 0.06", ("stage2.estep_when_ece_above=0.06",)),
    Factor("G", "the lower value of the critics before and after the E-step", ("stage2.pessimism=1",)),
)
GENERATORS = {"E": "ABC", "F": "BCD", "G": "ACD"}  # each letter's levels are the product of those of the others


def column(levels: Levels, letters: str) -> int:
    """The sign with which a run enters the effect of `letters`, a factor or an interaction."""
    return prod(levels[letter] for letter in letters)


def design() -> list[dict[str, int]]:
    """The levels of each of the 16 runs, in standard order."""
    runs = []
    for signs in product((-1, 1), repeat=len(FACTORS) - len(GENERATORS)):
        levels = dict(zip("ABCD", reversed(signs), strict=True))
        runs.append(levels | {letter: column(levels, of) for letter, of in GENERATORS.items()})
    return runs


def name_of(levels: Levels) -> str:
    """The name of a run's arm: the letters of the factors that are on."""
    return f"factorial_{''.join(letter for letter in levels if levels[letter] > 0).lower() or 'none'}"


def words_of(levels: Levels) -> tuple[str, ...]:
    return tuple(word for factor in FACTORS if levels[factor.letter] > 0 for word in factor.words)


def what_of(levels: Levels) -> str:
    return "; ".join(factor.what for factor in FACTORS if levels[factor.letter] > 0) or "TEMPO"


def aliases() -> list[tuple[str, ...]]:
    """The interactions of two factors that have the same column, such as ("AB", "CE"): one sum of effects each."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for pair in combinations((factor.letter for factor in FACTORS), 2):
        letters = "".join(pair)
        groups.setdefault(tuple(column(levels, letters) for levels in design()), []).append(letters)
    return [tuple(group) for group in groups.values()]


ALIASES = aliases()


@dataclass(frozen=True, slots=True)
class Effect:
    """What a factor changes in a score, on minus off, and half the width of the 95% interval."""

    mean: float
    half: float


def effects(scores: Mapping[str, np.ndarray]) -> dict[str, Effect]:
    """What each factor, and each sum of interactions, changes in a score.

    `scores`: of each of the 16 arms by its name, [seeds]. An interaction is named by all of its aliases, "AB+CE": half
    the difference between one factor's effect with and without the other. The intervals are those of least squares
    with a constant for each seed: what neither factors nor their interactions explain is noise, of the same size in
    all runs (Student's t; with two seeds it has 16 degrees of freedom).
    """
    runs = design()
    table = np.array([scores[name_of(levels)] for levels in runs])
    terms = {factor.letter: factor.letter for factor in FACTORS} | {"+".join(group): group[0] for group in ALIASES}
    signs = np.array([[column(levels, letters) for levels in runs] for letters in terms.values()])
    found = signs @ table.mean(1) / (len(runs) / 2)
    noise = table - table.mean(0) - (found / 2 @ signs)[:, None]
    freedom = table.size - table.shape[1] - len(terms)
    error = 2 * np.sqrt((noise**2).sum() / freedom / table.size)
    half = float(stats.t.ppf(0.975, freedom) * error)
    return {name: Effect(float(mean), half) for name, mean in zip(terms, found, strict=True)}
