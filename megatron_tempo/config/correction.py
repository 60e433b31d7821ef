"""Settings of the off-policy correction: what is done about tokens of an engine that is not the actor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class CorrectionLevel(Enum):
    """What has a ratio, pi_old / pi_engine, and one weight."""

    token = "token"  # each token has its own
    sequence = "sequence"  # a response has one, the product of its tokens' ratios
    geometric = "geometric"  # a response has one, the geometric mean of its tokens' ratios


class OutOfBounds(Enum):
    """The weight of a ratio that is out of bounds."""

    truncate = "truncate"  # the weight is the bound
    mask = "mask"  # the weight is 0: the token, or the whole response, contributes nothing


@dataclass(slots=True)
class CorrectionConfig:
    """Off-policy correction: tokens are weighted by pi_old / pi_engine, within bounds (docs/method.md)."""

    level: CorrectionLevel | None = None  # what has a ratio; None: no correction, all weights are 1
    out_of_bounds: OutOfBounds = OutOfBounds.truncate
    low: float | None = None  # the ratio's lower bound; None: none
    high: float | None = None  # the ratio's upper bound; required with a level
