"""Replaces the generated parts of a page: the text between `<!-- made by NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

BEGIN, END = "<!-- made by {} -->\n", "<!-- end -->\n"


def replaced(document: Path, parts: Mapping[str, str]) -> str:
    """The page with its generated parts replaced by these, given by NAME. SystemExit if the page lacks one of them."""
    text = document.read_text(encoding="utf-8")
    for name, made in parts.items():
        before, begin, rest = text.partition(BEGIN.format(name))
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise SystemExit(f"{document} lacks the line {BEGIN.format(name).strip()} or the {END.strip()} after it")
        text = f"{before}{begin}\n{made}\n{end}{after}"
    return text


def write_or_check(document: Path, parts: Mapping[str, str], what: str) -> int:
    """The command line of a program that generates parts of a page. Returns the exit status."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--check", action="store_true", help="compare only: exit status 1 if the page is outdated")
    check, expected = parser.parse_args().check, replaced(document, parts)
    if check:
        return int(document.read_text(encoding="utf-8") != expected)
    document.write_text(expected, encoding="utf-8")
    return 0
