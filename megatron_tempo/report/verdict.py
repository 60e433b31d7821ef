"""The conclusion from two evaluations of the same questions, in numbers and in sentences."""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot
from typing import TYPE_CHECKING

from megatron_tempo.observability.records import Record

if TYPE_CHECKING:
    from megatron_tempo.evaluation.paired import Paired


@dataclass(frozen=True, slots=True)
class Change:
    """A score's change between two evaluations. `is_real`: whether a test supports that there is one."""

    kind: str  # avg@16, pass@8
    difference: float
    is_real: bool
    words: str  # +0.043 (95% interval +0.010 to +0.076, p = 0.010)


def same_questions(first: Record, second: Record) -> bool:
    """Whether two lines of evaluations.jsonl are known to be of the same questions, answers and verifiers."""
    return first.get("questions_hash") is not None and first["questions_hash"] == second.get("questions_hash")


def compared(first: Record, second: Record, k: str | None) -> Paired | None:
    """Second minus first of avg@k, or of pass@k, paired over the questions.

    None unless both lines are of the same questions and have the score.
    """
    if not same_questions(first, second) or any(_value(record, k) is None for record in (first, second)):
        return None
    import numpy as np  # slow, as is scipy

    from megatron_tempo.evaluation.paired import paired
    from megatron_tempo.evaluation.scores import pass_by_question

    def by_question(record: Record) -> np.ndarray:
        right, samples = np.array(record["right"], dtype=int), record["avg_k"]
        return right / samples if k is None else pass_by_question(right, samples, int(k))

    return paired(by_question(first), by_question(second))


def changes(first: Record, second: Record) -> list[Change]:
    """The changes of avg@k and of every pass@k that both evaluations have, avg@k first."""
    kinds = [None, *(k for k in second["pass"] if k in first["pass"])]
    return [_change(first, second, k) for k in kinds if None not in (_value(first, k), _value(second, k))]


def _change(first: Record, second: Record, k: str | None) -> Change:
    kind = f"avg@{second['avg_k']}" if k is None else f"pass@{k}"
    comparison = compared(first, second, k)
    if comparison is None:
        old, new = _value(first, k), _value(second, k)
        assert old is not None
        assert new is not None
        # Assumes independent questions: records of earlier versions have no results per question.
        error = hypot(_error(first, k), _error(second, k))
        return Change(kind, new - old, abs(new - old) > 2 * error > 0, f"{new - old:+.3f} ± {error:.3f}, unpaired")
    if comparison.interval is None:
        return Change(kind, comparison.difference, False, f"{comparison.difference:+.3f}, of one question")
    low, high = comparison.interval
    p = "p < 0.001" if (comparison.p or 0) < 0.001 else f"p = {comparison.p:.3f}"
    words = f"{comparison.difference:+.3f} (95% interval {low:+.3f} to {high:+.3f}, {p})"
    return Change(kind, comparison.difference, comparison.is_real, words)


def verdict(subject: str, other: str, first: Record, second: Record) -> list[str]:
    """Whether `subject` improved the scores over `other`'s: a sentence on avg@k, and one on each pass@k."""
    all_changes = changes(first, second)
    if not all_changes:
        return []
    avg, *passes = all_changes
    if not avg.is_real:
        head = f"{subject} and {other} do not differ in {avg.kind} by more than chance"
    else:
        head = f"{subject} {'beat' if avg.difference > 0 else 'did worse than'} {other} in {avg.kind}"
    return [f"{head}: {avg.words}.", *map(_pass_sentence, passes)]


def _pass_sentence(change: Change) -> str:
    if not change.is_real:
        return f"{change.kind} did not change by more than chance: {change.words}."
    return f"{change.kind} {'rose' if change.difference > 0 else 'fell'}: {change.words}."


def _value(record: Record, k: str | None) -> float | None:
    value: float | None = record["avg"] if k is None else record["pass"].get(k)
    return value


def _error(record: Record, k: str | None) -> float:
    return (record["avg_se"] if k is None else record["pass_se"].get(k)) or 0.0
