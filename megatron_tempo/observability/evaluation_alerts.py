"""What the alerts look for in evaluations: the critic's order and calibration, and the actor's accuracy.

The thresholds of calibration and accuracy were chosen on two seeds of the study's runs and tried on the third
(docs/monitoring.md).
"""

from __future__ import annotations

from collections.abc import Callable
from math import hypot

from megatron_tempo.observability.records import Record

AUROC_FALL = 0.05  # below the best so far
WITHIN_QUESTIONS = 0.6  # AUROC; 0.5 is that of chance
OVERESTIMATE = 0.1  # the critic's mean value above the share of right responses, at two evaluations in a row
ACCURACY_LEFT, ERRORS = 0.65, 2.0  # share of the best so far; standard errors that the fall exceeds

# Called with each record in turn. Returns what is wrong at this record; None if the rule does not fire. Its memory
# is bounded, so the thousandth record costs no more than the first.
Look = Callable[[Record], str | None]


def auroc(record: Record) -> float | None:
    """The AUROC of the critic's values of whole responses. None without a critic, or with one kind of verdict."""
    return _of_whole_responses(record, "auroc")


def _of_whole_responses(record: Record, name: str) -> float | None:
    """A number of the critic's calibration. None without a critic, or if the record is of before it was measured."""
    calibration = record.get("calibration")
    number: float | None = calibration["last"].get(name) if calibration else None
    return number


def auroc_falls() -> Look:
    best: dict[str, tuple[float, int]] = {}  # by set

    def look(record: Record) -> str | None:
        now = auroc(record)
        assert now is not None
        high, at = best.get(record["set"], (now, record["step"]))
        if now < high - AUROC_FALL:
            return f"AUROC on {record['set']} {now:.3f}, was {high:.3f} at step {at}"
        if now >= high:
            best[record["set"]] = (now, record["step"])
        return None

    return look


def auroc_within_questions(record: Record) -> float | None:
    """As `auroc`, among the responses to one question."""
    return _of_whole_responses(record, "auroc_within_questions")


def tells_no_response_apart() -> Look:
    before: dict[str, float] = {}  # by set

    def look(record: Record) -> str | None:
        now = auroc_within_questions(record)
        assert now is not None
        earlier, before[record["set"]] = before.get(record["set"], 1.0), now
        if max(earlier, now) >= WITHIN_QUESTIONS:
            return None
        return f"AUROC within the questions of {record['set']} {now:.2f}, before {earlier:.2f}"

    return look


def overestimate(record: Record) -> float | None:
    """The critic's mean value less the share of right responses, over those of an evaluation. None without a critic."""
    calibration = record.get("calibration")
    bins = (calibration["last"].get("bins") or []) if calibration else []
    count = sum(row["count"] for row in bins)
    if not count:
        return None
    excess = sum(row["count"] * (row["mean_value"] - row["fraction_right"]) for row in bins)
    return float(excess / count)


def overestimates() -> Look:
    before: dict[str, float] = {}  # by set

    def look(record: Record) -> str | None:
        now = overestimate(record)
        assert now is not None
        earlier, before[record["set"]] = before.get(record["set"], 0.0), now
        if min(earlier, now) <= OVERESTIMATE:
            return None
        return f"on {record['set']} its values are {now:.2f} above the share of right responses, before {earlier:.2f}"

    return look


def accuracy_falls() -> Look:
    best: dict[str, tuple[float, float, int]] = {}  # by set: average, its standard error, step

    def look(record: Record) -> str | None:
        now, error = record["avg"], record.get("avg_se") or 0.0
        high, its_error, at = best.get(record["set"], (now, error, record["step"]))
        if now >= high:
            best[record["set"]] = (now, error, record["step"])
        if now < ACCURACY_LEFT * high and high - now > ERRORS * hypot(error, its_error):
            return f"avg on {record['set']} {now:.3f}, was {high:.3f} at step {at}"
        return None

    return look
