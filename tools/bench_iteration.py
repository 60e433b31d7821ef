"""What an iteration costs on the host, at a preset's full size: measured with made-up rollouts, and by laws beyond.

    python tools/bench_iteration.py                              # the paper's iteration: measured, fitted, tables
    python tools/bench_iteration.py --points 1:1/64 4:1 # measure these parts of it, with 1 and 4 ranks
    python tools/bench_iteration.py --record after               # add the result to docs/benchmarks.json and .md
    python tools/bench_iteration.py --page                       # only write docs/benchmarks.md from the .json

Each measurement is `train` itself, in as many gloo processes as ranks: requests over HTTP to a server of made-up
answers, parsing, verification, exchange between ranks, packing, losses, records, dump, seen questions, a checkpoint.
Two things are replaced: the server generates nothing, and the networks' forward passes return constants (the model is
small; its weights, optimizer and checkpoint are real). What model and engine take is the planner's figure.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

from iteration_parts.driver import measure
from iteration_parts.made import Size
from iteration_parts.report import laws_of, planned, result, table, update_page

DOCS = Path(__file__).parents[1] / "docs"


# The laws need three numbers of ranks, and two sizes. 16 ranks share no fewer rows than 1/32 has.
POINTS = ("1:1/64", "2:1/64", "4:1/64", "1:1/16", "4:1/16", "16:1/16")


def _point(word: str) -> tuple[int, float, float]:
    """RANKS:PART or RANKS:PART:MEAN, such as 4:1/16. MEAN: mean tokens of a response before the cut-off."""
    try:
        ranks, share, *rest = word.split(":")
        point = int(ranks), float(Fraction(share)), float(rest[0]) if rest else Size().mean
    except (ValueError, ZeroDivisionError):
        point = 0, 0.0, 0.0
    if point[0] < 1 or not 0 < point[1] <= 1 or not point[2] >= 1:
        raise argparse.ArgumentTypeError(
            f"{word}: give RANKS:PART or RANKS:PART:MEAN, such as 4:1/16, with a part <= 1"
        )
    return point


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Size()
    parser.add_argument("--preset", default=default.preset, help=f"an experiment (default {default.preset})")
    words = f"numbers of processes, each with a part of the preset's prompts (default {' '.join(POINTS)})"
    parser.add_argument(
        "--points",
        nargs="+",
        type=_point,
        default=[_point(word) for word in POINTS],
        metavar="RANKS:PART[:MEAN]",
        help=words,
    )
    words = "the cluster of the planner's figures (default h200x64)"
    parser.add_argument("--cluster", default="h200x64", metavar="PRESET", help=words)
    parser.add_argument("--no-dump", action="store_true", help="with rollout.dump=false")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result")
    words = "add the result to docs/benchmarks.json under this name, and write docs/benchmarks.md"
    parser.add_argument("--record", choices=("before", "after"), help=words)
    parser.add_argument("--page", action="store_true", help="only write docs/benchmarks.md from docs/benchmarks.json")
    return parser


def main(words: list[str] | None = None) -> int:
    given = arguments().parse_args(words)
    if given.page:
        update_page(DOCS)
        return 0
    measured = []
    with tempfile.TemporaryDirectory(prefix="bench_iteration_") as folder:
        for ranks, share, mean in given.points:
            measured.append(measure(Size(given.preset, share, mean, not given.no_dump), ranks, Path(folder)))
            print(f"measured: {measured[-1].line()}", flush=True)
            found = result(measured)
            if given.json is not None:
                given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found, laws_of(found)))
    print(f"\n{planned(given.preset, given.cluster)}")
    if given.record is not None:
        path = DOCS / "benchmarks.json"
        records = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(records | {given.record: found}, indent=1) + "\n")
        update_page(DOCS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
