"""`megatron-tempo prepare`: converts a public data set, or your own, to a file for a run."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from megatron_tempo.config.benchmarks import BENCHMARKS
from megatron_tempo.config.choices import Verifier
from megatron_tempo.errors import InputError, printable
from megatron_tempo.runtime.folder_lock import FolderLock

CUSTOM = "custom"  # a set that is not one of our benchmarks; data/prepare.py has the same name
HELP = "make a file of questions for a run from a public data set, or from your own (docs/data.md)"
EXAMPLES = (
    "megatron-tempo prepare math500 MATH-500/ --out math500.jsonl",
    "megatron-tempo prepare aime2025 aime_2025/ --out aime2025_questions.jsonl --unlabelled",
    "megatron-tempo prepare custom mine.csv --out mine.jsonl --prompt-field q --answer-field a --verifier text",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [*BENCHMARKS, CUSTOM]
    parser.add_argument("set", choices=names, metavar="SET", help=f"{', '.join(names)} (your own columns)")
    source = "JSON, JSONL, Parquet, CSV or Arrow file, or a folder from Hugging Face; several are joined"
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help=source)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="what to write")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--unlabelled", action="store_true", help="write the questions without their answers")
    parser.add_argument(
        "--split-heldout", type=whole_number, default=0, metavar="N", help="put N questions into FILE_heldout.jsonl"
    )
    parser.add_argument("--seed", type=whole_number, default=0, help="of the held-out questions and of GPQA's options")
    parser.add_argument("--files", metavar="PATTERN", help="which files of a folder, such as 'data/test-*'")
    parser.add_argument("--prompt-field", metavar="COLUMN", help="column of the questions; a.b is b inside of a")
    parser.add_argument("--answer-field", metavar="COLUMN", help="column of the answers")
    parser.add_argument("--id-field", metavar="COLUMN", help="column of the ids")
    parser.add_argument("--verifier", choices=list(Verifier.__members__), help="who judges the answers")


def whole_number(text: str) -> int:
    """A whole number of an option. argparse would quote all of a long one."""
    try:
        return int(text)
    except ValueError:
        shown = text if len(text) <= 40 else f"{text[:40]}... ({len(text)} characters)"
        raise argparse.ArgumentTypeError(f"{shown} is not a whole number that can be read") from None


def run(arguments: argparse.Namespace) -> int:
    """Write the files and print what was kept and dropped. Returns the exit status: 2 if the input is wrong."""
    from megatron_tempo.data.prepare import Order, heldout_path, prepare  # slow imports
    from megatron_tempo.rewards.verifiers import Verifiers

    order = Order(
        name=arguments.set,
        sources=arguments.sources,
        out=arguments.out,
        pattern=arguments.files,
        unlabelled=arguments.unlabelled,
        heldout=arguments.split_heldout,
        seed=arguments.seed,
        prompt_field=arguments.prompt_field,
        answer_field=arguments.answer_field,
        id_field=arguments.id_field,
        verifier=Verifier[arguments.verifier] if arguments.verifier else None,
        force=arguments.force,
    )
    written = [order.out, heldout_path(order.out)] if order.heldout else [order.out]
    try:
        with ExitStack() as stack:
            for path in written:
                lock = FolderLock(path.with_name(path.name + ".lock"), str(path), "prepare", "give another --out")
                stack.enter_context(lock)
            report = prepare(order, stack.enter_context(Verifiers()))
    except (InputError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(printable("\n".join(report.lines(order))))
    return 0
