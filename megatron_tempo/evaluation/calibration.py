"""How well a critic's values separate correct from wrong responses (AUROC), and how well calibrated they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """The responses whose value is in one of the equal intervals of [0, 1]."""

    mean_value: float
    fraction_right: float
    count: int


@dataclass(frozen=True, slots=True)
class Calibration:
    auroc: float | None  # None if all responses are correct, or all are wrong
    auroc_within_questions: float | None  # None if no question has correct and wrong responses
    brier: float  # mean (V - I)^2; 0 is best, V = 0.5 for all responses gives 0.25
    ece: float  # mean over responses of |mean value - fraction right| of their bin
    bins: tuple[ReliabilityBin, ...]  # in ascending order of value, without empty ones


def calibration(values: np.ndarray, correct: np.ndarray, bins: int = 10) -> Calibration:
    """Calibration of one value per response, compared with the verdicts; both are [questions, samples].

    `values` estimate P(correct). A regression head can leave [0, 1], so values are clipped for the Brier score and the
    calibration error (Naeini et al. 2015; equal-width bins), but not for the AUROC, which depends only on their order.
    If the critic was trained on targets of +-1, the caller must map its values to [0, 1] by (V + 1) / 2.
    """
    if values.ndim != 2 or values.shape != correct.shape or not values.size:
        shapes = f"not {values.shape} and {correct.shape}"
        raise ValueError(f"calibration needs two non-empty arrays [questions, samples], {shapes}")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} values are NaN or infinite")
    from sklearn.metrics import brier_score_loss, roc_auc_score  # takes seconds to import, so only when needed

    right = correct.astype(np.int64).flatten()
    clipped = np.clip(values.astype(np.float64), 0.0, 1.0).flatten()
    rows = _reliability(clipped, right, bins)
    return Calibration(
        auroc=float(roc_auc_score(right, values.flatten())) if 0 < right.sum() < len(right) else None,
        auroc_within_questions=auroc_within_questions(values, correct),
        brier=float(brier_score_loss(right, clipped, pos_label=1)),
        ece=sum(row.count * abs(row.mean_value - row.fraction_right) for row in rows) / len(right),
        bins=rows,
    )


def auroc_within_questions(values: np.ndarray, correct: np.ndarray) -> float | None:
    """The AUROC among the responses to one question, averaged over the questions with correct and wrong ones.

    The advantages of TEMPO compare responses to the same question. A critic that only knows which questions are hard
    has a high AUROC over all responses, and 0.5 here. `values`, `correct`: [questions, samples].
    """
    found = []
    for of_question, is_right in zip(values, correct > 0, strict=True):
        right, wrong = of_question[is_right, None], of_question[~is_right]
        if right.size and wrong.size:
            found.append(float(np.mean((right > wrong) + 0.5 * (right == wrong))))
    return float(np.mean(found)) if found else None


def prefixes_of(lengths: np.ndarray, fractions: Sequence[float] = FRACTIONS) -> np.ndarray:
    """The tokens after which the values of `by_prefix` are read, round(f * T_i): int64 [n] -> int64 [n, fractions]."""
    return np.rint(np.multiply.outer(lengths, np.array(fractions))).astype(np.int64)


def by_prefix(
    values: np.ndarray, correct: np.ndarray, fractions: Sequence[float] = FRACTIONS
) -> dict[float, Calibration]:
    """Calibration of the values after a fraction of each response.

    `values`: [questions * samples, fractions], each response's values after its first `prefixes_of` tokens. `correct`:
    [questions, samples].
    """
    columns = zip(fractions, values.T, strict=True)
    return {fraction: calibration(column.reshape(correct.shape), correct) for fraction, column in columns}


def calibration_record(values: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """The `calibration` field of a line of evaluations.jsonl; shapes as in `by_prefix`."""
    prefixes = by_prefix(values, correct)
    return {
        "last": asdict(prefixes[1.0]),
        "by_prefix": {str(fraction): asdict(result) for fraction, result in prefixes.items()},
    }


def _reliability(clipped: np.ndarray, right: np.ndarray, bins: int) -> tuple[ReliabilityBin, ...]:
    index = np.minimum((clipped * bins).astype(int), bins - 1)
    return tuple(
        ReliabilityBin(float(clipped[chosen].mean()), float(right[chosen].mean()), int(chosen.sum()))
        for chosen in (index == i for i in range(bins))
        if chosen.any()
    )
