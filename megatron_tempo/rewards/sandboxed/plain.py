"""Values as plain data between a program and its tests: JSON, which carries no behaviour.

Whatever a program returns arrives at the tests as one of Python's own types, created there. So no method of a returned
object, such as `__eq__`, runs where verdicts are made. What is no plain data stays where it is, and a number stands
for it.
"""

from __future__ import annotations

from collections import deque

TYPE_CHECKING = False  # typing's own takes milliseconds to import, and an interpreter starts for each program
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Kept = Callable[[int | str], Any]
    Decoder = Callable[[Any, Kept], Any]

WORD = 2**63  # larger numbers are sent in hexadecimal, which takes linear time to read


def encode(value: Any, keep: Callable[[Any], int | str]) -> Any:
    """The JSON form of a value. `keep`: a number or name for what is no plain data; it may raise TypeError.

    Subclasses become the type that they are derived from: a named tuple a tuple, a Counter a dict.
    """
    if value is None or type(value) in (bool, str, float):
        return value
    if isinstance(value, bool):
        return bool(value)
    if isinstance(value, int):
        number = int(value)
        return number if -WORD < number < WORD else {"int": hex(number)}
    if isinstance(value, str | float):
        return str.__str__(value) if isinstance(value, str) else float(value)
    if isinstance(value, list):
        return [encode(item, keep) for item in value]
    for kind in (tuple, set, frozenset, deque):
        if isinstance(value, kind):
            return {kind.__name__: [encode(item, keep) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, keep), encode(item, keep)] for key, item in value.items()]}
    if isinstance(value, bytes | bytearray):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    home, name = type(value).__module__, type(value).__name__
    if (home, name) in (("decimal", "Decimal"), ("fractions", "Fraction")):
        return {name: str(value)}
    if home == "numpy" and hasattr(value, "tolist"):
        return encode(value.tolist(), keep)
    return {"kept": keep(value)}


def decode(form: Any, kept: Kept) -> Any:
    """The value of a JSON form. `kept`: what stands for a value with a number. Raises ValueError if it is no form."""
    if isinstance(form, list):
        return [decode(item, kept) for item in form]
    if not isinstance(form, dict):
        return form
    try:
        ((name, inner),) = form.items()
        return DECODERS[name](inner, kept)
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError("not the form of a value") from error


def _items(make: Callable[[Any], Any]) -> Decoder:
    return lambda inner, kept: make(decode(item, kept) for item in inner)


def _decimal(inner: str, kept: Kept) -> Any:
    from decimal import Decimal

    return Decimal(inner)


def _fraction(inner: str, kept: Kept) -> Any:
    from fractions import Fraction

    return Fraction(inner)


DECODERS: dict[str, Decoder] = {
    "int": lambda inner, kept: int(inner, 16),
    "tuple": _items(tuple),
    "set": _items(set),
    "frozenset": _items(frozenset),
    "deque": _items(deque),
    "dict": lambda inner, kept: {decode(key, kept): decode(item, kept) for key, item in inner},
    "bytes": lambda inner, kept: bytes.fromhex(inner),
    "bytearray": lambda inner, kept: bytearray.fromhex(inner),
    "complex": lambda inner, kept: complex(*inner),
    "Decimal": _decimal,
    "Fraction": _fraction,
    "kept": lambda inner, kept: kept(inner),
}
