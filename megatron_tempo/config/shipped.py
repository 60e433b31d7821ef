"""The location of the program's files that are not Python: presets, job scripts, the quickstart's example.

A checkout has them in configs/, launch/ and examples/ next to megatron_tempo. setup.py copies them into a wheel as
megatron_tempo/shipped.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
_IN_WHEEL = PACKAGE / "shipped"

# The folder that has configs/, launch/ and examples/quickstart: the checkout, or megatron_tempo/shipped.
REPOSITORY = _IN_WHEEL if _IN_WHEEL.is_dir() else PACKAGE.parent

# Files of presets that are not in the repository, by the command that makes them.
MADE = {"build/logic-dates": "make logic-dates", "build/real-model": "python tools/real_model.py fetch"}


def made_by(path: Path) -> str:
    """The end of a fix for a missing file: the command that makes it. Empty if there is none, as in a wheel."""
    if not (REPOSITORY / "tools").is_dir():
        return ""
    commands = [command for folder, command in MADE.items() if path.is_relative_to(REPOSITORY / folder)]
    return f", or run `{commands[0]}`, which makes it" if commands else ""


def source(repository: Path, name: str) -> Path:
    """The folder `name` of the program's code in `repository`. In a wheel, it is inside the package."""
    return repository / name if name != PACKAGE.name or repository != _IN_WHEEL else PACKAGE
