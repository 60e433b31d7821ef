"""Whether two mathematical answers are equal: by spelling, by their values at a few points, or by math-verify.

Only the worker process imports it. It decides how the marks of an answer (`units.Marks`) affect equality:

- Two units must agree; a unit of only one answer is ignored.
- `30%` is 0.3, and 30 too: as the gold answer, or of a gold number above 1 (one of at most 1 may be a fraction).
- `60 degrees` is 60, and pi/3.
- A number with a base is its value, and its digits without the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal

from math_verify import verify
from sympy import Expr, FiniteSet, Float, Integer, Rational, Symbol, pi
from sympy.core.relational import Eq
from sympy.matrices import MatrixBase

from megatron_tempo.rewards import units
from megatron_tempo.rewards.math_reading import Reading, as_tuple, scaled

By = Literal["any", "face", "value"]

POINTS = 3
DIGITS = 30  # of the values that are compared
SAME = Rational(1, 10**20)  # relative difference up to which values are equal
ZERO = Rational(1, 10**40)  # a smaller value may be 0 but for rounding
APART = Rational(1, 10**5)  # relative or absolute difference above which math-verify never takes values as equal


def matches(gold: Reading, response: Reading, by: By = "any") -> bool:
    """Whether a response is right by a gold answer. `by`: how a mark that only one has is read."""
    if gold.text and gold.text == response.text:
        return True
    if gold.words and gold.words == response.words:
        return True
    if by != "value" and bool(gold.marks.base) != bool(response.marks.base) and _digits(gold) == _digits(response):
        return True
    if gold.value is None or response.value is None or not units.agree(gold.marks.unit, response.marks.unit):
        return False
    if not _forms_agree(gold, response):
        return False
    if response.form == "tuple" and isinstance(gold.value, FiniteSet):  # the order matters if either is a tuple
        gold, response = response, gold
    return any(_same(one, other) for one, other in _pairs(gold, response, by))


def points(value: Any) -> list[list[float]] | None:
    """An answer's value at `POINTS` points: [real, imaginary] each. None if it has none, such as a set."""
    if isinstance(value, FiniteSet) and len(value) == 1:  # equals its element
        (value,) = value
    values = _at_points(_scalar(value))
    return None if values is None else [[float(part) for part in at.as_real_imag()] for at in values]


def face_and_value(reading: Reading) -> tuple[Any, Any]:
    """The number in an answer's digits, and its value: 30 and 3/10 for `30%`. They are the same without a mark."""
    return (None, None) if reading.value is None else (_face(reading), _worth(reading))


def _pairs(gold: Reading, response: Reading, by: By) -> Iterator[tuple[Any, Any]]:
    mine, others = _kind(gold), _kind(response)
    if mine == others:
        yield gold.value, response.value
        return
    if all(any(kind) for kind in (mine, others)):
        return
    if by != "value" and (not (response.marks.percent and not gold.marks.percent) or _above_one(gold.value)):
        yield _face(gold), _face(response)
    if by != "face":
        yield _worth(gold), _worth(response)


def _kind(reading: Reading) -> tuple[bool, bool, int]:
    return reading.marks.percent, reading.marks.degrees, reading.marks.base


def _digits(reading: Reading) -> str:
    return (
        reading.text.partition("_")[0].partition("\\")[0].casefold() if reading.marks.base else reading.text.casefold()
    )


def _face(reading: Reading) -> Any:
    """The digits of a number with a base as a decimal number, if they are decimal."""
    return Integer(int(_digits(reading))) if reading.marks.base and _digits(reading).isdecimal() else reading.value


def _worth(reading: Reading) -> Any:
    if reading.marks.percent:
        return scaled(reading.value, Rational(1, 100))
    return scaled(reading.value, pi / 180) if reading.marks.degrees else reading.value


def _above_one(value: Any) -> bool:
    try:
        return bool(abs(_scalar(value).evalf(DIGITS)) > 1)
    except (TypeError, AttributeError):
        return False


def _forms_agree(gold: Reading, response: Reading) -> bool:
    """A set is not a tuple, a matrix can only equal a tuple, and a number in brackets is not a number."""
    matrices = [reading for reading in (gold, response) if isinstance(reading.value, MatrixBase)]
    if len(matrices) == 1:  # a column is a tuple
        return "tuple" in (gold.form, response.form)
    forms = {gold.form, response.form}
    return forms != {"set", "tuple"} and ("bracket" not in forms or len(forms) == 1)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, MatrixBase) != isinstance(other, MatrixBase):
        one, other = as_tuple(one), as_tuple(other)
    mine, others = _scalar(one), _scalar(other)
    own, wanted = _at_points(mine), _at_points(others)
    if own is not None and wanted is not None and not _is_name(mine) and not _is_name(others):
        apart = [_difference(a, b) for a, b in zip(own, wanted, strict=True)]
        if any(difference > APART for difference in apart):
            return False
        # math-verify rounds to six places, where 1.6e-19 and 1.7e-19 are both 0.
        if not (mine.free_symbols or others.free_symbols) and _relative(own[0], wanted[0]) > APART:
            return False
        exact = not mine.has(Float) and not others.has(Float)
        if exact and mine.free_symbols and all(difference < SAME for difference in apart):
            return True
    return bool(verify([one], [other], allow_set_relation_comp=True, timeout_seconds=None))


def _scalar(value: Any) -> Any:
    """The right side of an assignment `x = 4`, as math-verify reads it if the other answer is not an equation."""
    return value.rhs if isinstance(value, Eq) and isinstance(value.lhs, Symbol) else value


def _is_name(value: Any) -> bool:
    """Whether this is a name, which is compared by its letters, not by their values."""
    return isinstance(value, Symbol) or any(len(symbol.name) > 1 for symbol in value.free_symbols)


@lru_cache(maxsize=512)
def _values(value: Any) -> list[Any] | None:
    values = []
    for number in range(POINTS):
        at = value.evalf(DIGITS, subs={symbol: _draw(symbol.name, number) for symbol in value.free_symbols})
        if not at.is_number or not at.is_finite:
            return None
        values.append(at)
    return values


def _at_points(value: Any) -> list[Any] | None:
    if not isinstance(value, Expr) or isinstance(value, MatrixBase):
        return None
    try:
        return _values(value)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception:  # noqa: BLE001 sympy raises any exception
        return None


def _draw(name: str, number: int) -> Rational:
    """A symbol's value at a point, the same for the same name; negative at every second point."""
    place = sum(37 * i + ord(letter) for i, letter in enumerate(name, 1))
    return Rational((-1) ** number * (11 + (place * 13 + number * 101) % 89), 53)


def _difference(one: Any, other: Any) -> Any:
    gap = abs(one - other)
    return gap / max(1, abs(one), abs(other))


def _relative(one: Any, other: Any) -> Any:
    """The difference of two numbers, relative to the larger one; 0 if one is 0 and the other 0 but for rounding."""
    larger = max(abs(one), abs(other))
    is_zero = larger < ZERO and (one == 0 or other == 0)
    return Integer(0) if is_zero or larger == 0 else abs(one - other) / larger
