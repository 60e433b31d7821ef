"""The lengths of made-up rollouts."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from megatron_tempo.errors import InputError

LONGEST = "longest"
LONGEST_MEAN, LARGEST_SIGMA = 1e9, 10.0  # far beyond any response: what lies beyond overflows a float
SIGMA = 0.8  # of the logarithm of a response's length, if none is given: long reasoning varies by about this much


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long made-up responses are: each as long as allowed, or by a log-normal distribution cut off there.

    >>> Lengths.parse("lognormal:6000")
    Lengths(mean=6000.0, sigma=0.8)
    """

    mean: float | None = None  # tokens, before the cut-off; None: every response has the longest length
    sigma: float = SIGMA

    @classmethod
    def parse(cls, text: str) -> Lengths:
        """Raises InputError, which says what may be given."""
        if text == LONGEST:
            return cls()
        name, _, numbers = text.partition(":")
        parts = numbers.split(",")
        try:
            values = [float(part) for part in parts]
        except ValueError:
            values = []
        bounds = (LONGEST_MEAN, LARGEST_SIGMA)
        usable = all(0 < value <= most for value, most in zip(values, bounds, strict=False))
        if name != "lognormal" or not 1 <= len(values) <= 2 or not usable:
            raise InputError(
                f"--lengths={text}: give {LONGEST}, or lognormal:MEAN or lognormal:MEAN,SIGMA with numbers above 0 and "
                f"up to {LONGEST_MEAN:,.0f} and {LARGEST_SIGMA:g}, such as --lengths lognormal:6000"
            )
        return cls(*values)

    def draw(self, rows: int, longest: int, seed: int) -> list[int]:
        """Tokens of `rows` responses, each from 1 to `longest`. The same seed gives the same lengths."""
        if self.mean is None:
            return [longest] * rows
        draws = random.Random(seed)
        centre = math.log(self.mean) - self.sigma**2 / 2
        return [min(longest, max(1, round(draws.lognormvariate(centre, self.sigma)))) for _ in range(rows)]

    def __str__(self) -> str:
        return LONGEST if self.mean is None else f"log-normal with mean {self.mean:g} and sigma {self.sigma:g}"
