r"""The marks around the number of an answer: a currency, a unit, a per cent or degree sign, a base, `million`.

`split` removes them. A unit is not part of the value, but two units must agree (`agree`): 12 equals 12 cm, but 12 m
does not. Any noun is a unit of what is counted, as in `14 weeks` or `36 \text{ sweaters}`; words with another meaning
(`or`, `not`, `if`, `two`, ...) are not units.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_CURRENCIES = {
    r"\$": "dollar", "$": "dollar", "€": "euro", "£": "pound", "¥": "yen", "₹": "rupee", "₩": "won", r"\euro": "euro",
    r"\pounds": "pound", "usd": "dollar", "us$": "dollar", r"us\$": "dollar", "eur": "euro", "gbp": "pound",
    "rs": "rupee", "rs.": "rupee", "inr": "rupee", "¢": "cent",
}  # fmt: skip
_ALIASES = {
    "metre": "m", "meter": "m", "centimetre": "cm", "centimeter": "cm", "millimetre": "mm", "millimeter": "mm",
    "kilometre": "km", "kilometer": "km", "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd",
    "mile": "mi", "gram": "g", "gramme": "g", "kilogram": "kg", "milligram": "mg",
    "lb": "lb", "lbs": "lb", "ounce": "oz",
    "second": "s", "sec": "s", "minute": "min", "hour": "h", "hr": "h", "yr": "year", "litre": "l", "liter": "l",
    "millilitre": "ml", "milliliter": "ml", "kmh": "km/h", "kph": "km/h", "kmph": "km/h", "mph": "mi/h",
    "buck": "dollar",
    "newton": "n", "joule": "j", "watt": "w", "volt": "v", "kelvin": "k", "hertz": "hz", "people": "person",
    "children": "child", "men": "man", "women": "woman", "am": "am", "pm": "pm", "penny": "cent", "pennies": "cent",
} | _CURRENCIES  # fmt: skip
_SHORT = frozenset(
    re.findall(
        r"\w+",
        "cm mm km kg mg ml dl ft yd mi lb lbs oz hr hrs min mins sec secs mph kph kmh kmph hz khz kw kj ms cc sq cu",
    )
)
_LETTERS = frozenset("mgshl")  # a blank must precede these: 5m is a product
# Words that show that a number has a unit, but not which, and the unit of angles, which needs no name.
_GENERIC = frozenset(f"unit{power}" for power in ("", "^2", "^3")) | {"rad", "radian"}
# Words with another meaning than what is counted. "sec" and "min" are units nevertheless.
_SAYS_MORE = frozenset(
    re.findall(
        r"\w+",
        """
        or and to if for when where not no but is are be mod modulo plus minus times over than then else approx about
        approximately either both with choose factorial squared cubed half halves infinity infinite undefined none
        impossible does exist dne least most more less through base remainder only otherwise unless except near nearly
        zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
        eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion
        trillion dozen pi sqrt sin cos tan cot sec csc log ln exp max min gcd lcm det true false yes odd even i e wrong
        incorrect arcsin arccos arctan sinh cosh tanh lim sup inf alpha beta gamma theta infty as since because so thus
        maybe perhaps any all every each other option answer solution solutions
        """,
    )
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "sixteen": 16}

_HAN_SCALES = {"百": 2, "千": 3, "万": 4, "亿": 8}
_HAN_SAYS_MORE = frozenset(
    "以上下不大小于约至或和与到多少无没非余整左右半成折之一二三四五六七八九十百千万亿零错误对是的模"
)
_HAN_UNITS = {
    "厘米": "cm", "毫米": "mm", "米": "m", "千米": "km", "公里": "km", "克": "g", "千克": "kg", "公斤": "kg",
    "秒": "s", "分钟": "min", "小时": "h", "年": "year", "天": "day", "元": "yuan", "美元": "dollar", "升": "l",
    "毫升": "ml", "个": "", "单位": "", "平方单位": "", "立方单位": "", "弧度": "",
}  # fmt: skip
_HAN = "[\u4e00-\u9fff]"
_HAN_AT_END = re.compile(rf"(?:(?<=[\d)}}$])\s*({_HAN}{{1,12}})|\\text\s*\{{\s*({_HAN}{{1,12}})\s*\}})\s*$")
_INTEGER = re.compile(  # at the end of `2k\pi, k \in \mathbb{Z}`
    r"(?:[,;]?\s*\\text\s*\{[^{}\w]*(?:where|for|with|and)?[^{}\w]*\}|[,;(]|\bwhere|\bfor)\s*"
    r"\(?([a-z])\s*\\in\s*(?:\\mathbb\s*)?\{?([ZN])\}?\s*\)?$"
)
_PERCENT = re.compile(
    r"(?:\\?%|\\text\s*\{\s*(?:\\?%|per ?cent|pct)\s*\}|(?<![A-Za-z])(?:per ?cent|pct))\s*$", re.IGNORECASE
)
_DEGREES = re.compile(
    r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\\text\s*\{\s*deg(?:ree)?s?\s*\}|(?<![A-Za-z])deg(?:ree)?s?)\s*$",
    re.IGNORECASE,
)
_TEMPERATURE = re.compile(
    r"(?:\^\s*\{?\s*\\circ\s*\}?|\\degree|\\text\s*\{\s*degrees? )\s*"
    r"(?:\\(?:text|mathrm)\s*\{\s*)?([CFK])(?:elsius|ahrenheit)?\s*\}?\s*$"
)
_TEXT = re.compile(r"\\(?:text(?:rm|it|bf|normal|sf)?|mbox|hbox|math(?:rm|it|bf|sf)|operatorname|rm)\s*\{([^{}]*)\}")
_TEXT_AT_END = re.compile(_TEXT.pattern + r"\s*(?:\^\s*\{?(-?\d)\}?)?\s*$")
_OVER_AT_END = re.compile(
    r"\\frac\s*\{\s*" + _TEXT.pattern + r"(?:\^\{?\d\}?)?\s*\}\s*\{\s*" + _TEXT.pattern + r"(\^\{?\d\}?)?\s*\}\s*$"
)
_POWER = r"(?:\s*\^\s*\{?([23])\}?)?"
_WORDS_AT_END = re.compile(
    rf"(?<![A-Za-z\\])([A-Za-z€£¥₹₩¢](?:[A-Za-z€£¥₹₩¢ .'-]|/(?=[A-Za-z]))*){_POWER}(/[A-Za-z]+)?{_POWER}\s*$"
)
_CURRENCY = re.compile(
    r"(-?)\s*(?:\\(?:text|mathrm)\s*\{\s*)?(\\\$|US\\?\$|\$|€|£|¥|₹|₩|\\euro(?![a-z])|\\pounds(?![a-z])"
    r"|USD|EUR|GBP|INR|Rs\.?)\s*\}?\s*(?=[\d.(\\-])"
)
_BASE = re.compile(r"([0-9A-Fa-f]*\d[0-9A-Fa-f]*)\s*_\s*\{?\s*(?:\\text\s*\{\s*([a-z]+|\d+)\s*\}|(\d+))\s*\}?$")
_BASE_WORDS = re.compile(r"([0-9A-Fa-f]*\d[0-9A-Fa-f]*)\s*\\text\s*\{\s*\(?\s*(?:in )?base (\d+|[a-z]+)\)?\s*\}$")
_OPEN = re.compile(
    r"(?:[-=+*/^_(\[{,;<>:|&]|\\(?:times|cdot|le|ge|leq|geq|ne|neq|in|pm|cup|cap|approx|equiv|sim|to|frac|sqrt))\s*$"
)


@dataclass(frozen=True, slots=True)
class Marks:
    """The removed marks. `unit`: in a normal form, "" if there is none. `scale`: a power of ten."""

    percent: bool = False
    degrees: bool = False
    unit: str = ""
    scale: int = 0
    base: int = 0  # 0: no base is named

    @property
    def names(self) -> str:
        """The marks that distinguish answers of the same value; "" if there are none."""
        base = f"base {self.base}" if self.base else ""
        return " ".join(filter(None, ("%" * self.percent, "degrees" * self.degrees, base, self.unit)))


def split(text: str) -> tuple[str, Marks]:
    r"""An answer in the spelling of `spelling.latex` without its marks, and the marks.

    >>> split(r"\$14.50")
    ('14.50', Marks(percent=False, degrees=False, unit='dollar', scale=0, base=0))
    >>> split(r"12 \text{ cm}^{2}")[0]
    '12'
    """
    marks = Marks()
    text = _without_stop(text)
    if based := _based(text):
        return based
    if money := _CURRENCY.match(text):
        text, marks = money[1] + text[money.end() :], replace(marks, unit=_CURRENCIES[money[2].lower()])
    for _ in range(3):
        core, marks_now = _split_once(text, marks)
        if core == text or not core or _OPEN.search(core):
            break
        text, marks = _without_stop(core), marks_now
    return text, marks


def agree(one: str, other: str) -> bool:
    """Whether two units may belong to the same answer: one of them is missing, or contains the words of the other.

    >>> agree("cm", ""), agree("cm", "m"), agree("sweater", "wool sweater")
    (True, False, True)
    """
    mine, others = set(one.split()), set(other.split())
    return mine <= others or others <= mine


def _without_stop(text: str) -> str:
    """The text without a final full stop or comma, and without dollars around the whole. `1, 2, ...` keeps its dots."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] == "$" and not text.endswith("\\$"):
        text = text[1:-1].strip()
    if text.endswith(("..", "\\.")):
        return text
    return re.sub(r"(?<!\\)[\s.,;:]+$", "", text)


