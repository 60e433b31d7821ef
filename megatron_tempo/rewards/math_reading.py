r"""Mathematical answers as sympy values, by math-verify's parser. Only the worker process imports it.

A statement (`stated`) that is a box or names its answer is read completely or not at all: the last number in
`\boxed{x \mid 6}` is not an answer. Its spelling is normalised (`spelling.latex`) and its marks are removed
(`units.split`) first. In a statement in prose, math-verify searches for an answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from latex2sympy2_extended.latex2sympy2 import latex2sympy, normalize_latex
from latex2sympy2_extended.sets import FiniteSet
from math_verify import LatexExtractionConfig, parse
from math_verify.grader import should_treat_as_complex
from sympy import And, Eq, Integer, Tuple, Union
from sympy.core.relational import Relational
from sympy.matrices import MatrixBase

from megatron_tempo.rewards import units
from megatron_tempo.rewards.math import ANSWER_CHARS
from megatron_tempo.rewards.notation import known
from megatron_tempo.rewards.spelling import latex, narrow
from megatron_tempo.rewards.statement import Statement
from megatron_tempo.rewards.units import Marks

NORMALIZATION = replace(LatexExtractionConfig().normalization_config, boxed="none", units=False)

_COMMAND = re.compile(r"\\[A-Za-z]+")
_TEXT = re.compile(r"\\(?:text(?:rm|it|bf|normal|sf)?|mbox|hbox|math(?:rm|it|bf|sf)|operatorname)\s*\{([^{}]*)\}")
_NESTED_TEXT = re.compile(r"\\(?:text(?:rm|it|bf)?|mbox|math(?:rm|it|bf))\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_AND = re.compile(r"\s*,?\s*(?:\\text\s*\{\s*(?:and|or)\s*,?\s*\}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z]))\s*")
_OR = re.compile(r"(?<![A-Za-z\\])or(?![A-Za-z])|\\(?:lor|vee)(?![A-Za-z])")
_PROSE = re.compile(r"[A-Za-z]{4,}")
_FUNCTIONS = frozenset(["sqrt", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan", "frac", "text", "operatorname"])
_NO_VALUE = re.compile(  # dots, two numbers next to each other, words and signs that the parser misreads
    r"\.\.|\\[lc]?dots\b|\\vdots|\d\s+\.?\d|\\(?:p?mod|bmod|textcircled|mid|nmid|equiv|not)(?![A-Za-z])|(?<![A-Za-z])mod(?![A-Za-z])"
)
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-zA-Z*]*\}(?:\{[^{}]*\})?")
_ANGLES = re.compile(r"\\langle(.*)\\rangle", re.DOTALL)
_WRAPPERS = (("\\boxed{", "}"), ("\\fbox{", "}"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_WORDS = re.compile(r"\([^\W\d_]\)|[^\W\d_]+(?:(?:[ .,'()]+|(?<=[^\W\d_]{2})-(?=[^\W\d_]{2}))[^\W\d_]+)*[.)]?")


UNMARKED = Marks()


@dataclass(frozen=True)
class Reading:
    """An answer. `text`: its spelling without blanks, by which it is compared with answers that cannot be parsed.

    `value`: None if it cannot be parsed. `form`: "set", "tuple", "bracket", or "" for the rest. `words`: those of an
    answer that consists only of words, in lower case.
    """

    text: str
    value: Any
    form: str = ""
    marks: Marks = UNMARKED
    words: str = ""

    @property
    def empty(self) -> bool:
        return self.value is None and not self.text


@lru_cache(maxsize=512)
def read(statement: Statement) -> Reading:
    """The answer of a statement; `empty` if there is none."""
    if statement.whole:
        return read_whole(statement.text)
    bare = statement.text.strip("*_ ")
    if len(bare) <= ANSWER_CHARS and not _is_prose(bare):
        answer = read_whole(bare)
        # A last line that is not marked as the answer may be a step: math-verify takes its result.
        if statement.marked or (answer.value is not None and "=" not in bare):
            return answer
    return _searched(statement.context)


def read_whole(text: str) -> Reading:
    """The whole `text` as an answer, which may be boxed, in dollars, or bare."""
    spelled = known(latex(_unwrapped(text.strip())))
    if (whole := _TEXT.fullmatch(spelled)) and re.search(r"\d", spelled):
        spelled = whole[1].strip()
    core, marks = units.split(spelled)
    if parts := _elements(core):
        core, marks = _common_marks(parts, core, marks)
    core = _unwrapped(core)
    if match := _ANGLES.fullmatch(core):
        core = f"({match[1]})"
    words = _words_of(core)
    value = None if _is_word(words) else _value(core, marks)
    if _OR.search(core):
        value = _either(value)
    return Reading(_squeezed(spelled), value, _form(core), marks, words)


def _searched(context: str) -> Reading:
    """The answer that math-verify finds in prose."""
    parsed = parse(narrow(context), parsing_timeout=None)
    values = [value for value in parsed if not isinstance(value, str)]
    texts = [value for value in parsed if isinstance(value, str)]
    return Reading(_squeezed(texts[0]) if texts else "", values[0] if values else None)


def _unwrapped(text: str) -> str:
    r"""The text without `\boxed{}`, dollars or `\(...\)` around the whole."""
    for _ in range(4):
        for begin, end in _WRAPPERS:
            inner = text[len(begin) : len(text) - len(end)]
            if len(text) > len(begin) and text.startswith(begin) and text.endswith(end) and _is_one(inner, begin, end):
                text = inner.strip()
                break
        else:
            return text
    return text


def _is_one(inner: str, begin: str, end: str) -> bool:
    """Whether the `begin` before `inner` and the `end` after it belong together."""
    if end != "}":
        return begin not in inner and end not in inner and not inner.endswith("\\")
    depth = 0
    for letter in re.sub(r"\\[{}]", "", inner):
        depth += (letter == "{") - (letter == "}")
        if depth < 0:
            return False
    return depth == 0


def _elements(core: str) -> list[str]:
    """The parts of a bare list, `3, 4 and 5`; empty if it is not a list."""
    text = _AND.sub(",", core)
    depth, parts, start = 0, [], 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter in ",;" and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]] if parts else []


def _common_marks(parts: list[str], core: str, marks: Marks) -> tuple[str, Marks]:
    """A list without the marks of its elements, if all have the same marks or only the last one has any."""
    split = [units.split(part.strip()) for part in parts]
    distinct = {mark for _, mark in split if mark != UNMARKED}
    if not distinct:
        return core, marks
    (only, *others) = distinct
    if others or marks not in (UNMARKED, only) or any(not part for part, _ in split):
        return core, marks
    if marks == UNMARKED and any(mark == UNMARKED for _, mark in split):  # in `5 cm, 6` the unit of 6 is unknown
        return core, marks
    return ", ".join(part for part, _ in split), only


def _form(core: str) -> str:
    if core.startswith("\\{") and core.endswith("\\}"):
        return "set"
    if core[:1] in ("(", "[") and _outer(core):
        inside = core[1:-1]
        several = bool(_elements(inside))
        if core[0] == "(" and core[-1] == ")":
            return "tuple" if several else ""
        return "interval" if several else "bracket"
    return ""


def _outer(core: str) -> bool:
    """Whether the bracket at the start closes at the end; `(3, 4]` does."""
    depth = 0
    for place, letter in enumerate(core):
        depth += (letter in "([") - (letter in ")]")
        if depth == 0:
            return place == len(core) - 1
    return False


def _words_of(core: str) -> str:
    """The words of an answer that consists only of words, else ""."""
    plain = " ".join(_TEXT.sub(r" \1 ", core).replace("\\ ", " ").split())
    return plain.casefold().strip("(). ") if _WORDS.fullmatch(plain) else ""


def _is_word(words: str) -> bool:
    """Whether these are words, not a product: `xyz` and `abcd` are products, by the order of their letters."""
    return " " in words or (len(words) > 2 and "".join(sorted(words)) != words)


def _is_prose(text: str) -> bool:
    """Whether there are words besides LaTeX's commands."""
    bare = _COMMAND.sub(" ", _TEXT.sub(" ", text))
    return any(word.lower() not in _FUNCTIONS for word in _PROSE.findall(bare)) or bool(
        re.search(r"(?<![A-Za-z])(?:the|is|are|of|in|so|we|it|by|to|at|as|if|not|no)(?![A-Za-z])", bare, re.IGNORECASE)
    )


