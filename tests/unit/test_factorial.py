"""The factorial part of the study: its design is of resolution IV, and effects that are planted come back."""

from __future__ import annotations

from itertools import combinations
from types import ModuleType

import numpy as np
import pytest

from tests.support.tools import load_tool


@pytest.fixture
def factorial(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("factorial", monkeypatch)


def test_the_design_is_of_resolution_four(factorial: ModuleType) -> None:
    runs = factorial.design()
    letters = [factor.letter for factor in factorial.FACTORS]
    assert letters == list("ABCDEFG")
    assert len({factorial.name_of(levels) for levels in runs}) == len(runs) == 16

    def dot(one: str, other: str) -> int:
        return sum(factorial.column(levels, one) * factorial.column(levels, other) for levels in runs)

    assert all(sum(levels[letter] for levels in runs) == 0 for letter in letters), "each is on in half of the runs"
    pairs = ["".join(pair) for pair in combinations(letters, 2)]
    assert all(dot(one, other) == 0 for one, other in combinations(letters, 2))
    assert all(dot(one, pair) == 0 for one in letters for pair in pairs)
    # The words that are constant, by hand: ABCE, BCDF, ACDG and their products.
    words = ["".join(w) for n in range(1, 8) for w in combinations(letters, n) if abs(dot("".join(w), "")) == 16]
    assert words == ["ABCE", "ABFG", "ACDG", "ADEF", "BCDF", "BDEG", "CEFG"]
    assert {" ".join(sums) for sums in factorial.ALIASES} == {
        *("AB CE FG", "AC BE DG", "AD CG EF", "AE BC DF", "AF BG DE", "AG BF CD", "BD CF EG")
    }


def test_planted_effects_come_back(factorial: ModuleType) -> None:
    """Two seeds that differ by a constant. An interaction is seen in the sum that it is part of, and nowhere else."""
    planted = {"A": 0.04, "D": -0.02, "DF": 0.01, "CE": 0.006}
    scores = {
        factorial.name_of(levels): np.array([0.3, 0.5])
        + sum(half / 2 * factorial.column(levels, letters) for letters, half in planted.items())
        for levels in factorial.design()
    }
    found = factorial.effects(scores)
    assert list(found)[:7] == list("ABCDEFG")
    assert len(found) == 7 + 7
    wanted = {"A": 0.04, "D": -0.02, "AE+BC+DF": 0.01, "AB+CE+FG": 0.006}
    for term, effect in found.items():
        assert effect.mean == pytest.approx(wanted.get(term, 0.0), abs=1e-12), term
        assert effect.half == pytest.approx(0.0, abs=1e-7), "everything is explained"


def test_the_interval_is_that_of_least_squares(factorial: ModuleType) -> None:
    """Against the covariance of numpy's least squares, on noise: a column for each of 2 seeds and 14 terms."""
    noise = np.random.default_rng(0).normal(size=(16, 2))
    scores = dict(zip(map(factorial.name_of, factorial.design()), noise, strict=True))
    terms = [*"ABCDEFG", *(group[0] for group in factorial.ALIASES)]
    half_signs = [[factorial.column(levels, term) / 2 for term in terms] for levels in factorial.design()]
    rows = np.array([[seed == 0, seed == 1, *signs] for signs in half_signs for seed in (0, 1)], dtype=float)
    fitted, (left,), *_ = np.linalg.lstsq(rows, noise.reshape(-1))
    errors = np.sqrt(left / 16 * np.diag(np.linalg.inv(rows.T @ rows)))
    for effect, mean, error in zip(factorial.effects(scores).values(), fitted[2:], errors[2:], strict=True):
        assert effect.mean == pytest.approx(mean)
        assert effect.half == pytest.approx(2.119905 * error, rel=1e-5)  # t of 16 degrees of freedom


def test_the_arms_have_what_their_names_say(monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_tool("study", monkeypatch)
    arms = {arm.name: arm for arm in study.FACTORIAL}
    assert len(arms) == 16
    assert arms["factorial_none"].words == ("evaluation.every=35",)
    words = (
        "evaluation.every=35",
        "stage2.actor_on_labelled=true",
        "stage2.truncated_responses=masked",
        "stage2.pessimism=1",
    )
    assert arms["factorial_aeg"].words == words
    assert arms["factorial_aeg"].what.startswith("labelled rows in the M-step; truncated responses masked; the lower")


def test_the_table_of_effects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labelled rows bring 0.1 in one seed and 0.2 in the other, on every set. With one run less, one seed is left."""
    study = load_tool("study", monkeypatch)
    report = load_tool("study_report", monkeypatch)
    runs = {}
    for arm in study.FACTORIAL:
        for seed in (0, 1):
            end = 0.3 + 0.1 * (seed + 1) * ("stage2.actor_on_labelled=true" in arm.words)
            runs[arm.name, seed] = {
                "sets": {name: {"avg@16": [0.1, end], "pass@16": [0.1, end]} for name in report.SETS}
            }
    lines = "".join(report.factor_effects(runs)).splitlines()
    assert lines[0].startswith("| 2 seeds | unlabelled, avg@16 | unlabelled, pass@16 | heldout, avg@16 |")
    assert lines[2].startswith("| A: labelled rows in the M-step | **+.150** | **+.150** |")
    assert lines[3].startswith("| B: a KL term, 0.02, to the policy of stage 1 | +.000 | +.000 |")
    # What is left is 0.1 (s + 1) 1[A on] less both fits: 0.025 in each run, with 16 degrees of freedom.
    half = 2.119905 * 2 * (32 * 0.025**2 / 16 / 32) ** 0.5
    assert lines[-1].startswith(f"| 95% interval, ± | .{round(1000 * half):03d} |")
    del runs["factorial_none", 1]
    assert next(report.factor_effects(runs)).startswith("| 1 seeds |")
    assert not list(report.factor_effects({}))
