"""Prints the path of a Python that gets the version of Megatron-Core that this one does not.

    python tools/other_python.py    # exit status 1, and the reason, if this machine has none

pyproject.toml has one version for Python 3.11, and one for 3.12 and 3.13. Looks on PATH, then asks pyenv.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

OLDER, NEWER = ("3.11",), ("3.12", "3.13")
SAYS_VERSION = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
SECONDS = 60


def main() -> None:
    own = "{}.{}".format(*sys.version_info)
    wanted = NEWER if own in OLDER else OLDER
    found = other_python(wanted, os.environ)
    if found is None:
        raise SystemExit(f"no Python {' or '.join(wanted)} is on PATH or among pyenv's, besides this {own}")
    print(found)


def other_python(wanted: tuple[str, ...], environment: Mapping[str, str]) -> str | None:
    """The first Python of one of these versions that runs and can make environments."""
    for version, python in candidates(wanted, environment):
        if output([python, "-c", SAYS_VERSION], environment) == version:
            return python
    return None


def candidates(wanted: tuple[str, ...], environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Version and path of what may be such a Python. A shim of pyenv may name a version that is not selected."""
    for version in wanted:
        for folder in environment.get("PATH", "").split(os.pathsep):
            if python := shutil.which(f"python{version}", path=folder):
                yield version, python
    pyenv = shutil.which("pyenv", path=environment.get("PATH", ""))
    if pyenv is None:
        return
    installed = output([pyenv, "versions", "--bare"], environment).split()
    for version in wanted:
        for full in (name for name in installed if name.startswith(f"{version}.")):
            yield version, str(Path(output([pyenv, "prefix", full], environment), "bin/python"))


def output(command: list[str], environment: Mapping[str, str]) -> str:
    """What a command prints; nothing if it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=dict(environment), timeout=SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    main()
