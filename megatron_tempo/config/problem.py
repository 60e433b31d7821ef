"""Problems of a configuration, as messages for the user."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from typing import Any

from megatron_tempo.errors import InputError, printable


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule.

    >>> str(Problem("parallel.tensor", 3, "does not divide the model's 8 heads", "parallel.tensor=2 or 4"))
    "parallel.tensor=3: does not divide the model's 8 heads; fix: parallel.tensor=2 or 4"
    """

    field: str  # path in the tree, as in an override
    value: Any
    wrong: str
    fix: str

    def __str__(self) -> str:
        wrong, fix = _clipped(self.wrong, 1500), _clipped(self.fix, 1500)
        text = f"{_clipped(self.field)}={_clipped(show(self.value))}: {wrong}; fix: {fix}"
        return printable(" ".join(text.split("\n")))


class ConfigErrors(InputError):
    """A configuration with problems: all of them, one per line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n  ".join([f"{count} in the configuration:", *map(str, self.problems)]))


def show(value: Any) -> str:
    """A value in YAML syntax, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"(a whole number of {int(value.bit_length() * math.log10(2)) + 1} digits)"
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(item)}" for key, item in value.items()) + "}"
    return " ".join(str(value).split("\n"))


def as_text(value: Any) -> str:
    """`str(value)`, also of a whole number that Python refuses to format, such as a long hexadecimal one of YAML."""
    return show(value) if isinstance(value, int) and value.bit_length() > _BITS else str(value)


_BITS = 1000  # of whole numbers that are shown; Python refuses to format very long ones
_CHARACTERS = 400  # of fields and values that are shown


def _clipped(text: str, most: int = _CHARACTERS) -> str:
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion: the known words close to `word`, else all of them."""
    known = list(known)
    close = get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(known) or '(there are none)'}"
