"""Tables of an iteration's costs: measured, and by the fitted laws where ranks or tokens do not fit here."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_parts import replaced

from iteration_parts.driver import Measured
from iteration_parts.laws import Law, fit
from iteration_parts.made import preset_of
from megatron_tempo.plan.memory import memory
from megatron_tempo.plan.shapes import PUBLISHED
from megatron_tempo.plan.times import iteration, times

RANKS = (4, 16, 64, 512, 4096)
PAGE_NAME = "tools/bench_iteration.py"
FIRST, OTHERS = "first rank", "other ranks"
# What is shown of each part: its name in `meter.Cost`, its unit, how many of it make one of the table's, and what is
# too small to tell apart.
# A part is left out where it took less than twice that in all measurements ("-" next to the number of another record).
_KINDS = (
    ("seconds", "s of processor time", 1.0, 0.05),
    ("memory", "MB of memory", 1e6, 2e7),
    ("moved", "MB received", 1e6, 1e5),
    ("calls", "collective calls", 1.0, 1.0),
)
_SHOWN = 0.005  # of the column's sum: smaller parts are summed up


@dataclass(frozen=True, slots=True)
class Laws:
    """By kind of cost, rank ("first rank", "other ranks") and part."""

    tokens: float  # of the preset's whole iteration
    of: dict[tuple[str, str, str], Law]

    def parts(self, kind: str, rank: str) -> dict[str, Law]:
        return {part: law for (one, which, part), law in self.of.items() if (one, which) == (kind, rank)}


def result(measured: Sequence[Measured]) -> dict[str, Any]:
    """What was measured, as plain data: costs of the first rank, and the largest of the others."""
    whole = max(one.tokens / one.share for one in measured)  # of those with the preset's lengths
    points = []
    for one in measured:
        costs = {FIRST: one.by_rank[0]["costs"], OTHERS: _largest([rank["costs"] for rank in one.by_rank[1:]])}
        held = max(rank["held"] for rank in one.by_rank)
        points.append({"tokens": one.tokens, "rows": one.rows, "ranks": one.ranks, "held": held, "costs": costs})
    return {
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "whole": {"tokens": whole, "rows": round(measured[-1].rows / measured[-1].share)},
        "not_found": measured[0].by_rank[0]["missing"],
        "points": points,
    }


def _largest(ranks: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each cost of each part, the largest among the ranks. Without ranks, nothing."""
    names = {name for costs in ranks for name in costs}
    kinds = [kind for kind, *_ in _KINDS]
    return {name: {kind: max(c[name][kind] for c in ranks if name in c) for kind in kinds} for name in sorted(names)}


def laws_of(found: dict[str, Any]) -> Laws:
    laws = {}
    for kind, _, _, least in _KINDS:
        for rank in (FIRST, OTHERS):
            points = [point for point in found["points"] if point["costs"][rank]]
            if kind in ("calls", "moved"):  # a rank alone exchanges nothing
                points = [point for point in points if point["ranks"] > 1] or points
            if (
                kind == "calls" and points
            ):  # of an iteration with all its mini-batches, which the smallest parts have not
                most = max(point["rows"] for point in points)
                points = [point for point in points if point["rows"] == most]
            for part in sorted({part for point in points for part in point["costs"][rank]}):
                costs = [point["costs"][rank].get(part, {}).get(kind, 0.0) for point in points]
                cells = [(point["tokens"], point["ranks"], cost) for point, cost in zip(points, costs, strict=True)]
                if any(cost >= 2 * least for cost in costs):
                    laws[kind, rank, part] = fit(cells, least)
    return Laws(found["whole"]["tokens"], laws)


def table(found: dict[str, Any], laws: Laws) -> str:
    """Plain text: a block for each kind of cost and rank."""
    whole = found["whole"]
    lines = [f"{whole['rows']:,} rows and {whole['tokens'] / 1e6:.1f} million tokens an iteration, by the laws:"]
    for kind, unit, scale, _ in _KINDS:
        for rank in (FIRST, OTHERS):
            if not laws.parts(kind, rank):
                continue
            rows = _rows(laws, kind, rank, scale)
            lines += ["", f"{unit}, {rank}:", *_aligned(rows)]
    if found["not_found"]:
        lines += ["", f"not measured apart, because they do not exist: {', '.join(found['not_found'])}"]
    return "\n".join(lines)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of text. The first and the last are flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *numbers, law in rows:
        cells = (cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True))
        yield "  ".join([first.ljust(widths[0]), *cells, law]).rstrip()


