"""avg@k and pass@k, with standard errors.

`correct` is [questions, samples], 0 or 1: the verifier's verdict on each response. Standard errors are clustered by
question: each question's score is one observation. This accounts for the dependence between samples of one question
(Miller 2024, arXiv 2411.00640, section 2.2).
"""

from __future__ import annotations

import numpy as np


def avg_at_k(correct: np.ndarray) -> float:
    """Mean share of correct responses; k is the number of samples per question."""
    return float(_checked(correct).mean())


def avg_at_k_se(correct: np.ndarray) -> float | None:
    """Standard error of avg@k over questions; None for a single question."""
    return _standard_error(_checked(correct).mean(axis=1))


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k responses is correct, from n >= k samples each.

    The mean over questions of 1 - C(n - c, k) / C(n, k) with c correct of n samples (Chen et al. 2021, arXiv
    2107.03374, Eq. 1). Raises ValueError if k is not in 1..n.
    """
    return float(_pass_by_question(correct, k).mean())


def pass_at_k_se(correct: np.ndarray, k: int) -> float | None:
    """Standard error of pass@k over questions; None for a single question."""
    return _standard_error(_pass_by_question(correct, k))


def vote_accuracy(classes: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """How far a majority vote's rewards and labels agree with the verdicts (URLVR, arXiv 2603.08660; TTRL's metrics).

    A response's reward is 1 if its answer is the most frequent one to its question, else 0. `reward_accuracy` is the
    share of responses whose reward is their verdict; `label_accuracy` the share of questions whose most frequent answer
    is right. Of equally frequent answers the first is taken; without any answer all rewards are 0.

    `classes`: int [questions, samples], equal numbers from 0 for equal answers, -1 for none. `correct`: as above.
    """
    verdicts = _checked(correct)
    counts = np.stack([np.bincount(row[row >= 0], minlength=int(classes.max()) + 2) for row in classes])
    rewards = (classes == counts.argmax(axis=1)[:, None]) & (classes >= 0)
    right = (rewards & (verdicts == 1)).any(axis=1)
    return {"reward_accuracy": float((rewards == verdicts).mean()), "label_accuracy": float(right.mean())}


def interval(score: float, error: float | None, questions: int) -> tuple[float, float] | None:
    """The 95% confidence interval of a mean over questions, by Student's t with questions - 1 degrees of freedom.

    For many questions this is Miller's score +- 1.96 standard errors. For the 30 questions of an AIME it is a little
    wider. None if there is no standard error. An `error` of 0 gives an interval of width 0, which is not informative:
    all questions got the same score. For a share of correct responses, `share_interval` returns one with a width.
    """
    if error is None:
        return None
    from scipy.stats import t  # takes a second to import, so only when needed

    reach = float(t.ppf(0.975, questions - 1)) * error
    return score - reach, score + reach


def share_interval(score: float, error: float | None, questions: int) -> tuple[float, float] | None:
    """`interval` of a score in [0, 1], clipped to that range.

    Where every question got 0, or every question got 1, its other end is that of Clopper and Pearson for as many
    questions: 0.0 of 30 questions is 0.000 to 0.116, not 0 to 0.
    """
    ends = interval(score, error, questions)
    if ends is None:
        return None
    low, high = max(ends[0], 0.0), min(ends[1], 1.0)
    if low == high and score in (0.0, 1.0):
        reach = 1.0 - 0.025 ** (1.0 / questions)
        return (0.0, reach) if score == 0.0 else (1.0 - reach, 1.0)
    return low, high


def pass_by_question(right: np.ndarray, samples: int, k: int) -> np.ndarray:
    """pass@k of each question; `right` int [questions] counts its correct responses among `samples`."""
    if not 1 <= k <= samples:
        raise ValueError(
            f"pass@{k} needs 1 <= k <= samples, but there are {samples} samples per question: "
            f"raise evaluation.samples or change evaluation.pass_k"
        )
    # C(n-c, k) / C(n, k) is the product over j = n-c+1..n of (1 - k/j), which avoids large binomials. An empty product
    # is 1, and a factor j = k is 0. One entry for each c in 0..n.
    factors = np.maximum(1.0 - k / np.arange(samples, 0, -1), 0.0)
    none_right = np.concatenate(([1.0], np.cumprod(factors)))
    by_question: np.ndarray = 1.0 - none_right[right]
    return by_question


def _pass_by_question(correct: np.ndarray, k: int) -> np.ndarray:
    return pass_by_question(_checked(correct).sum(axis=1).astype(int), correct.shape[1], k)


def _standard_error(scores: np.ndarray) -> float | None:
    if len(scores) < 2:
        return None
    return float(scores.std(ddof=1) / np.sqrt(len(scores)))


def _checked(correct: np.ndarray) -> np.ndarray:
    if correct.ndim != 2 or 0 in correct.shape:
        raise ValueError(f"scores need a non-empty array [questions, samples], not one of shape {correct.shape}")
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("scores need verdicts of 0 or 1")
    return correct.astype(np.float64)
