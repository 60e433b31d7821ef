"""Rehearses the presets over layouts, precisions and methods, and writes the table of docs/rehearsal.md.

    python tools/rehearsal_table.py run                   # rehearse what docs/rehearsal.json has not; stops on Ctrl-C
    python tools/rehearsal_table.py run --again qwen3_8b  # rehearse the cases whose names begin so, again
    python tools/rehearsal_table.py write                 # the table in docs/rehearsal.md, from docs/rehearsal.json

`run` needs an environment with a CUDA build of torch (docs/rehearsal.md), and for some cases Transformer Engine.
A case that does not fit is rehearsed again on a larger GPU, so that its figures are complete.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from made_parts import replaced

from megatron_tempo.cli import build
from megatron_tempo.config.rules import Purpose
from megatron_tempo.plan.memory import GB
from megatron_tempo.rehearsal.outcome import Outcome, over
from megatron_tempo.rehearsal.rehearse import Options, rehearse

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE = DOCS / "rehearsal.json", DOCS / "rehearsal.md"
CLUSTERS = {
    "qwen3_8b_aime": "h100x8",
    "qwen3_8b_day": "h100x8",
    "qwen3_8b_general": "h100x8",
    "olmo3_7b_aime": "h100x8",
    "qwen3_14b_aime": "h100x16",
}
LAYOUTS = {
    "as shipped": [],
    "tensor 2, data 2": ["parallel.tensor=2"],
    "pipeline 2, data 2": ["parallel.tensor=1", "parallel.pipeline=2", "parallel.sequence=false"],
    "tensor 2, context 2": ["parallel.tensor=2", "parallel.context=2"],
    "tensor 4, critic tensor 2": ["parallel.critic.tensor=2"],
}
PRECISIONS = {
    "bf16": ["model.layers=local"],
    "bf16, Transformer Engine": ["model.layers=transformer_engine"],
    "fp8_blockwise": ["run.precision=fp8_blockwise"],
    "fp8_tensorwise": ["run.precision=fp8_tensorwise"],
    "fp8_delayed": ["run.precision=fp8_delayed"],
}
METHODS = {
    "ppo": ["stage2.iterations=0"],
    "grpo": ["stage1.iterations=0", "algorithm=grpo"],
    "ttrl": ["stage1.iterations=0", "algorithm=ttrl"],
    "empo": ["stage1.iterations=0", "algorithm=empo"],
}
FIRST = "qwen3_8b_aime"
ROOM_GB = 120  # added to the GPU's memory for the figures of what does not fit
HEADS = (
    "preset",
    "layout",
    "precision",
    "largest phase",
    "GB",
    "plan off",
    "worst phase of plan",
    "fits",
    "s",
    "host GB",
)


def cases() -> dict[str, list[str]]:
    """The arguments of each case by its name: preset, layout or method, precision."""
    found = {}
    for preset, cluster in CLUSTERS.items():
        base = [f"experiment={preset}", f"cluster={cluster}", "rollout.placement=disaggregated"]
        for layout, words in LAYOUTS.items():
            found[f"{preset} | {layout} | bf16"] = base + words + PRECISIONS["bf16"]
        for precision, words in PRECISIONS.items():
            found[f"{preset} | as shipped | {precision}"] = base + words
        if preset == FIRST:
            for layout, words in LAYOUTS.items():
                for precision, more in PRECISIONS.items():
                    found[f"{preset} | {layout} | {precision}"] = base + words + more
            for method, words in METHODS.items():
                found[f"{preset} | as shipped, {method} | bf16"] = [
                    *base,
                    *_with_classes(method),
                    *words,
                    *PRECISIONS["bf16"],
                ]
    return found


def _with_classes(method: str) -> list[str]:
    """Methods that compare answers need a verifier for the unlabelled questions."""
    return ["data.unlabelled.verifier=math"] if method in ("ttrl", "empo") else []


def rehearsed(words: list[str]) -> dict[str, Any]:
    """The figures of a case."""
    outcome, lines = _run(words)
    fits, failed = outcome.fits, lines
    if not fits:
        size = build(words, purpose=Purpose.rehearse).cluster
        assert size is not None
        outcome, more = _run([*words, f"cluster.memory_gb={size.memory_gb + ROOM_GB:g}"])
        failed = failed if outcome.fits else [*failed, *more]
    phases = [phase for rank in outcome.ranks for phase in rank.phases]
    figures: dict[str, Any] = {
        "fits": fits,
        "why": failed,
        "seconds": outcome.seconds,
        "rank_seconds": max((rank.cpu_seconds for rank in outcome.ranks), default=0.0),
        "host": max((rank.host for rank in outcome.ranks), default=0),
    }
    known = [phase for phase in phases if phase.error is not None]
    if known:
        largest, worst = max(known, key=lambda one: one.peak), max(known, key=lambda one: abs(one.error or 0.0))
        figures["largest"] = {"phase": largest.phase, "peak": largest.peak, "error": largest.error}
        figures["worst"] = {"phase": worst.phase, "peak": worst.peak, "error": worst.error}
        figures["phases"] = {
            f"rank {rank.kind.rank} {one.phase}": [one.peak, one.planned]
            for rank in outcome.ranks
            for one in rank.phases
        }
    return figures


def _run(words: list[str]) -> tuple[Outcome, list[str]]:
    outcome, planned = rehearse(build(words, purpose=Purpose.rehearse), Options())
    faults = [outcome.fault, *(rank.fault for rank in outcome.ranks)]
    lines = [f"{one.phase}: {one.kind}: {one.where}: {one.message}" for one in faults if one is not None]
    lines += [line for rank in outcome.ranks for line in over(planned, rank)]
    return outcome, lines + [rank.ended for rank in outcome.ranks if rank.ended]


def run(again: str | None, only: str) -> None:
    """Rehearse the cases that have no figures, and keep the figures of each as soon as they are there."""
    for name, words in cases().items():
        results = _read()
        if (name in results and not (again and name.startswith(again))) or only not in ("", name):
            continue
        figures = rehearsed(words)
        RESULTS.write_text(json.dumps(_read() | {name: figures}, indent=1, sort_keys=True) + "\n")
        print(name, {key: figures[key] for key in ("fits", "seconds")}, figures.get("worst"), flush=True)


def _read() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def table() -> str:
    """The table, in the order of the cases."""
    results = _read()
    rows = [list(HEADS), ["---"] * len(HEADS)]
    rows += [list(_row(name, results[name])) for name in cases() if name in results]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(name: str, figures: dict[str, Any]) -> Iterator[str]:
    yield from name.split(" | ")
    largest, worst = figures.get("largest"), figures.get("worst")
    if largest is None or worst is None:
        yield from ("", "", "", "")
    else:
        yield from (largest["phase"], f"{largest['peak'] / GB:.1f}", f"{largest['error']:+.1%}")
        yield f"{worst['phase']} {worst['error']:+.1%}"
    yield "yes" if figures["fits"] else f"no: {_short(figures['why'])}"
    yield f"{figures['rank_seconds']:.0f}"
    yield f"{figures['host'] / GB:.1f}"


def _short(why: list[str]) -> str:
    return why[0].split(" at ")[0].split(":")[0] if why else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("run", "write"))
    parser.add_argument("--again", metavar="NAME", help="also cases that have figures, if their names begin so")
    parser.add_argument("--only", metavar="NAME", default="", help="only the case of this name")
    given = parser.parse_args()
    if given.what == "run":
        run(given.again, given.only)
    else:
        PAGE.write_text(replaced(PAGE, {"tools/rehearsal_table.py": table()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
