"""`megatron-tempo rehearse`: runs a configuration's GPU program on a GPU that does nothing, and reports what it met."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from megatron_tempo.config.schema import Config
from megatron_tempo.errors import InputError, printable
from megatron_tempo.files import replace_file
from megatron_tempo.rehearsal.lengths import LONGEST, Lengths
from megatron_tempo.rehearsal.outcome import Outcome
from megatron_tempo.rehearsal.rehearse import HOST_GB, SECONDS, Options, rehearse
from megatron_tempo.rehearsal.text import BANNER, as_json, report


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--lengths",
        metavar="LENGTHS",
        default=LONGEST,
        help="lengths of the made-up responses: longest (default), or lognormal:MEAN[,SIGMA] in tokens, cut off at "
        "rollout.max_response_tokens",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="responses of each kind, over all ranks (default: as few as fill the micro-batches)",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file, too")
    parser.add_argument("--tracebacks", metavar="FILE", help="where to write tracebacks (default: a temporary file)")
    parser.add_argument(
        "--host-gb",
        type=float,
        default=HOST_GB,
        metavar="GB",
        help="end a rank that takes more of this machine's memory",
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="S", help="end a rank that takes longer")


def run(config: Config, arguments: argparse.Namespace) -> int:
    """Rehearse a checked configuration and print the report. Returns 0 if it fits and no fault was found, else 1."""
    options = Options(Lengths.parse(arguments.lengths), arguments.rows, arguments.host_gb, arguments.seconds)
    for name in ("json", "tracebacks"):
        if (file := getattr(arguments, name)) is not None:
            _check_folder(name, Path(file))
    print(BANNER, file=sys.stderr)
    outcome, planned = rehearse(config, options)
    if arguments.json is not None:
        replace_file(Path(arguments.json), json.dumps(as_json(outcome, planned), indent=1) + "\n", fsync=False)
    print(printable(report(outcome, planned)))
    if texts := _tracebacks(outcome):
        print(printable(f"tracebacks: {_written(texts, arguments.tracebacks)}"))
    return 0 if outcome.fits else 1


def _check_folder(name: str, file: Path) -> None:
    """Raises InputError before the work begins, not after it."""
    folder = file.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or file.is_dir():
        raise InputError(f"--{name}={file}: give a file in a folder that exists and that you may write to")


def _tracebacks(outcome: Outcome) -> str:
    faults = [outcome.fault, *(rank.fault for rank in outcome.ranks)]
    return "\n".join(f"{fault.phase}: {fault.kind}\n{fault.traceback}" for fault in faults if fault is not None)


def _written(texts: str, file: str | None) -> str:
    if file is None:
        handle, file = tempfile.mkstemp(prefix="megatron-tempo-rehearsal-", suffix=".txt")
        os.close(handle)
    Path(file).write_text(texts)
    return file