def _rows(laws: Laws, kind: str, rank: str, scale: float) -> list[list[str]]:
    """A header, a row for each part that matters at one of the numbers of ranks, and their sum."""
    parts = laws.parts(kind, rank)
    costs = {part: [law.at(laws.tokens, ranks) / scale for ranks in RANKS] for part, law in parts.items()}
    sums = [sum(column) for column in zip(*costs.values(), strict=True)] or [0.0] * len(RANKS)
    shown = [p for p in costs if any(c >= _SHOWN * s for c, s in zip(costs[p], sums, strict=True) if s)]
    rows = [["part", *(f"{ranks:,}" for ranks in RANKS), "law"]]
    for part in sorted(shown, key=lambda part: -costs[part][2]):
        rows.append([part, *map(_number, costs[part]), _formula(parts[part], laws.tokens, scale)])
    rest = [sum(costs[part][i] for part in costs if part not in shown) for i in range(len(RANKS))]
    if any(rest):
        rows.append(["smaller parts", *map(_number, rest), ""])
    if kind == "memory":  # parts follow one another, so their peaks do not add up
        most = [max((cost[i] for cost in costs.values()), default=0.0) for i in range(len(RANKS))]
        return [*rows, ["largest", *map(_number, most), ""]]
    return [*rows, ["sum", *map(_number, sums), ""]]


_SYMBOLS = {"tokens": "T", "tokens / ranks": "T/R", "tokens x ranks": "T R", "ranks": "R", "log2(ranks)": "log2 R"}


def _formula(law: Law, tokens: float, scale: float) -> str:
    """The terms that matter at one of the numbers of ranks. T: millions of tokens, R: ranks."""
    terms = dict.fromkeys(term for ranks in RANKS for term in law.grows_with(tokens, ranks))
    parts = []
    for term in terms:
        factor = law.factors[term] / scale * (1e6 if term.startswith("tokens") else 1.0)
        parts.append(f"{factor:.2g} {_SYMBOLS[term]}" if term in _SYMBOLS else f"{factor:.2g}")
    return " + ".join(parts)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def planned(preset: str, cluster: str) -> str:
    """What model and engine take, by the planner: this tool replaces them."""
    config = preset_of(preset, [f"cluster={cluster}", "rollout.placement=disaggregated"])
    if config.model.shape is None or config.cluster is None:
        return ""
    shape = PUBLISHED[config.model.shape]
    seconds = times(config, shape, memory(config, shape))
    parts = ", ".join(f"{phase.name} {spent:,.0f} s" for phase, spent in seconds.items())
    gpus = config.cluster.nodes * config.cluster.gpus_per_node
    return f"model and engine on {gpus} GPUs ({cluster}), by the planner: {parts}; {iteration(config, seconds):,.0f} s"


def page(records: dict[str, dict[str, Any]]) -> str:
    """The generated part of docs/benchmarks.md: a cell has the cost in each record, the earliest first."""
    laws = {name: laws_of(found) for name, found in records.items()}
    blocks = [_measured(name, found) for name, found in records.items()]
    for kind, unit, scale, _ in _KINDS:
        for rank in (FIRST, OTHERS):
            if any(one.parts(kind, rank) for one in laws.values()):
                tables = [_rows(one, kind, rank, scale) for one in laws.values()]
                blocks.append(_markdown(f"{unit}, {rank}", _side_by_side(tables)))
    return "\n\n".join(blocks)


def _measured(name: str, found: dict[str, Any]) -> str:
    points, whole = found["points"], found["whole"]
    sizes = " to ".join(f"{tokens / 1e6:.2f}" for tokens in (f([p["tokens"] for p in points]) for f in (min, max)))
    ranks = ", ".join(str(number) for number in sorted({point["ranks"] for point in points}))
    kept = max(point["held"] * point["ranks"] / point["tokens"] for point in points)
    return (
        f"**{name.capitalize()}**: commit {found['commit']}, measured on {found['machine']} with {sizes} million "
        f"tokens and {ranks} ranks; the laws are for {whole['rows']:,} rows and {whole['tokens'] / 1e6:.1f} million. "
        f"A rank keeps at most {kept:.0f} bytes of tensors for each token of its share of the rows."
    )


def _side_by_side(tables: Sequence[list[list[str]]]) -> list[list[str]]:
    """One table: the cells of all, the law of the last."""
    header, *_ = tables[-1]
    names = list(dict.fromkeys(row[0] for rows in reversed(tables) for row in rows[1:-1]))
    of = [{row[0]: row for row in rows} for rows in tables]
    lines = [header]
    for name in [*names, tables[-1][-1][0]]:
        found = [rows.get(name) for rows in of]
        cells = [" \u2192 ".join("-" if row is None else row[i] for row in found) for i in range(1, len(header) - 1)]
        lines.append([name, *cells, "" if found[-1] is None else found[-1][-1]])
    return lines


def _markdown(title: str, rows: Sequence[Sequence[str]]) -> str:
    header, *cells = rows
    head = [title, *(f"{ranks} ranks" for ranks in header[1:-1]), header[-1]]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))


def update_page(docs: Path) -> None:
    """Write the generated part of docs/benchmarks.md from docs/benchmarks.json."""
    records = json.loads((docs / "benchmarks.json").read_text())
    path = docs / "benchmarks.md"
    path.write_text(replaced(path, {PAGE_NAME: page(records)}), encoding="utf-8")


def _commit() -> str:
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
