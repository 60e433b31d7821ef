r"""Logic grids (ZebraLogic): houses and the attributes of each. A grid is right if every cell is.

The answer is JSON, one object per house: `{"House 1": {"Name": "Eric", "Drink": "tea"}, "House 2": ...}`. The last
grid of the response is read: such an object, possibly as the `"solution"` of a larger one, or a Markdown table whose
first column is the house. Capitals, blanks and underscores make no difference, nor does `House 1` or `1`. A grid is
wrong if a cell is a list, or if a house or an attribute is missing, repeated or unknown.
"""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

from megatron_tempo.errors import InputError
from megatron_tempo.rewards.answers import tail

Grid = frozenset[tuple[str, str, str]]  # (house, attribute, value)

_RULE = re.compile(r"[\s|:-]+")
_BRACE = re.compile(r"\{(?=[ \t\n\r]*[\"}])")  # where an object may begin
# Characters that may be read in vain, for each of the text: objects that do not end may be nested in one another.
_ATTEMPTS = 8


class _Repeated(dict[str, Any]):
    """An object with a key that is there twice, or with such an object in it."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    is_sound = len(found) == len(pairs) and not any(_has_repeated(value) for value in found.values())
    return found if is_sound else _Repeated(found)


def _has_repeated(value: Any) -> bool:
    return isinstance(value, _Repeated) or (isinstance(value, list) and any(map(_has_repeated, value)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read(prompt: str, response: str) -> Grid | None:
    """The last grid of the response, its JSON or its table."""
    text = tail(response)
    grids = [grid for grid in (_last_object(text), _last_table(text)) if grid is not None]
    return max(grids)[1] if grids else None


def gold(prompt: str, answer: str) -> Grid:
    """The grid of an answer. Raises InputError if it is not one."""
    try:
        value = _DECODER.decode(answer)
        if _has_repeated(value):
            raise ValueError("a key is there twice")
        return _grid(value)
    except (ValueError, RecursionError) as error:
        example = '{"House 1": {"Name": "Eric"}, ...}'
        raise InputError(f"the answer {answer[:80]!r} is no grid ({error}); write it as {example}") from error


def _last_object(text: str) -> tuple[int, Grid] | None:
    """Where the last JSON grid ends, and the grid. Other braces in the text are ignored.

    Linear: a text in which too much is read in vain has no further grid.
    """
    last, read, end = None, 0, 0
    while (brace := _BRACE.search(text, end)) and read <= _ATTEMPTS * len(text):
        place = brace.start()
        try:
            value, end = _DECODER.raw_decode(text, place)
        except json.JSONDecodeError as error:
            read, end = read + error.pos - place, place + 1
        except (ValueError, RecursionError):  # a number that is too long, or objects in one another
            read, end = read + len(text) - place, place + 1
        else:
            if _has_repeated(value):
                read, end = read + end - place, place + 1
                continue
            with contextlib.suppress(ValueError):
                last = end, _grid(value.get("solution", value))
    return last


def _last_table(text: str) -> tuple[int, Grid] | None:
    """Where the last Markdown table ends, and its grid, if it is one."""
    place, end, rows = len(text), 0, []
    for line in reversed(text.splitlines(keepends=True)):
        if line.strip().startswith("|"):
            end = end or place
            rows.append([cell.strip(" *`") for cell in line.strip().strip("|").split("|")])
        elif rows:
            break
        place -= len(line)
    rows = [row for row in reversed(rows) if not all(_RULE.fullmatch(cell) for cell in row if cell)]
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        return None
    head, *body = rows
    try:
        return end, _grid(_unique([(row[0], _unique(list(zip(head[1:], row[1:], strict=True)))) for row in body]))
    except ValueError:
        return None


def _grid(value: Any) -> Grid:
    """The cells of an object of objects. Raises ValueError for anything else."""
    if not isinstance(value, dict) or not value:
        raise ValueError("it is no object of houses")
    houses = [(_key(house).removeprefix("house"), cells) for house, cells in value.items()]
    if not all(isinstance(cells, dict) and cells for _, cells in houses):
        raise ValueError("a house is no object of attributes")
    grid = [(house, _key(name), _cell(cell)) for house, cells in houses for name, cell in cells.items()]
    grid = [cell for cell in grid if cell[1] != "house"]
    if len({cell[:2] for cell in grid}) != len(grid) or not grid:
        raise ValueError("a house has an attribute twice, or none")
    return frozenset(grid)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise ValueError("a cell is no text")
    return _key(str(value))


def _key(text: str) -> str:
    return re.sub(r"[\s_]+", "", text).casefold()
