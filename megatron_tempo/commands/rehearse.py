"""`megatron-tempo rehearse`: runs a configuration's GPU program on a GPU that does nothing, and reports what it met."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
            _check_file(name, Path(file))
    print(BANNER, file=sys.stderr)
    with _ended_by_signals():
        outcome, planned = rehearse(config, options)
    if arguments.json is not None:
        replace_file(Path(arguments.json), json.dumps(as_json(outcome, planned), indent=1) + "\n", fsync=False)
    print(printable(report(outcome, planned)))
    if texts := _tracebacks(outcome):
        print(printable(f"tracebacks: {_written(texts, arguments.tracebacks)}"))
    return 0 if outcome.fits else 1


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """On SIGTERM and SIGHUP end as on Ctrl-C, which removes the temporary folder."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP) if _is_main()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_main() -> bool:
    """Whether this thread may handle signals."""
    return threading.current_thread() is threading.main_thread()


def _check_file(name: str, file: Path) -> None:
    """Raises InputError before the work begins, not after it."""
    folder = file.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK) or file.is_dir():
        raise InputError(f"--{name}={file}: give a file in a folder that exists and that you may write to")
    if file.exists() and not _is_own(name, file):
        raise InputError(f"--{name}={file}: this file is not of an earlier rehearsal; give another, or move it away")


def _is_own(name: str, file: Path) -> bool:
    """Whether a rehearsal wrote the file, so that the next one may replace it. An empty file is replaced, too."""
    try:
        text = file.read_text(encoding="utf-8") if file.is_file() else " "
        if not text or name == "tracebacks":
            return not text or text.startswith(_HEAD)
        found = json.loads(text)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() >= {"ranks", "fits", "servers_hold"}


_HEAD = "Tracebacks of a rehearsal\n"


def _tracebacks(outcome: Outcome) -> str:
    faults = [outcome.fault, *(rank.fault for rank in outcome.ranks)]
    texts = [f"{fault.phase}: {fault.kind}\n{fault.traceback}" for fault in faults if fault is not None]
    return "\n".join([_HEAD, *texts]) if texts else ""


def _written(texts: str, file: str | None) -> str:
    if file is None:
        handle, file = tempfile.mkstemp(prefix="megatron-tempo-rehearsal-", suffix=".txt")
        os.close(handle)
    replace_file(Path(file), texts, fsync=False)
    return file