def _based(text: str) -> tuple[str, Marks] | None:
    match = _BASE.fullmatch(text)
    digits, name = (match[1], match[2] or match[3]) if match else ("", "")
    if not match and (match := _BASE_WORDS.fullmatch(text)):
        digits, name = match[1], match[2]
    base = int(name) if name.isdigit() and len(name) < 3 else _BASES.get(name, 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in digits):
        return None
    return digits, Marks(base=base)


def _split_once(text: str, marks: Marks) -> tuple[str, Marks]:
    if match := _PERCENT.search(text):
        return text[: match.start()].rstrip(), replace(marks, percent=True)
    if match := _TEMPERATURE.search(text):
        return text[: match.start()].rstrip(), replace(marks, unit=f"degree {match[1].lower()}")
    if match := _INTEGER.search(text):
        return text[: match.start()].rstrip(), replace(marks, unit=_joined(f"{match[1]} in {match[2]}", marks.unit))
    if match := _HAN_AT_END.search(text):
        return _split_han(text, match[1] or match[2], text[: match.start()].rstrip(), marks)
    if match := _DEGREES.search(text):
        return text[: match.start()].rstrip(), replace(marks, degrees=True)
    core, words, spaced = _words(text)
    if not words or not core:
        return text, marks
    scale, words = _scaled(words)
    unit = _unit(words, core, spaced=spaced) if words else ""
    if unit is None or (scale and not re.search(r"[\d)}]$", core)):
        return text, marks
    return core, replace(marks, unit=_joined(unit, marks.unit), scale=marks.scale + scale)


