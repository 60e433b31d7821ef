"""Checks of the entries of a config.json. What is wrong is an InputError that names the field."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_tempo.errors import InputError


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(field: str, value: Any) -> float:
    if not is_number(value) or value <= 0:
        raise InputError(f"{field}={json.dumps(value)} must be a number above 0")
    return float(value)


def of_kind(field: str, value: Any, kind: type) -> Any:
    words = {dict: "an object", list: "a list", bool: "true or false"}
    if not isinstance(value, kind):
        raise InputError(f"{field}={json.dumps(value)} must be {words[kind]}")
    return value


def expect(field: str, value: object, known: object) -> None:
    if value != known:
        raise unsupported(field, value, known)


def unsupported(field: str, value: object, known: object) -> InputError:
    return InputError(f"{field}={json.dumps(value)} is not supported. Supported: {json.dumps(known)}")
