"""Writes the table of docs/planning.md: what the paper's experiments need on 8, 16 and 64 GPUs.

    python tools/plan_tables.py            # rewrites the table in docs/planning.md
    python tools/plan_tables.py --check    # exit status 1 if the table is outdated

Each line is the result of `megatron-tempo plan experiment=NAME cluster=CLUSTER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from made_parts import write_or_check

from megatron_tempo.cli import build
from megatron_tempo.config.rules import Purpose
from megatron_tempo.plan.memory import GB
from megatron_tempo.plan.search import MORE, SHORTER, nearest, plan_of, relief, search
from megatron_tempo.plan.shapes import shape_of
from megatron_tempo.plan.table import layout_row

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "planning.md"
EXPERIMENTS = ("qwen3_8b_aime", "qwen3_14b_aime", "olmo3_7b_aime", "qwen3_30b_a3b_aime")
CLUSTERS = ("h100x8", "h100x16", "h100x64", "h200x8", "h200x16", "h200x64")
HEADS = (
    "experiment",
    "cluster",
    "as shipped",
    "fastest that fits",
    "peak GB",
    "seconds per iteration",
    "fewest changes",
)


def line(experiment: str, cluster: str) -> list[str]:
    """The cells of one experiment on one cluster."""
    config = build([f"experiment={experiment}", f"cluster={cluster}"], purpose=Purpose.plan)
    shape, _ = shape_of(config)
    assert shape is not None
    own, plans = plan_of(config, shape), search(config, shape)
    given = "fits" if own.over is None else f"{own.over.phase.value}: {own.over.bytes / GB:.0f} GB over"
    if not plans:
        change = " or ".join(f"`{' '.join(other.words)}`" for other in relief(config, shape))
        change = change or f"none on {MORE[-1]} times as many GPUs, or with 1/{SHORTER[-1]} of the response length"
        return [experiment, cluster, given, "none", "", "", change]
    tensor, pipeline, data, _, engine, most, phase, _, seconds = layout_row(plans[0])
    least = nearest(plans)
    assert least is not None
    own = plans[0].layout
    experts = f", expert {own.expert} x {own.expert_cut}" if shape.experts is not None else ""
    layout = f"{tensor} x {pipeline} x {data}{experts}, {engine}"
    change = f"`{' '.join(least.words)}`" if least.words else "none"
    return [experiment, cluster, given, layout, f"{most} ({phase})", seconds, change]


def table() -> str:
    rows = [list(HEADS), ["---"] * len(HEADS)]
    rows += [line(experiment, cluster) for experiment in EXPERIMENTS for cluster in CLUSTERS]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    sys.exit(write_or_check(DOCUMENT, {"tools/plan_tables.py": table()}, __doc__.partition("\n")[0]))