def _split_han(text: str, words: str, core: str, marks: Marks) -> tuple[str, Marks]:
    """As `_split_once`, for Chinese words."""
    scale = _HAN_SCALES.get(words[0], 0)
    words = words[1:] if scale else words
    if not set(words).isdisjoint(_HAN_SAYS_MORE):
        return text, marks
    if words == "度":
        return core, replace(marks, degrees=True)
    area = {"平方": "^2", "立方": "^3"}.get(words[:2], "")
    unit = _HAN_UNITS.get(words[2:] if area else words, words[2:] if area else words) + area
    return core, replace(marks, unit=_joined(unit, marks.unit), scale=marks.scale + scale)


def _joined(unit: str, known: str) -> str:
    return unit if known in ("", unit) else f"{unit} {known}".strip()


def _words(text: str) -> tuple[str, str, bool]:
    """The text, the words at its end, and whether they are separated: in `\\text`, or after a blank."""
    if over := _OVER_AT_END.search(text):
        return text[: over.start()].rstrip(), f"{over[1].strip()}/{over[2].strip()}{(over[3] or '').strip('{}')}", True
    core, words = text, ""
    while piece := _TEXT_AT_END.search(core):
        power = f"^{piece[2]}" if piece[2] else ""
        core = core[: piece.start()].rstrip()
        link = " "
        for sign, written in (("/", "/"), ("\\cdot", " ")):
            if core.endswith(sign):
                core, link = core[: -len(sign)].rstrip(), written
        words = f"{link}{piece[1].strip()}{power}{words}" if link == "/" else f" {piece[1].strip()}{power}{words}"
        if not core:
            return text, "", False
    if words:
        return core, words.strip(), True
    bare = _WORDS_AT_END.search(text)
    if bare is None or not re.search(r"(?:[\d)}!]|\\pi)\s*$", text[: bare.start()]):
        return text, "", False
    core = text[: bare.start()]
    words = bare[1].rstrip() + (f"^{bare[2]}" if bare[2] else "") + (bare[3] or "") + (f"^{bare[4]}" if bare[4] else "")
    return core.rstrip(), words, core != core.rstrip()


