r"""Converts other spellings of the same mathematics to LaTeX that a parser reads: `4√2` to `4\sqrt{2}`.

All functions are linear in the text, or quadratic with a text of at most `math.ANSWER_CHARS` characters.
"""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ"
_SUBSCRIPTS = "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎"
_PLAIN_SUPERSCRIPTS = str.maketrans(_SUPERSCRIPTS, "0123456789+-=()ni")
_PLAIN_SUBSCRIPTS = str.maketrans(_SUBSCRIPTS, "0123456789+-=()")
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_LOWERED = re.compile(f"[{_SUBSCRIPTS}]+")

_COMMANDS = {
    "π": r"\pi", "Π": r"\Pi", "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "Δ": r"\Delta",
    "ε": r"\epsilon", "θ": r"\theta", "λ": r"\lambda", "μ": r"\mu", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau",
    "φ": r"\phi", "ϕ": r"\phi", "ω": r"\omega", "Ω": r"\Omega", "∞": r"\infty", "≤": r"\le", "≥": r"\ge",
    "⩽": r"\le", "⩾": r"\ge", "≠": r"\ne", "≡": r"\equiv", "∪": r"\cup", "∩": r"\cap", "∈": r"\in", "∅": r"\emptyset",
    "±": r"\pm", "×": r"\times", "⋅": r"\cdot", "·": r"\cdot", "∙": r"\cdot", "÷": "/", "∠": r"\angle",
    "∖": r"\setminus", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}",
    "…": r"\ldots", "⋯": r"\cdots",
}  # fmt: skip
_CHARACTERS = {
    "−": "-", "–": "-", "—": "-", "‐": "-", "‑": "-", "⁄": "/", "∕": "/", "°": r"^\circ ", "º": r"^\circ ",
    "′": "'", "’": "'", "、": ",", "。": ".", "｡": ".", "〈": r"\langle ", "〉": r"\rangle ", "⟨": r"\langle ",
    "⟩": r"\rangle ", "【": "[", "】": "]", "∣": "|", "％": r"\%", "﹪": r"\%", "٪": r"\%",
    **{name: f"{command} " for name, command in _COMMANDS.items()},
    **{chr(0x2460 + i): f"\\textcircled{{{i + 1}}}" for i in range(20)},
}  # fmt: skip
_UNSEEN = re.compile("[\u200b-\u200f\u2060-\u2064\ufeff\u00ad\ufe0e\ufe0f]")
_WIDE = re.compile("[\uff01-\uff5e\u3000]")
_LETTERS = re.compile("[\U0001d400-\U0001d7ff]")
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")
_ROOT = re.compile(r"([√∛∜])\s*(\d+(?:\.\d+)?|\\[A-Za-z]+|[A-Za-z]|(?=[({])|$)")
_INDEX = {"√": "", "∛": "[3]", "∜": "[4]"}
_BARE_ROOT = re.compile(r"(?<![\\A-Za-z])sqrt\s*(?=[({])|(?<![\\A-Za-z])sqrt\s*(\d+|[A-Za-z](?![A-Za-z]))")

_FONT = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|left|right|middle|[bB]ig{1,2}[lr]?)(?![A-Za-z])(?:\s*\.(?!\d))?"
)
_LETTER_FONT = re.compile(  # an upright m may be the metre, an upright i or e is the number
    r"\\(?:math(?:it|bf|sf|tt)|text(?:it|bf)|boldsymbol)\s*\{\s*([A-Za-z])\s*\}|\\(?:mathrm|text|rm)\s*\{\s*([ei])\s*\}"
)
_BLANK = re.compile(r"(?<!\\)\\[,;: ]|\\(?:q?quad|thinspace|enspace)(?![A-Za-z])|\\(?:hspace\*?|h?phantom)\{[^{}]*\}|~")
_THOUSANDS_BLANK = re.compile(r"(?<=\d)(?:\{,\}|,?\\!|,\s*\\!|\\[,;:]|~)\s*(?=\d{3}(?!\d))")
_THOUSANDS_COMMA = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?![\d,])")
_GROUPS = re.compile(r"(?<![\d.])([1-9]\d{0,2})((?: \d{3})+)(?![\d ]*\d)")
_SCRIPT = re.compile(r"([\^_])\s*(-?\d+|[A-Za-z](?![A-Za-z])|\\[A-Za-z]+(?!\s*[{A-Za-z]))")
_POWER_OF_TEN = re.compile(r"(?<![\w.\\])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?!\w)")
_MIXED = re.compile(r"(?<![\d.\w}/])(\d{1,9}) (\d{1,9})/(\d{1,9})(?![\d./])")
_LEADING = re.compile(r"(?:=|\\approx(?![a-z])|\\sim(?![a-z])|\\therefore|\\Rightarrow|≈|\s)+")
_ARGUMENT = re.compile(r"\s*(\\[A-Za-z]+|[A-Za-z0-9])")
_FRACTION = re.compile(r"\\[dtc]?frac(?![a-z])")


