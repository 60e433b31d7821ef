"""Convert a public data set to a file for runs: python tools/prepare_data.py math500 MATH-500/ --out math500.jsonl

SET is a benchmark or a training set of megatron_tempo/config/benchmarks.py, whose columns are known, or `custom`, for
which you name the columns. SOURCE is a file (JSON, JSONL, Parquet, CSV, Arrow) or a folder from Hugging Face. Several
sources are concatenated. Rows that cannot be used are dropped, and counted by reason. docs/data.md describes each set.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_tempo.config.benchmarks import BENCHMARKS
from megatron_tempo.config.choices import Verifier
from megatron_tempo.data.prepare import CUSTOM, Order, prepare
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.verifiers import Verifiers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=[*BENCHMARKS, CUSTOM], metavar="SET", help=", ".join([*BENCHMARKS, CUSTOM]))
    parser.add_argument("sources", type=Path, nargs="+", metavar="SOURCE", help="a file or a folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="file to write")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument("--unlabelled", action="store_true", help="write the questions without answers")
    parser.add_argument(
        "--split-heldout", type=int, default=0, metavar="N", help="put N questions into FILE_heldout.jsonl"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="selects the held-out questions, and the order of GPQA's options"
    )
    parser.add_argument("--files", metavar="PATTERN", help="which files of a folder, such as 'data/test-*'")
    parser.add_argument("--prompt-field", metavar="COLUMN", help="the column of the questions; a.b means field b of a")
    parser.add_argument("--answer-field", metavar="COLUMN", help="the column of the answers")
    parser.add_argument("--id-field", metavar="COLUMN", help="the column of the ids")
    parser.add_argument("--verifier", choices=list(Verifier.__members__), help="verifier of the answers")
    args = parser.parse_args()

    order = Order(
        name=args.set,
        sources=args.sources,
        out=args.out,
        pattern=args.files,
        unlabelled=args.unlabelled,
        heldout=args.split_heldout,
        seed=args.seed,
        prompt_field=args.prompt_field,
        answer_field=args.answer_field,
        id_field=args.id_field,
        verifier=Verifier[args.verifier] if args.verifier else None,
        force=args.force,
    )
    try:
        with Verifiers() as verifiers:
            report = prepare(order, verifiers)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(report.lines(order)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
