r"""Keys of questions: different for different questions, and one for all typesettings of the same question.

`exact_key` is of the unchanged text, with runs of blanks counted as one. `matching_key` is of letters, digits and
operators only: LaTeX or plain text, `\dfrac{m}{n}` or `\frac mn`, `$9$-kilometer` or `9-kilometer`, upper or lower
case, Markdown, HTML, full width and typographic quotes make no difference. Numbers stay apart: `4 8` is not `48`.
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata
from collections.abc import Sequence

_TAGS = re.compile(r"</?(?:p|br|b|i|em|strong|sub|sup|span|div|u|li|ul|ol|code|pre)\b[^<>]*>", re.IGNORECASE)
# Typesetting without meaning, and symbols whose Unicode character is not a letter. Braces keep their content.
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[^{}]*\}|\\(?:vspace|hspace)\*?\{[^{}]*\}|\\[,;:!> ]")
_FORMATTING = re.compile(
    r"\\(?:left|right|[bB]igg?[lr]?|text\w*|math(?:rm|bf|it|cal|bb|sf|tt|scr|frak)|operatorname\*?|displaystyle|mbox"
    r"|hbox|limits|quad|qquad|boldsymbol|item|noindent|par|emph|underline|ensuremath|frac|dfrac|tfrac|cfrac|circ|degree"
    r"|angle|triangle|dots|[lcvd]dots|dots[bcimo]|overline|bar|vec|hat|widehat|setminus|in|notin|to|rightarrow|mid"
    r"|parallel|perp|equiv|cong|sim|approx|propto|subset|subseteq|forall|exists|neg|lnot|land|lor|wedge|vee|oplus"
    r"|otimes|langle|rangle|lfloor|rfloor|lceil|rceil|lvert|rvert|vert|lVert|rVert|Vert|lbrace|rbrace|prime|star"
    r"|bullet|mapsto|implies|iff|Rightarrow|Leftrightarrow|leftarrow|partial|nabla|cdot|times|ast|div)(?![A-Za-z])"
)
_NUMBER_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_THOUSANDS = re.compile(r"(?<=\d)(?:,|\{,\}|\\,|\\!|,\\!|[\u202f\u2009\u00a0])(?=\d{3}(?!\d))")
_OPERATOR = re.compile(
    r"\\(?:(?P<times>cdot|times|ast)|(?P<over>div)|(?P<unequal>neq?)|(?P<less>leqslant|leq|le|lt)"
    r"|(?P<more>geqslant|geq|ge|gt))(?![A-Za-z])"
)
_OPERATORS = {"times": "*", "over": "/", "unequal": "<>", "less": "<", "more": ">"}
_SPELLINGS = {"!=": "<>", "<=": "<", ">=": ">", "---": " ", "--": "-", "**": " "}
_CHARACTERS = dict.fromkeys("×·⋅∗∙", "*") | dict.fromkeys("÷⁄∕", "/") | dict.fromkeys("≤⩽", "<")
_CHARACTERS |= dict.fromkeys("≥⩾", ">") | dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-") | {"≠": "<>"}
_COMMAND = re.compile(r"\\(?=[A-Za-z])")
_SCRIPTS = re.compile("([⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉]+)")
# Multiplication and division count between numbers: ab is also a*b, and m/n also \frac{m}{n}.
_PRODUCT = re.compile(r"[*/](?<=\d.)(?=\d)")
# A minus counts between operands: numbers, single letters, parentheses. Elsewhere it is a hyphen or a dash.
_MINUS = re.compile(r"-(?<=[\w)]-)(?<![^\W\d_]{2}-)(?=\d|\(|[^\W\d_](?![^\W\d_]))")
_SIGN = re.compile(r"-(?<![\w)]-)(?=\d)")
_TOKEN = re.compile(r"\d+|[^\W\d_]+|[+<>=\ue000-\ue002]")
_NOISE = re.compile(r"[^\w+<>=\ue000-\ue002]+|_+")
_NEEDLESS = re.compile(r" (?:(?!\d)|(?<!\d ))")  # but between two numbers
_KEPT = {"-": "\ue000", "*": "\ue001", "/": "\ue002"}  # marks of operators that count
_SYMBOLS = {"√": "sqrt", "∪": "cup", "∩": "cap", "∑": "sum", "∏": "prod", "∫": "int", "∞": "infty", "±": "pm"}


def exact_key(texts: Sequence[str]) -> str:
    """32 hexadecimal digits of a hash of a question's texts, runs of blanks counted as one. The same in every version.

    A question in chat messages has one text per message.
    """
    return _digest("\n".join(" ".join(text.split()) for text in texts))


def matching_key(text: str) -> str:
    r"""32 hexadecimal digits that a question has in common with its other typesettings.

    >>> matching_key(r"Find $\frac{m}{n}$ for a $9$-kilometer walk.") == matching_key("find m/n for a 9-kilometer walk")
    True
    """
    return _digest(_NEEDLESS.sub("", _NOISE.sub(" ", _plain(text))))


def tokens(text: str) -> list[str]:
    """The words, numbers and operators of a question, in lower case and without typesetting."""
    return _TOKEN.findall(_plain(text))


def _plain(text: str) -> str:
    """The text without typesetting. Every step takes time linear in the text's length."""
    text = _TAGS.sub(" ", html.unescape(_without_drawings(text)))
    if not text.isascii():  # scripts before NFKC: 2¹⁰ is two numbers
        text = unicodedata.normalize("NFKC", _SCRIPTS.sub(r" \1 ", text))
    text = _NUMBER_FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]} ", _THOUSANDS.sub("", text))
    if "\\" in text:
        text = _OPERATOR.sub(lambda m: _OPERATORS[str(m.lastgroup)], text)
        text = _COMMAND.sub(" ", _FORMATTING.sub(" ", _ENVIRONMENT.sub(" ", text)))
    for spelling, meant in _SPELLINGS.items():
        text = text.replace(spelling, meant)
    text = " ".join(text.translate(_REPLACED).split())
    text = _SIGN.sub(_KEPT["-"], text)
    for sign in _KEPT:
        text = text.replace(f" {sign}", sign).replace(f"{sign} ", sign)
    text = _MINUS.sub(_KEPT["-"], _PRODUCT.sub(lambda m: _KEPT[m[0]], text)).casefold()
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


def _without_drawings(text: str) -> str:
    """The text without Asymptote code, which some copies of a problem have and others lack."""
    first, *others = text.split("[asy]")
    return " ".join([first, *(other.partition("[/asy]")[2] or other for other in others)])


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _replaced() -> dict[int, str]:
    """Replacements: Greek letters and symbols by their LaTeX names, π as pi; typesetting marks by a blank."""
    letters = {code: unicodedata.name(chr(code), "") for code in range(0x391, 0x3CA)}
    named = {code: name.rpartition(" ")[2].lower() for code, name in letters.items() if " LETTER " in name}
    named |= {ord(symbol): name for symbol, name in _SYMBOLS.items()}
    return (
        {ord(mark): " " for mark in "${}~`\\^_#&"}
        | {ord(c): sign for c, sign in _CHARACTERS.items()}
        | {code: f" {name} " for code, name in named.items()}
    )


_REPLACED = _replaced()
