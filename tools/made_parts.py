"""The parts of a page that a program makes: what stands between `<!-- made by NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

BEGIN, END = "<!-- made by {} -->\n", "<!-- end -->\n"


def replaced(document: Path, parts: Mapping[str, str]) -> str:
    """The page with these parts, by NAME, in place of what it has there. SystemExit where it has no place for one."""
    text = document.read_text(encoding="utf-8")
    for name, made in parts.items():
        before, begin, rest = text.partition(BEGIN.format(name))
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{document} lacks the line {BEGIN.format(name).strip()} or the {END.strip()} behind it")
        text = f"{before}{begin}\n{made}\n{end}{after}"
    return text


def write_or_check(document: Path, parts: Mapping[str, str], what: str) -> int:
    """The command line of a program that makes parts of a page: the exit status."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    check, wanted = parser.parse_args().check, replaced(document, parts)
    if check:
        return int(document.read_text(encoding="utf-8") != wanted)
    document.write_text(wanted, encoding="utf-8")
    return 0
