"""avg@k and pass@k against hand-computed numbers and against every subset of the samples."""

from itertools import combinations
from math import sqrt

import numpy as np
import pytest

from megatron_tempo.evaluation.scores import avg_at_k, avg_at_k_se, interval, pass_at_k, pass_at_k_se


def test_by_hand() -> None:
    correct = np.array([[1, 0, 0, 0], [1, 1, 0, 0]])
    assert avg_at_k(correct) == pytest.approx(3 / 8)
    assert pass_at_k(correct, 1) == pytest.approx(3 / 8)
    # C(3,2)/C(4,2) = 1/2 and C(2,2)/C(4,2) = 1/6
    assert pass_at_k(correct, 2) == pytest.approx((1 / 2 + 5 / 6) / 2)
    # two observations a and b: their standard error is |a - b| / 2
    assert avg_at_k_se(correct) == pytest.approx(1 / 8)
    assert pass_at_k_se(correct, 2) == pytest.approx((5 / 6 - 1 / 2) / 2)


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_is_the_mean_over_all_subsets(samples: int) -> None:
    correct = np.random.default_rng(samples).random((6, samples)) < 0.3
    for k in range(1, samples + 1):
        by_question = [np.mean([row[list(s)].any() for s in combinations(range(samples), k)]) for row in correct]
        assert pass_at_k(correct, k) == pytest.approx(np.mean(by_question), abs=1e-12)
        assert pass_at_k_se(correct, k) == pytest.approx(np.std(by_question, ddof=1) / sqrt(6), abs=1e-12)


def test_many_samples_neither_overflow_nor_cancel() -> None:
    correct = np.zeros((1, 2000), dtype=bool)
    correct[0, 0] = True
    assert pass_at_k(correct, 1000) == pytest.approx(0.5, rel=1e-9)


def test_extremes() -> None:
    assert pass_at_k(np.zeros((3, 4)), 4) == 0.0
    assert pass_at_k(np.ones((3, 4)), 1) == 1.0
    assert avg_at_k_se(np.ones((3, 4))) == 0.0
    assert avg_at_k_se(np.ones((1, 4))) is None
    assert pass_at_k_se(np.ones((1, 4)), 2) is None


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_samples_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"pass@{k} .* 4 samples .*evaluation\.samples"):
        pass_at_k(np.ones((2, 4)), k)


@pytest.mark.parametrize("bad", [np.ones(4), np.ones((0, 4)), np.full((2, 2), 0.5), np.full((2, 2), np.nan)])
def test_bad_arrays_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="scores need"):
        avg_at_k(bad)


def test_the_interval_is_students() -> None:
    # tables of Student's t at 0.975: 2.045 for 29 degrees of freedom, 12.706 for 1
    assert interval(0.5, 0.1, 30) == pytest.approx((0.5 - 0.2045, 0.5 + 0.2045), abs=1e-4)
    assert interval(0.5, 0.1, 2) == pytest.approx((0.5 - 1.2706, 0.5 + 1.2706), abs=1e-4)
    assert interval(1.0, 0.0, 30) == (1.0, 1.0)
    assert interval(0.5, None, 1) is None
