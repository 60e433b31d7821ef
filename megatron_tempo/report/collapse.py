"""The model collapse step of URLVR (He et al. 2026, arXiv 2603.08660), as a figure of a run's curve on a set.

It is the training step at which the reward accuracy falls below 1%. The reward accuracy is the share of responses whose
reward by majority vote is their verdict (`evaluation.scores.vote_accuracy`). It is measured at evaluations with
`evaluation.votes=true`, so the step is known up to `evaluation.every`. A run of any method can have one: the votes are
those of the evaluation's responses, whatever the method's rewards are.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tempo.observability.records import Record

COLLAPSED = 0.01


def reward_accuracies(records: Sequence[Record]) -> dict[int, float]:
    """The reward accuracy at each step of these evaluations of a set that recorded votes."""
    return {record["step"]: record["vote"]["reward_accuracy"] for record in records if record.get("vote")}


def collapse_step(accuracies: dict[int, float]) -> int | None:
    """The first step with a reward accuracy below 1%; None if there is none."""
    return min((step for step, accuracy in accuracies.items() if accuracy < COLLAPSED), default=None)


def collapse_words(accuracies: dict[int, float]) -> str:
    """The step as a cell of a table. `accuracies`: not empty.

    >>> collapse_words({0: 0.6, 10: 0.004, 20: 0.2}), collapse_words({0: 0.6, 10: 0.5})
    ('10', 'none by 10')
    """
    step = collapse_step(accuracies)
    return f"none by {max(accuracies)}" if step is None else f"{step}"


def collapse_sentence(name: str, accuracies: dict[int, float]) -> str:
    """What there is to say of a set's curve. `accuracies`: not empty."""
    lowest = min(accuracies, key=lambda step: (accuracies[step], step))
    least = f"{accuracies[lowest]:.3f} at step {lowest}"
    step = collapse_step(accuracies)
    if step is None:
        return f"{name}: no model collapse step; the reward accuracy of a majority vote is lowest with {least}."
    return f"{name}: model collapse step {step}, from which a majority vote rewards less than 1% of responses rightly."
