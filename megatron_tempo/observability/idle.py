"""The share of a time in which neither a trained model nor the engine worked: what an iteration costs besides both."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

Span = tuple[float, float]  # begin and end, in seconds of one monotonic clock
PhaseSpan = tuple[str, float, float]  # name of the phase ("outer/inner" inside another), begin and end

SYNC = "sync"
# Phases in which no trained model computes. Every other phase, of a user's method too, counts as a model's work.
_WITHOUT_MODEL = ("generate", SYNC, "checkpoint", "evaluate")


def idle_share(window: Span, phases: Iterable[PhaseSpan], engine: Iterable[Span]) -> float:
    """The share of `window` outside of all phases of a model and of all spans in which the engine had requests.

    A weight sync counts as idle, also while requests wait: servers pause for it, and no model computes.

    >>> idle_share((0.0, 10.0), [("actor", 6.0, 9.0)], engine=[(1.0, 5.0)])
    0.3
    """
    named = [(name.rpartition("/")[2], (begin, end)) for name, begin, end in phases]
    models = [span for name, span in named if name not in _WITHOUT_MODEL]
    syncs = [span for name, span in named if name == SYNC]
    engine = list(engine)
    begin, end = window
    if end <= begin:
        return 0.0
    edges = sorted({begin, end, *(t for span in (*models, *syncs, *engine) for t in span if begin < t < end)})
    idle = 0.0
    for left, right in itertools.pairwise(edges):
        middle = (left + right) / 2
        works = _covers(models, middle) or (_covers(engine, middle) and not _covers(syncs, middle))
        idle += 0.0 if works else right - left
    return idle / (end - begin)


def _covers(spans: Sequence[Span], time: float) -> bool:
    return any(begin <= time < end for begin, end in spans)
