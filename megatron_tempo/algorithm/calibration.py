"""The calibration error of values against verdicts, as a method needs it while it trains."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tempo.config.updates import CriticTargets

BINS = 10


def calibration_error(values: Tensor, correct: Tensor, kind: CriticTargets) -> float:
    """The mean over responses of |mean value - mean verdict| of their bin, of ten equal ones (Naeini et al. 2015).

    As `evaluation.calibration` computes it, and also for verdicts between 0 and 1. `values`: [n], those of a critic
    with targets of this kind, clipped to them. `correct`: [n] in [0, 1]. NaN if a value is.
    """
    right = correct.double()
    shares = values.double() if kind is CriticTargets.zero_one else (values.double() + 1) / 2
    clipped = shares.clamp(0, 1)
    if not len(values) or bool(clipped.isnan().any()):
        return float("nan")
    of_bin = (clipped * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, of_bin, clipped - right)
    return float(gaps.abs().sum() / len(values))
