"""The critic's calibration against hand-computed numbers."""

import json

import numpy as np
import pytest

from megatron_tempo.evaluation.calibration import (
    auroc_within_questions,
    by_prefix,
    calibration,
    calibration_record,
    prefixes_of,
)

VALUES = np.array([[0.1, 0.2], [0.2, 0.9]])  # of two questions with two responses each
CORRECT = np.array([[0, 1], [0, 1]])


def test_by_hand() -> None:
    result = calibration(VALUES, CORRECT, bins=2)
    # pairs of (right, wrong): .2>.1, .2=.2 (half), .9>.1, .9>.2
    assert result.auroc == pytest.approx(3.5 / 4)
    assert result.brier == pytest.approx((0.01 + 0.64 + 0.04 + 0.01) / 4)
    low, high = result.bins
    assert (low.mean_value, low.fraction_right, low.count) == (pytest.approx(0.5 / 3), pytest.approx(1 / 3), 3)
    assert (high.mean_value, high.fraction_right, high.count) == (pytest.approx(0.9), 1.0, 1)
    assert result.ece == pytest.approx(3 / 4 * (1 / 3 - 0.5 / 3) + 1 / 4 * 0.1)


def test_within_questions_by_hand() -> None:
    # .3 > .1 and .3 = .3 (half); the second question is all right; .1 < .9
    values = np.array([[0.1, 0.3, 0.3], [0.9, 0.8, 0.7], [0.9, 0.9, 0.1]])
    correct = np.array([[0, 1, 0], [1, 1, 1], [0, 0, 1]])
    assert auroc_within_questions(values, correct) == pytest.approx((0.75 + 0.0) / 2)
    assert calibration(values, correct).auroc_within_questions == pytest.approx(0.375)


def test_a_critic_that_only_knows_which_questions_are_hard() -> None:
    correct = np.array([[1] * 9 + [0], [0] * 9 + [1]])
    values = np.array([[0.9] * 10, [0.1] * 10])
    result = calibration(values, correct)
    assert result.auroc == pytest.approx(0.9)  # 81 pairs in order, 9 + 9 of equal values, 1 in the wrong order
    assert result.auroc_within_questions == 0.5


def test_values_outside_are_clipped_except_for_the_order() -> None:
    result = calibration(np.array([[-0.5, -0.1], [1.0, 1.7]]), CORRECT)
    assert result.brier == pytest.approx(2 / 4)  # as for 0, 0, 1, 1
    assert result.ece == pytest.approx(0.5)
    assert [(row.mean_value, row.count) for row in result.bins] == [(0.0, 2), (1.0, 2)]
    assert result.auroc == pytest.approx(3 / 4)  # clipped, it would be 1/2


@pytest.mark.parametrize("verdict", [0, 1])
def test_one_class_has_no_auroc(verdict: int) -> None:
    result = calibration(VALUES, np.full((2, 2), verdict))
    assert result.auroc_within_questions is None
    assert result.auroc is None
    assert result.brier == pytest.approx(np.mean((VALUES - verdict) ** 2))


def test_prefixes_are_read_at_the_rounded_position() -> None:
    # T = 4 and T = 2: index 2 and 1 at one half, 3 and round(1.5) = 2 at three quarters
    values = [np.array([0.0, 0.1, 0.2, 0.3, 0.4]), np.array([0.5, 0.6, 0.7])]
    fractions = (0.0, 0.5, 0.75, 1.0)
    places = prefixes_of(np.array([4, 2]), fractions)
    assert places.tolist() == [[0, 2, 3, 4], [0, 1, 2, 2]]
    read = np.array([row[at] for row, at in zip(values, places, strict=True)])
    result = by_prefix(read, np.array([[0], [1]]), fractions)
    means = {fraction: [row.mean_value for row in calibration.bins] for fraction, calibration in result.items()}
    assert means == {
        0.0: pytest.approx([0.0, 0.5]),
        0.5: pytest.approx([0.2, 0.6]),
        0.75: pytest.approx([0.3, 0.7]),
        1.0: pytest.approx([0.4, 0.7]),
    }


def test_an_empty_response_has_one_value() -> None:
    places = prefixes_of(np.array([0, 1]))
    read = np.array([row[at] for row, at in zip([np.array([0.3]), np.array([0.2, 0.8])], places, strict=True)])
    result = by_prefix(read, np.array([[0], [1]]))
    assert {fraction: sorted(b.mean_value for b in calibration.bins) for fraction, calibration in result.items()} == {
        0.0: [0.2, 0.3],
        0.25: [0.2, 0.3],
        0.5: [0.2, 0.3],  # round(0.5) = 0
        0.75: [0.3, 0.8],
        1.0: [0.3, 0.8],
    }


def test_the_record_is_json() -> None:
    values = np.array([VALUES.flatten(), VALUES.flatten()[::-1]])[:, [0, 1, 2, 2, 3]]
    record = json.loads(json.dumps(calibration_record(values, np.array([[1, 0]]))))
    assert list(record["by_prefix"]) == ["0.0", "0.25", "0.5", "0.75", "1.0"]
    assert record["last"] == record["by_prefix"]["1.0"]
    assert record["last"]["auroc"] == 1.0
    assert record["last"]["bins"][0] == {"mean_value": 0.1, "fraction_right": 0.0, "count": 1}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 of 4 values are NaN"):
        calibration(np.array([[0.1, np.nan], [0.2, 0.3]]), CORRECT)
    with pytest.raises(ValueError, match=r"\(2, 2\) and \(1, 2\)"):
        calibration(VALUES, CORRECT[:1])
    with pytest.raises(ValueError, match=r"\(4,\) and \(4,\)"):
        calibration(VALUES.flatten(), CORRECT.flatten())
