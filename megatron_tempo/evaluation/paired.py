"""Whether two measurements of the same questions differ: the paired analysis, question by question.

A question is one observation. The variance that both measurements share, some questions being harder than others,
cancels in the differences (Miller 2024, arXiv 2411.00640, section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_tempo.evaluation.scores import interval

PERMUTATIONS = 9999  # sign changes that are sampled if there are more than that
LEVEL = 0.05  # p-values below count as evidence of a difference
_CELLS = 1 << 22  # numbers of the sampled sign changes that are in memory at a time


@dataclass(frozen=True, slots=True)
class Paired:
    """The mean over questions of the second score minus the first.

    `interval`: its 95% confidence interval, by Student's t. `p`: p-value of a two-sided paired permutation test, in
    which each question's difference is equally likely to have either sign. Both are None for a single question.
    """

    questions: int
    difference: float
    interval: tuple[float, float] | None
    p: float | None

    @property
    def is_real(self) -> bool:
        """Whether the test supports that the two differ."""
        return self.p is not None and self.p < LEVEL


def paired(first: np.ndarray, second: np.ndarray) -> Paired:
    """Compares two scores of the same questions; both are [questions], in the same order."""
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(f"paired scores need two non-empty arrays [questions], not {first.shape} and {second.shape}")
    from scipy.stats import permutation_test  # takes a second to import

    change, n = second - first, len(first)
    mean = float(change.mean())
    if n == 1:
        return Paired(n, mean, None, None)
    tested = permutation_test(
        (change,),
        np.mean,
        permutation_type="samples",
        n_resamples=PERMUTATIONS,
        batch=max(_CELLS // n, 1),
        rng=np.random.default_rng(0),
    )
    return Paired(n, mean, interval(mean, float(change.std(ddof=1) / np.sqrt(n)), n), float(tested.pvalue))
