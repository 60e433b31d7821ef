"""The command line of the fuzzer: `python -m tests.fuzz --help`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.fuzz.cases import KINDS, maker
from tests.fuzz.judge import Limits, faults

# What commands import late. A case is a fork of this process, and need not import them again.
_PRELOADED = (
    *("data.copies", "data.prepare", "rewards.verifiers", "report.results", "report.comparison", "report.html"),
    *("plan.picture",),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 without a fault, 1 with one."""
    arguments = _parse(argv)
    for name in _PRELOADED:
        importlib.import_module(f"megatron_tempo.{name}")
    importlib.import_module("pyarrow.parquet")
    return fuzz(arguments)


def fuzz(arguments: argparse.Namespace) -> int:
    """Try cases until the time is over. Prints each fault, and how to repeat its case alone."""
    kinds, limits = arguments.kind or list(KINDS), Limits()
    print(f"fuzz: seed {arguments.seed}, {arguments.seconds} s, {', '.join(kinds)}", flush=True)
    end, done, bad = time.monotonic() + arguments.seconds, Counter[str](), Counter[str]()
    seed = arguments.seed
    while done.total() < arguments.cases and time.monotonic() < end:
        kind = kinds[seed % len(kinds)]
        problems = faults(maker(kind, seed), limits, arguments.keep)
        done[kind] += 1
        for fault in problems:
            bad[kind] += 1
            print(f"\nFAULT of {kind}, seed {seed}: {fault}")
        if problems:
            print(f"  repeat it: python -m tests.fuzz --kind {kind} --seed {seed} --cases 1", flush=True)
        seed += 1
    counts = ", ".join(f"{kind} {done[kind]}" for kind in kinds)
    print(f"fuzz: {done.total()} cases ({counts}), {bad.total()} faults, seeds {arguments.seed} to {seed - 1}")
    return 1 if bad else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=sys.modules["tests.fuzz"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to try (default: 60)")
    parser.add_argument("--seed", type=int, default=None, help="of the first case; each later one has the next")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="only this kind; may be given again")
    parser.add_argument("--cases", type=int, default=1 << 62, help="how many to try at most")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files of the last case in DIR")
    arguments = parser.parse_args(argv)
    if arguments.seed is None:
        arguments.seed = int(time.time()) % 1_000_000_000
    return arguments


if __name__ == "__main__":
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    sys.exit(main())
