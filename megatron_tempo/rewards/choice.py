r"""Multiple choice: the letters of the right options, `B`, or `AD` where two are right.

Read from what the response states last (`answers.statements`): `B`, `(b)`, `B.`, `(B) its text`, `Option B`, several as
`A, D`, `AD` or `(A) and (D)`, and only an option's text if the prompt lists the options one per line, `(A) text`. All
letters that a statement names count, so one that lists options is right only if all of them are.
"""

from __future__ import annotations

import re

from megatron_tempo.errors import InputError
from megatron_tempo.rewards.answers import plain, statements

STATEMENT_CHARS = 2000  # a longer statement is not a choice

_OPTION = re.compile(r"^[ \t]*\(?([A-Z])[).:、][ \t]*(.*)$", re.MULTILINE)
_NOUN = re.compile(r"(?:the )?(?:correct |right )?(?:(?:option|choice|letter)s?|选项)[ \t]*", re.IGNORECASE)
_START = re.compile(r"(?:(?:therefore|thus|hence|so|both)[ ,]+)+", re.IGNORECASE)
_END = re.compile(
    r"\s*(?:\b(?:is|are) (?:both |all |the )?(?:correct|right|best|true)(?: (?:answer|option|choice)s?)?"
    r"|是?(?:正确|对)的?)[.。]?$",
    re.IGNORECASE,
)
_QUOTES = " \"'“”‘’"
_SINGLE = re.compile(r"\(?([A-Za-z])[).:,。]*")
_LABELLED = re.compile(r"\(?([A-Z])(?:\)|\.(?=\s)|[:：、]|\s*[-–—](?=\s))\s*(.*)", re.DOTALL)
_FOLLOWED = re.compile(r"([B-HJ-Z]|A(?=[,;]?\s+(?:because|since|as|for)\b))[,;]?\s+(.*)", re.DOTALL)
_REASON = re.compile(r"\b(?:because|since|not|rather than|instead of)\b", re.IGNORECASE)
_MARKED = re.compile(r"\(([A-Z])\)")
_BARE = re.compile(r"\b([B-HJ-Z])\b")
_BETWEEN = re.compile(r"[\s()\[\],;、/&.]|\b(?:and|or)\b|[和或与及]")


def options(prompt: str) -> dict[str, str]:
    """The last list of options in a prompt, texts by letter; empty if there are fewer than two.

    >>> options("Which?\\n(A) one\\n(B) two\\nGive the letter.")
    {'A': 'one', 'B': 'two'}
    """
    options: dict[str, str] = {}
    for letter, text in _OPTION.findall(prompt):
        if letter == "A":
            options = {"A": text}
        elif options and ord(letter) == ord("A") + len(options):
            options[letter] = text
    return options if len(options) > 1 else {}


def read(prompt: str, response: str) -> frozenset[str] | None:
    """The letters that the response names as its answer."""
    known = options(prompt)
    for statement in statements(response):
        if len(statement) > STATEMENT_CHARS or re.match("not ", statement, re.IGNORECASE):
            return None
        if letters := _letters(_bare(plain(statement)), known):
            return letters if not known or letters <= known.keys() else None
    return None


def gold(prompt: str, answer: str) -> frozenset[str]:
    """The letters of an answer such as `B`, `(B)` or `A, D`. Raises InputError for none, or one that is no option."""
    letters = re.sub(r"[\s(),;]", "", answer)
    if not re.fullmatch("[A-Z]+", letters):
        raise InputError(f"the answer {answer[:80]!r} is no choice; give the option's letter, such as B, or AD for two")
    known = options(prompt)
    if known and not set(letters) <= known.keys():
        raise InputError(f"the answer {answer!r} is not among the options {', '.join(known)}")
    return frozenset(letters)


def _bare(statement: str) -> str:
    """A statement without quotation marks, `therefore` before it and `are correct` after it."""
    full_stop = "." if statement.endswith(".") else ""
    quoted = statement.removesuffix(".").strip(_QUOTES) + full_stop
    return _END.sub("", _START.sub("", quoted, count=1) if _START.match(quoted) else quoted)


def _letters(statement: str, known: dict[str, str]) -> frozenset[str] | None:
    stated_words = _words(statement)
    named = [letter for letter, text in known.items() if stated_words and _words(text) == stated_words]
    single = _SINGLE.fullmatch(statement[noun.end() :] if (noun := _NOUN.match(statement)) else statement)
    if single:
        return frozenset(single[1].upper())
    if len(named) == 1:
        return frozenset(named)
    if noun:
        statement = statement[noun.end() :]
    labelled = _LABELLED.match(statement)
    if labelled and _words(labelled[2]) == _words(known.get(labelled[1], "")) != "":  # its text may look like letters
        return frozenset(labelled[1])
    listed = _BETWEEN.sub("", statement)
    if re.fullmatch("[A-Z]{1,26}", listed) and (len(listed) < len(statement) or "".join(sorted(set(listed))) == listed):
        return frozenset(listed)
    if labelled:
        return frozenset((labelled[1], *_MARKED.findall(labelled[2])))
    if followed := _FOLLOWED.match(statement):
        return frozenset((followed[1], *_BARE.findall(_REASON.split(followed[2], maxsplit=1)[0])))
    return None


def _words(text: str) -> str:
    return " ".join(plain(text).casefold().split()).strip(" .")