def _value(core: str, marks: Marks) -> Any:
    """The value of an answer without its marks; None if it has no certain value."""
    if marks.base:
        return Integer(int(core, marks.base))
    if not core or len(core) > ANSWER_CHARS or _unreadable(core):
        return None
    normal = normalize_latex(core, config=NORMALIZATION)
    try:
        value = latex2sympy(
            normal, is_real=not should_treat_as_complex(normal), convert_degrees=False, normalization_config=None
        )
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception:  # noqa: BLE001 the parser raises any exception, plain Exception for a wrong sign
        return None
    return scaled(value, Integer(10) ** marks.scale) if marks.scale else value


def _unreadable(core: str) -> bool:
    bare = _ENVIRONMENT.sub(" ", _TEXT.sub(" x ", core))
    if _NO_VALUE.search(bare):
        return True
    words = _PROSE.findall(_COMMAND.sub(" ", bare))
    return any(word.lower() not in _FUNCTIONS and "".join(sorted(word)) != word for word in words)


def scaled(value: Any, factor: Any) -> Any:
    """`value` times a factor: of an equation its right side, of a list or tuple each element."""
    if isinstance(value, Eq):
        return Eq(value.lhs, value.rhs * factor, evaluate=False)
    if isinstance(value, FiniteSet):
        return FiniteSet(*(scaled(element, factor) for element in value.args))
    if isinstance(value, Tuple):
        return Tuple(*(scaled(element, factor) for element in value.args))
    return value * factor


def _either(value: Any) -> Any:
    """Inequalities joined by `or`, each of one variable and numbers, as the set of their solutions; else unchanged."""
    if not isinstance(value, FiniteSet) or len(value.args) < 2 or len(value.free_symbols) != 1:
        return value
    simple = [part for whole in value.args for part in (whole.args if isinstance(whole, And) else (whole,))]
    if any(not isinstance(part, Relational) or not (part.lhs.is_Symbol or part.rhs.is_Symbol) for part in simple):
        return value
    if all(isinstance(part, Eq) for part in simple):
        return value
    return Union(*(part.as_set() for part in value.args))


def as_tuple(value: Any) -> Any:
    """A matrix of one row or column as a tuple, anything else unchanged."""
    return Tuple(*value.flat()) if isinstance(value, MatrixBase) and min(value.shape) == 1 else value


def _squeezed(text: str) -> str:
    plain = _NESTED_TEXT.sub(r"\1", text)
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", plain).removesuffix(".")  # `5 6` is not 56
