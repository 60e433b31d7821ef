"""Compares the placements of servers, and says which staleness would keep trainer and servers busy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from megatron_tempo.config.choices import EnginePrecision, Placement
from megatron_tempo.plan.memory import MemoryPhase
from megatron_tempo.plan.search import Plan

ORDER = (
    "order: generate, the servers sleep, train (one model at a time, from host memory), the trainer leaves the GPU, "
    "the servers' weights wake, sync, the KV cache wakes"
)
_SHORT = 0.05  # of an iteration: a response that takes less does not make the next iteration wait


def compared(own: Plan, plans: Sequence[Plan]) -> Iterator[str]:
    """Which placement is faster and why; and what `rollout.max_staleness` would do. `plans`: the fastest first."""
    best = {kind: next((plan for plan in plans if _is(plan, kind)), None) for kind in Placement}
    together, apart = best[Placement.colocated], best[Placement.disaggregated]
    if together is not None and apart is not None:
        yield from _faster(together, apart)
    elif apart is not None and _could_be_colocated(own):
        yield "placement: disaggregated, because no layout fits in which each node holds a whole copy of the model"
    if apart is not None:
        yield _ahead(min((plan for plan in plans if _is(plan, Placement.disaggregated)), key=_overlapped))


def _is(plan: Plan, kind: Placement) -> bool:
    """Whether its servers are placed so. Servers that share GPUs with the trainer, and do not sleep, are neither."""
    own = plan.split.servers > 0 and plan.config.rollout.placement is kind
    return own and (plan.config.rollout.is_colocated or not plan.split.shared)


def _could_be_colocated(own: Plan) -> bool:
    """Whether the search tries to, on several nodes."""
    cluster, servers = own.config.cluster, own.config.rollout.servers
    assert cluster is not None
    return cluster.nodes > 1 and not cluster.rollout_nodes and servers.precision is not EnginePrecision.fp8


def _overlapped(plan: Plan) -> float:
    generate = plan.seconds[MemoryPhase.generate]
    return max(generate, sum(plan.seconds.values()) - generate)


def _faster(together: Plan, apart: Plan) -> Iterator[str]:
    """The times of both, the faster one first, and what they are made of."""
    first, second = sorted((together, apart), key=lambda plan: plan.iteration)
    names = [plan.config.rollout.placement.name for plan in (first, second)]
    yield (
        f"placement: {names[0]} takes {seconds_text(first.iteration)} s an iteration, {names[1]} "
        f"{seconds_text(second.iteration)} s"
    )
    for plan, name in zip((first, second), names, strict=True):
        generate = plan.seconds[MemoryPhase.generate]
        train = sum(plan.seconds.values()) - generate - plan.moving
        overlaps = plan.iteration < generate + train
        yield (
            f"  {name}: {plan.split.serving} GPUs generate for {seconds_text(generate)} s, "
            f"{'while' if overlaps else 'then'} {plan.split.trainers} train for {seconds_text(train)} s; models and "
            f"weights move for {seconds_text(plan.moving)} s"
        )


def _ahead(plan: Plan) -> str:
    """With `max_staleness` 1, servers generate an iteration while another one is trained on. If the longest response
    takes a part of an iteration that shows, one more for each iteration that it takes keeps both sides busy."""
    seconds = _overlapped(plan)
    k = 1 if plan.response <= _SHORT * seconds else 1 + math.ceil(plan.response / seconds)
    generate = plan.seconds[MemoryPhase.generate]
    trains = generate < seconds
    waiting = 1 - min(generate, sum(plan.seconds.values()) - generate) / seconds
    return (
        f"staleness: disaggregated, rollout.max_staleness={k} would let generation and training overlap: "
        f"{seconds_text(seconds)} s an iteration, in which the {'servers' if trains else 'trainer'} would wait for "
        f"{waiting:.0%}; a response of full length takes {seconds_text(plan.response)} s"
    )


def seconds_text(seconds: float) -> str:
    """1,234; 12; 0.35: whole seconds from ten on, else two digits."""
    return f"{seconds:,.0f}" if seconds >= 10 or seconds == 0 else f"{seconds:.2g}"
