"""Simulates schedules of generation and training: seconds, idle GPUs, staleness. Nothing is measured.

    python tools/bench_schedules.py                     # writes the tables of docs/benchmarks.md (a minute or two)
    python tools/bench_schedules.py --check             # exit status 1 if they are outdated
    python tools/bench_schedules.py experiment=qwen3_8b_aime cluster=h100x8 --lengths lognormal:12000,0.6

With overrides it prints the schedules of that configuration, in the placement that it has.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from made_parts import write_or_check
from schedule_parts.scenario import Result, ahead, schedule_of, simulate
from schedule_parts.schedule import Schedule

from megatron_tempo.cli import build
from megatron_tempo.config.problem import ConfigErrors
from megatron_tempo.config.rules import Purpose
from megatron_tempo.errors import InputError
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.split import problems
from megatron_tempo.rehearsal.lengths import Lengths

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
NAME = "tools/bench_schedules.py"
LENGTHS = Lengths(8000.0, 0.8)  # as in tools/bench_iteration.py
OVERHEAD = 0.005  # seconds of a decoding step beyond the planner's roofline
ITERATIONS = 10
MANY = 2000  # prompts
EXPERIMENTS = ("qwen3_8b_aime", "qwen3_14b_aime", "olmo3_7b_aime")
CLUSTERS = ("h100x8", "h100x64")
DISAGGREGATED, COLOCATED = ["rollout.placement=disaggregated"], ["rollout.placement=colocated"]
STALENESS = (1, 2, 4)


def schedule(words: Sequence[str], lengths: Lengths = LENGTHS, overhead: float = OVERHEAD) -> Schedule:
    """Raises ConfigErrors if the configuration cannot be planned, InputError if it has no servers."""
    config = build(list(words), purpose=Purpose.plan)
    if wrong := problems(config):
        raise ConfigErrors(wrong)
    shape, _ = shape_of(config)
    assert shape is not None
    if not config.rollout.is_served or config.rollout.servers.addresses is not None:
        raise InputError("rollout.engine: only servers on the cluster's GPUs are simulated: rollout.engine=vllm")
    return schedule_of(config, shape, lengths, overhead=overhead)


def variants(one: Schedule) -> Iterator[tuple[str, Schedule]]:
    """The schedules of a placement. Colocated, groups ahead are of use only if unfinished ones may continue."""
    if one.colocated:
        yield "colocated", ahead(one, 0)
        yield from ((f"colocated, partial rollouts, {k}", ahead(one, k)) for k in STALENESS)
        return
    yield "split", ahead(one, 0)
    yield from ((f"asynchronous, in order, {k}", ahead(one, k, runs_on=False)) for k in STALENESS[::2])
    yield from ((f"asynchronous, {k}", ahead(one, k)) for k in STALENESS)


def result(one: Schedule) -> Result:
    """Its seconds are scaled to the mean length of many responses: schedules differ in which ones they take."""
    found = simulate(one, ITERATIONS, 2 * one.max_staleness + 2)
    half = next(iter(one.groups))
    many = [row.length for number in range(MANY) for row in one.draw(number, half, 0).rows]
    usual = sum(many) / MANY * sum(one.groups.values())
    return replace(found, seconds=found.seconds * usual / found.tokens)


HEAD = ("seconds", "idle", "engine's GPUs", "trainer's GPUs", "rows", "again", "staleness 0, 1, 2, ...")


def cells(found: Result) -> list[str]:
    """The columns of `HEAD`."""
    sides = [side.idle / side.total if side.total else 0.0 for side in (found.engine, found.trainer)]
    most = max(found.staleness)
    stale = ", ".join(f"{found.staleness.get(k, 0.0):.0%}" for k in range(most + 1))
    return [f"{found.seconds:,.0f}", f"{found.idle:.1%}", *(f"{side:.1%}" for side in sides), f"{found.rows:.0f}",
            f"{found.again:.0%}", stale]  # fmt: skip


def paper_rows(experiment: str, cluster: str) -> Iterator[list[str]]:
    words = [f"experiment={experiment}", f"cluster={cluster}"]
    base = 0.0
    for placement in [DISAGGREGATED] + [COLOCATED] * cluster.endswith("x8"):
        for name, one in variants(schedule([*words, *placement])):
            found = result(one)
            base = base or found.seconds
            side = cells(found)
            if one.colocated:
                side[2:4] = ["", ""]  # the same GPUs
            yield [experiment, cluster, name, side[0], f"{found.seconds / base - 1:+.0%}", *side[1:]]


def paper_table() -> str:
    head = ["experiment", "cluster", "schedule", HEAD[0], "against split", *HEAD[1:]]
    rows = [row for experiment in EXPERIMENTS for cluster in CLUSTERS for row in paper_rows(experiment, cluster)]
    return table([head, *rows])


def batch(one: Schedule, prompts: int) -> Schedule:
    """With this many prompts in an iteration, in the halves that it has."""
    return replace(one, groups={half: prompts // len(one.groups) for half in one.groups})


def partial_rows() -> Iterator[list[str]]:
    words = ["experiment=qwen3_8b_aime", "cluster=h100x8", *COLOCATED]
    for mean, sigma in ((4000.0, 0.5), (8000.0, 0.8), (16000.0, 0.8)):
        base = schedule(words, Lengths(mean, sigma))
        for prompts in (512, 128, 32):
            one = batch(base, prompts)
            found = [result(ahead(one, k)) for k in (0, *STALENESS)]
            share = [f"{other.seconds:,.0f} ({other.seconds / found[0].seconds - 1:+.0%})" for other in found[1:]]
            yield [f"{mean:,.0f}, {sigma:g}", f"{found[0].tokens / (8 * prompts):,.0f}", str(prompts),
                   f"{found[0].seconds:,.0f}", *share, f"{found[0].rows:.0f}", f"{found[2].rows:.0f}"]  # fmt: skip


def partial_table() -> str:
    head = ["mean, sigma of lengths", "mean, cut off", "prompts", "wait for all",
            *(f"partial rollouts, {k}" for k in STALENESS), "rows, wait for all", "rows, partial, 2"]  # fmt: skip
    return table([head, *partial_rows()])


def peer_table() -> str:
    """Long responses on many GPUs, against colocated servers of all nodes, which only the simulator has."""
    lengths, words = Lengths(18000.0, 0.8), ["experiment=qwen3_8b_aime", "cluster=h100x64"]
    head = [
        "step beyond the roofline",
        "mean, cut off",
        "colocated",
        "split",
        *(f"asynchronous, {k}" for k in STALENESS),
    ]
    rows = [head]
    for overhead in (0.0, 0.005, 0.01):
        apart = batch(schedule([*words, *DISAGGREGATED], lengths, overhead), 128)
        node = batch(schedule([words[0], "cluster=h100x8", "cluster.gpus_per_node=64", *COLOCATED,
                               "rollout.servers.replicas=16"], lengths, overhead), 128)  # fmt: skip
        found = [result(one) for one in (ahead(node, 0), *(ahead(apart, k) for k in (0, *STALENESS)))]
        share = [f"{other.seconds:,.0f} ({other.seconds / found[0].seconds - 1:+.0%})" for other in found[1:]]
        tokens = f"{found[0].tokens / (8 * 128):,.0f}"
        rows.append([f"{overhead * 1000:g} ms", tokens, f"{found[0].seconds:,.0f}", *share])
    return table(rows)


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def text() -> str:
    return (
        f"**The paper's iterations.**\n\n{paper_table()}\n"
        f"**Partial rollouts**, seconds an iteration of Qwen3-8B on `h100x8`, colocated:\n\n{partial_table()}\n"
        f"**128 prompts of long responses on 64 H100**, Qwen3-8B, seconds an iteration:\n\n{peer_table()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", help="a configuration; without one, the tables are written")
    parser.add_argument("--lengths", default="lognormal:8000,0.8", help="of responses, as of `rehearse`")
    parser.add_argument("--overhead", type=float, default=OVERHEAD, help="seconds of a step beyond the roofline")
    parser.add_argument("--check", action="store_true", help="compare only: exit status 1 if the page is outdated")
    given = parser.parse_args()
    if not given.overrides:
        return write_or_check(DOCUMENT, {NAME: text()}, __doc__.partition("\n")[0])
    try:
        one = schedule(given.overrides, Lengths.parse(given.lengths), given.overhead)
    except (ConfigErrors, InputError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table([["schedule", *HEAD], *([name, *cells(result(other))] for name, other in variants(one))]), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