def _scaled(words: str) -> tuple[int, str]:
    first, _, rest = words.partition(" ")
    scale = _SCALES.get(first.lower(), 0)
    return (scale, rest.strip()) if scale else (0, words)


def _unit(words: str, core: str, *, spaced: bool) -> str | None:
    """The normal form of a unit; "" for one without meaning (`units`); None if the words are not a unit."""
    if not re.fullmatch(r"[A-Za-z€£¥₹₩¢$\\ .'^/\d-]+", words) or not re.search("[A-Za-z€£¥₹₩¢$]", words):
        return None
    written = re.sub(r"\bp\.\s*m\.?", "pm", re.sub(r"\ba\.\s*m\.?", "am", words.lower()))
    plain = re.sub(r"\s+per\s+", "/", " ".join(written.replace("-", " ").split()))
    names = [name.strip(".'") for name in re.split(r"[ /]+", plain)]
    bare = [re.sub(r"\^.*", "", name) for name in names]
    known = [name in _SHORT or name in _ALIASES or name.rstrip("s") in _ALIASES for name in bare]
    if any(name in _SAYS_MORE and not name_known for name, name_known in zip(bare, known, strict=True)):
        return None
    if (
        len(bare) == 1
        and len(bare[0]) == 1
        and not known[0]
        and not (bare[0] in _LETTERS and spaced and core[-1:].isdigit())
    ):
        return None
    if not spaced and not all(known):
        return None
    if all(len(name) < 3 for name in bare) and not all(
        k or name in _LETTERS for k, name in zip(known, bare, strict=True)
    ):
        return None
    return _normal(plain)


def _normal(words: str) -> str:
    words = re.sub(r"\b(?:square|sq\.?)\s+(\S+)", r"\1^2", words)
    words = re.sub(r"\b(?:cubic|cu\.?)\s+(\S+)", r"\1^3", words)
    words = re.sub(r"(\S+)\s+squared", r"\1^2", re.sub(r"(\S+)\s+cubed", r"\1^3", words))

    def name(match: re.Match[str]) -> str:
        word = match[0]
        single = word if word in _ALIASES or len(word) < 4 or word.endswith("ss") else word.removesuffix("s")
        return _ALIASES.get(single, single)

    words = re.sub(r"[^\s/^\d]+", name, words.replace(" .", "").strip(". "))
    return "" if words in _GENERIC else words
