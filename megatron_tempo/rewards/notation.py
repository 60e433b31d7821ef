r"""Rewrites LaTeX that the parser misreads or does not know: `2(3)` is a product, which it takes as the sum 5.

The text has the spelling of `spelling.latex`. All functions are linear in it.
"""

from __future__ import annotations

import re

_DIGITS = 60  # of a repeating decimal
_REPEATING = re.compile(
    rf"(?<![\d.])(\d{{0,{_DIGITS}}})\.(\d{{0,{_DIGITS}}})\\(?:overline|bar)\s*(?:\{{\s*(\d{{1,{_DIGITS}}})\s*\}}|(\d))"
)
_DOTTED = re.compile(
    rf"(?<![\d.])(\d{{0,{_DIGITS}}})\.(\d{{0,{_DIGITS}}})"
    rf"\\dot\s*\{{?\s*(\d)\s*\}}?(?:(\d{{0,{_DIGITS}}})\\dot\s*\{{?\s*(\d)\s*\}}?)?"
)
_FACTORS = re.compile(r"(?<=\d)\s*(?=\(|\\[dt]?binom(?![A-Za-z]))|(?<=\))\s*(?=[\d(]|\\frac(?![A-Za-z]))")
_ANGLE = re.compile(
    r"(\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{\d\})?\s*[({]?\s*-?)(\d{1,9}(?:\.\d{1,9})?)\s*\^\{?\s*\\circ\s*\}?"
)
_NUMBERS = re.compile(r"\\mathbb\s*([A-Z])|\{\\bf\s+([RZQNC])\}")
_PROBABILITY = re.compile(
    r"(?:P|\\Pr|\\mathbb\{[PE]\}|E)\s*\([^()]*(?:[=<>|]|\\(?:[lg]eq?|mid|cap|cup))[^()]*\)\s*=(?!=)"
)
_PARENTHESISED_UNIT = re.compile(  # `12 (cm)`
    r"(?<=[\d}])(\s*)\((?:\\(?:text|mathrm)\s*\{)?\s*([A-Za-z]{2,}(?:\^\{?\d\}?)?)\s*\}?\)$"
)
_NAMES = {
    "infinity": r"\infty", "+infinity": r"\infty", "positive infinity": r"\infty", "-infinity": r"-\infty",
    "negative infinity": r"-\infty", "all real numbers": r"\mathbb{R}", "all reals": r"\mathbb{R}",
    "the real numbers": r"\mathbb{R}", "all integers": r"\mathbb{Z}",
}  # fmt: skip
_WHOLE_TEXT = re.compile(r"\\(?:text|textrm|mathrm|mbox)\s*\{([^{}]*)\}")


def known(text: str) -> str:
    r"""The same mathematics in LaTeX that the parser reads rightly.

    >>> known("0.1\\overline{6}"), known("2(3)"), known("\\sin 30^{\\circ}")
    ('\\frac{15}{90}', '2\\cdot (3)', '\\sin (30\\pi /180)')
    """
    words = _WHOLE_TEXT.sub(r"\1", text).strip(" .").casefold()
    text = _NAMES.get(words, text)
    text = _REPEATING.sub(lambda number: _fraction(number[1], number[2], number[3] or number[4]), text)
    text = _DOTTED.sub(_dotted, text)
    text = _NUMBERS.sub(lambda letter: f"\\mathbb{{{letter[1] or letter[2]}}}", text)
    text = _ANGLE.sub(r"\1(\2\\pi /180)", text)
    text = _PARENTHESISED_UNIT.sub(r"\1 \\text{\2}", text)
    text = _FACTORS.sub(r"\\cdot ", text)
    return text[assigned.end() :].strip() if (assigned := _PROBABILITY.match(text)) else text


def _dotted(number: re.Match[str]) -> str:
    return _fraction(number[1], number[2], number[3] + (number[4] + number[5] if number[5] else ""))


def _fraction(whole: str, fixed: str, repeated: str) -> str:
    """A repeating decimal as a fraction: `whole.fixed` and then `repeated` for ever."""
    over = int(f"0{whole}{fixed}{repeated}") - int(f"0{whole}{fixed}")
    return f"\\frac{{{over}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"
