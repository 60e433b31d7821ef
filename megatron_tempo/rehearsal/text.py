"""A rehearsal's report, as text and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from megatron_tempo.plan.memory import GB
from megatron_tempo.rehearsal.faults import OUT_OF_MEMORY
from megatron_tempo.rehearsal.outcome import Outcome, PhaseResult, Planned, RankResult, over

BANNER = (
    "REHEARSAL: nothing is trained. The GPU is simulated and computes nothing: numbers, losses and times do not exist. "
    "Memory, kernels, types, devices and messages are the program's own."
)


def report(outcome: Outcome, planned: Planned) -> str:
    """All that was found."""
    parts = [BANNER, f"rollouts: {outcome.rows} rows of each kind, lengths: {outcome.lengths}; {outcome.seconds:.0f} s"]
    parts += outcome.notes
    parts += ["\n".join(_rank(rank, planned)) for rank in outcome.ranks]
    parts.append("\n".join(_verdict(outcome, planned)))
    return "\n\n".join(parts)


def as_json(outcome: Outcome, planned: Planned) -> dict[str, Any]:
    """The same as plain data. Bytes, seconds and counts are not rounded."""
    plain = asdict(outcome)
    for rank, given in zip(outcome.ranks, plain["ranks"], strict=True):
        layers = None if rank.layers is None else rank.layers.value
        given |= {"fits": rank.fits, "phases": list(given["phases"]), "layers": layers}
        for phase, one in zip(rank.phases, given["phases"], strict=True):
            one |= {"plan_error": phase.error, "fits": phase.fits}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
    return plain | {"fits": outcome.fits, "limit": planned.limit, "servers_hold": planned.server_bytes}


_MEMORY = (
    *("GB of the GPU", "before", "loading", "peak", "reserved", "after", "free piece", "retries", "plan", "plan off"),
    "all rows",
)
_WORK = (
    *("work", "kernels", "Triton", "products", "TFLOP", "NCCL calls", "NCCL GB", "copies GB", "syncs", "compiled"),
    "roofline s",
)


def _rank(rank: RankResult, planned: Planned) -> Iterator[str]:
    machine = f": {rank.machine}" if rank.machine else ""
    yield f"rank {rank.kind.rank} of {rank.kind.world}, {rank.kind.label}{machine}"
    yield from _table([_MEMORY, *(_memory(phase) for phase in rank.phases)])
    yield ""
    yield from _table([_WORK, *(_work(phase) for phase in rank.phases)])
    took = f"{rank.seconds:.1f} s, {rank.cpu_seconds:.1f} s of processor time"
    yield f"it took {took} and {rank.host / GB:.1f} GB of this machine's memory"


def _memory(phase: PhaseResult) -> tuple[str, ...]:
    sizes = (phase.before, phase.loading, phase.peak, phase.reserved, phase.after, phase.largest_free)
    plan = ("", "") if phase.planned is None or phase.error is None else (_gb(phase.planned), f"{phase.error:+.1%}")
    return (phase.phase, *map(_gb, sizes), str(phase.retries), *plan, _gb(phase.corrected))


def _work(phase: PhaseResult) -> tuple[str, ...]:
    counts = phase.counts
    whole = (f"{counts[name]:,.0f}" for name in ("kernel_launches", "triton_launches", "products"))
    return (
        phase.phase,
        *whole,
        f"{counts['flops'] / 1e12:.1f}",
        f"{counts['nccl_calls']:,.0f}",
        _gb(counts["nccl_bytes"]),
        _gb(counts["host_bytes"]),
        f"{counts['synchronisations']:,.0f}",
        f"{counts['triton_compilations'] + counts['dynamo_graphs']:.0f}",
        f"{phase.roofline:.2f}",
    )


def _gb(size: float) -> str:
    return f"{size / GB:.1f}"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of text. The first is flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        yield "  ".join(["", first.ljust(widths[0]), *numbers]).rstrip()


def _verdict(outcome: Outcome, planned: Planned) -> Iterator[str]:
    if outcome.fault is not None:
        yield f"FAULT before any rank ran: {outcome.fault.kind}, at {outcome.fault.where}: {outcome.fault.message}"
    for rank in outcome.ranks:
        name = f"rank {rank.kind.rank} ({rank.kind.label})"
        for line in over(planned, rank):
            yield f"DOES NOT FIT: {name}: {line}"
        if rank.fault is not None and rank.fault.kind != OUT_OF_MEMORY:
            yield f"FAULT: {name}, {rank.fault.phase}: {rank.fault.kind}, at {rank.fault.where}: {rank.fault.message}"
        if rank.ended is not None:
            yield f"NOT FINISHED: {name}: {rank.ended}"
    if outcome.fits:
        yield _fits(outcome, planned)
    if outcome.ranks:
        yield from _corrections(outcome)


def _fits(outcome: Outcome, planned: Planned) -> str:
    worst = max((phase for rank in outcome.ranks for phase in rank.phases), key=lambda phase: phase.corrected)
    return (
        f"it fits: the largest phase is {worst.phase}, with {_gb(worst.corrected)} GB of the {_gb(planned.limit)} GB "
        f"that a process may use"
    )


def _corrections(outcome: Outcome) -> Iterator[str]:
    """What to divide `plan`'s figures by: measured / planned, at the phase where they are furthest apart."""
    known = [phase for rank in outcome.ranks for phase in rank.phases if phase.error is not None]
    if not known:
        return
    worst = max(known, key=lambda phase: abs(phase.error or 0.0))
    largest = max(known, key=lambda phase: phase.peak)
    for what, phase in (("furthest off", worst), ("largest phase", largest)):
        factor = phase.peak / phase.planned if phase.planned else 0.0
        yield (
            f"plan, {what}: {phase.phase}, {_gb(phase.planned or 0.0)} GB planned, {_gb(phase.peak)} GB measured; "
            f"correct it by a factor of {factor:.2f}"
        )
