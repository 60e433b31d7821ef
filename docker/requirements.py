"""Prints the requirements in the working directory's pyproject.toml, one per line: only one project's, or all others.

An image installs torch as a separate layer, or has it already.
"""

from __future__ import annotations

import argparse
import re
import tomllib
from pathlib import Path


def name_of(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--only")
    choice.add_argument("--without")
    args = parser.parse_args()
    for requirement in tomllib.loads(Path("pyproject.toml").read_text())["project"]["dependencies"]:
        if (name_of(requirement) == args.only) if args.only else (name_of(requirement) != args.without):
            print(requirement)


if __name__ == "__main__":
    main()
