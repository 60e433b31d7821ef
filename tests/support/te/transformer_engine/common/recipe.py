"""The recipes, by name. TE's are pydantic dataclasses, which pass over what they do not know."""

from __future__ import annotations

from enum import Enum
from typing import Any


class Format(Enum):
    E4M3 = "E4M3"
    HYBRID = "HYBRID"


class Recipe:
    def __init__(self, fp8_format: Format = Format.HYBRID, **given: Any) -> None:
        assert isinstance(fp8_format, Format)
        self.fp8_format = fp8_format
        self.given = given


class DelayedScaling(Recipe):
    pass


class Float8CurrentScaling(Recipe):
    pass


class Float8BlockScaling(Recipe):
    pass


class MXFP8BlockScaling(Recipe):
    pass
