"""Cases of a parametrised test, few of which are run each time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def matrix(cases: Iterable[Any], few: Collection[Any]) -> list[Any]:
    """The cases as parameters. Those that are not among `few` get the mark "release" (`make test-release`).

    `few` has each option of the cases at least once. Raises ValueError if it has what is no case.
    """
    cases = list(cases)
    if unknown := [case for case in few if case not in cases]:
        raise ValueError(f"no such cases: {unknown}")
    return [case if case in few else _left_out(case) for case in cases]


def _left_out(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.release)
