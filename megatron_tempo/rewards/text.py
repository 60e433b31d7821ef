r"""Short answers: a word, a number, or a list of them, as in most tasks of BIG-Bench Hard.

The whole last statement of the response is read (`answers.statements`). Capitals, the full stop at the end, LaTeX and
Markdown markup, and the separators of a list (blanks, commas, semicolons) make no difference; the order does. Numbers
are equal by value (`1,000` is `1000.0`), rows of brackets independently of blanks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable
from decimal import Decimal

from megatron_tempo.errors import InputError
from megatron_tempo.rewards.answers import plain, statements

ANSWER_CHARS = 2000  # a longer statement is not a short answer

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d{1,60})(?:\.\d{1,60})?|[+-]?\.\d{1,60}", re.ASCII)
_SIGNS = str.maketrans("−–‐‑’‘ʼ“”", "----'''\"\"")
_BRACKETS = re.compile(r"[()\[\]{}<>]+")


def read(prompt: str, response: str) -> Hashable | None:
    """The response's answer, in the form in which answers are compared."""
    return next((form for form in map(_form, statements(response)) if form is not None), None)


def gold(prompt: str, answer: str) -> Hashable:
    """The same form of the right answer. Raises InputError if it is not short, or has nothing to compare."""
    form = _form(answer)
    if form is None:
        raise InputError(f"the answer {answer[:80]!r} is no short text; give words or a number, {ANSWER_CHARS} at most")
    return form


def _form(text: str) -> Hashable | None:
    if len(text) > ANSWER_CHARS:
        return None
    text = unicodedata.normalize("NFKC", plain(text)).translate(_SIGNS).strip(" \t\n\"'*_:;,!")
    text = text.removesuffix(".").rstrip()
    brackets = "".join(text.split())
    if _BRACKETS.fullmatch(brackets):
        return ("brackets", brackets)
    if _NUMBER.fullmatch(text):
        return ("number", Decimal(text.replace(",", "")))
    return tuple(re.findall(r"[^\s,;]+", text.casefold())) or None