def narrow(text: str) -> str:
    """Full-width letters, digits and signs, and mathematical alphabets, as the plain ones; invisible ones removed.

    >>> narrow("答案：（Ｂ）")
    '答案:(B)'
    """
    text = _WIDE.sub(lambda wide: " " if wide[0] == "\u3000" else chr(ord(wide[0]) - 0xFEE0), _UNSEEN.sub("", text))
    return _LETTERS.sub(lambda letter: unicodedata.normalize("NFKC", letter[0]), text)


def latex(text: str) -> str:
    r"""A mathematical answer in one spelling of LaTeX.

    >>> latex("x² + 4√2")
    'x^{2} + 4\\sqrt{2}'
    >>> latex(r"\dfrac \pi 6")
    '\\frac{\\pi}{6}'
    """
    text = _symbols(narrow(text.replace("％", "\\%")))
    text = _FONT.sub("", text)
    text = (
        _LETTER_FONT.sub(lambda letter: letter[1] or letter[2], text)
        .replace(r"\varnothing", r"\emptyset")
        .replace(r"\infin ", r"\infty ")
    )
    text = _THOUSANDS_BLANK.sub("", text)
    text = _BLANK.sub(" ", text.replace(r"\!", ""))
    text = text.replace("**", "^").replace("{,}", ",")
    text = _POWER_OF_TEN.sub(r"\1\\times 10^{\2}", _numbers(text))
    text = _SCRIPT.sub(_braced_script, text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", _without_start(text.strip().removesuffix("\\\\")))
    return " ".join(_fractions(text).split())


def _symbols(text: str) -> str:
    text = _RAISED.sub(lambda raised: f"^{{{raised[0].translate(_PLAIN_SUPERSCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda lowered: f"_{{{lowered[0].translate(_PLAIN_SUBSCRIPTS)}}}", text)
    text = _VULGAR.sub(_vulgar, text)
    text = "".join(_CHARACTERS.get(letter, letter) for letter in text)
    text = _ROOT.sub(lambda root: f"\\sqrt{_INDEX[root[1]]}" + (f"{{{root[2]}}}" if root[2] else ""), text)
    text = _BARE_ROOT.sub(lambda root: "\\sqrt" + (f"{{{root[1]}}}" if root[1] else ""), text)
    return _root_arguments(text)


def _vulgar(letter: re.Match[str]) -> str:
    over, _, under = unicodedata.normalize("NFKC", letter[0]).partition("⁄")
    return f"\\frac{{{over}}}{{{under}}}" if under else over


def _root_arguments(text: str) -> str:
    r"""`\sqrt(...)` as `\sqrt{...}`, the parentheses balanced."""
    start = 0
    while (place := text.find("\\sqrt(", start)) >= 0:
        begin = place + len("\\sqrt")
        end = _closing(text, begin)
        if end is not None:
            text = f"{text[:begin]}{{{text[begin + 1 : end]}}}{text[end + 1 :]}"
        start = begin
    return text


def _closing(text: str, begin: int) -> int | None:
    """The position where the bracket that opens at `begin` closes."""
    opening, closing = text[begin], {"(": ")", "{": "}", "[": "]"}[text[begin]]
    depth = 0
    for place in range(begin, len(text)):
        depth += (text[place] == opening) - (text[place] == closing)
        if depth == 0:
            return place
    return None


def _numbers(text: str) -> str:
    """`1 234` as `1234`, and so is `1,234` if it cannot be two numbers: alone, in braces, or next to an operator."""
    text = _GROUPS.sub(lambda number: number[1] + number[2].replace(" ", ""), text)

    def joined(number: re.Match[str]) -> str:
        before, after = text[: number.start()].rstrip()[-1:], text[number.end() :].lstrip()[:1]
        alone = (not before or before in "{=+-*/^$<>") and (not after or after not in ",;")
        return number[1] + number[2].replace(",", "") if alone else number[0]

    return _THOUSANDS_COMMA.sub(joined, text)


def _without_start(text: str) -> str:
    """The text without a leading equals or approximation sign."""
    start = _LEADING.match(text)
    return text[start.end() :] if start else text


def _braced_script(script: re.Match[str]) -> str:
    return script[0] if script[2] in ("\\frac", "\\sqrt") else f"{script[1]}{{{script[2]}}}"


def _fractions(text: str) -> str:
    r"""Fractions with both arguments in braces, from `\frac12`, `\dfrac \pi 6` or `\frac{1}2`. Inner ones last."""
    parts: list[str] = []
    place = 0
    while fraction := _FRACTION.search(text, place):
        parts += [text[place : fraction.start()], "\\frac"]
        place = fraction.end()
        for _ in range(2):
            argument = _ARGUMENT.match(text, place)
            if argument is not None:
                parts.append(f"{{{argument[1]}}}")
                place = argument.end()
                continue
            begin = place + len(text[place:]) - len(text[place:].lstrip())
            end = _closing(text, begin) if text[begin : begin + 1] == "{" else None
            if end is None:
                break
            parts.append(f"{{{_fractions(text[begin + 1 : end])}}}")
            place = end + 1
    return "".join([*parts, text[place:]])
