"""The tables of docs/configuration.md are what the dataclasses say, and every field says something."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType

import pytest

from megatron_tempo.config.schema import Config
from megatron_tempo.config.tree import field_paths
from tests.support.tools import load_tool


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_tool("configuration_page", monkeypatch)


def test_the_page_is_current(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    text, replaced = tool.DOCUMENT.read_text(encoding="utf-8"), load_tool("made_parts", monkeypatch).replaced
    wanted = replaced(tool.DOCUMENT, tool.parts())
    assert text == wanted, "it is not what the dataclasses and presets say: make configuration-page"


def test_every_field_and_group_says_what_it_is(tool: ModuleType) -> None:
    silent = []
    for group in tool.groups():
        name = group.kind.__name__
        silent += [] if tool.docstring_of(group.kind) else [f"{name} has no docstring"]
        silent += [f"{name}: {row[0]} has no comment" for row in group.rows() if not re.match(r"[A-Z`]", row[3])]
        silent += [f"{name}: {row[0]}, an empty cell" for row in group.rows() if not all(row)]
    assert silent == []


def test_every_field_is_told(tool: ModuleType) -> None:
    documented = set()
    for group in tool.groups():
        for path, *_ in group.rows():
            documented |= {f"{place}.{path.strip('`').rpartition('.')[2]}" for place in group.by_path}
    whole = {"data.labelled", "data.unlabelled", "evaluation.sets"}  # rows that refer to a group of their own
    assert documented - whole == {path.removesuffix(".NAME") for path in field_paths(Config)}


def test_tables_and_links_hold(tool: ModuleType) -> None:
    text = tool.presets() + "\n" + tool.fields()
    for rows in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}
        assert len(widths) == 1, rows
    titles = re.findall(r"### (.*)", text)
    headings = {re.sub(r"[^a-z_ -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\(#(.*?)\)", text)) <= headings
    pages = {path.name for path in tool.DOCUMENT.parent.iterdir()}
    assert set(re.findall(r"\]\((\w+\.md)\)", text)) <= pages


class Colour(Enum):
    """Which colour it has."""

    red = "red"
    green = "green"
    blue = "blue"  # as the sky | the sea


@dataclass(slots=True)
class PaintConfig:
    """What is put on, docs/data.md.

    Not told.
    """

    colour: Colour = Colour.red
    # nats, and
    # more
    amount: float = 5e-7  # of a < b
    tins: list[int] | None = field(
        default_factory=list,  # by size
    )
    name: str = "???"
    silent: bool = True


@dataclass(slots=True)
class HouseConfig:
    roof: PaintConfig = field(default_factory=lambda: PaintConfig(amount=2.0))
    wall: PaintConfig = field(default_factory=PaintConfig)
    others: dict[str, PaintConfig] = field(default_factory=dict)  # by room


@dataclass(slots=True)
class Tree:
    house: HouseConfig = field(default_factory=HouseConfig)


def test_what_a_dataclass_says(tool: ModuleType) -> None:
    house, paint = tool.groups(Tree)
    assert (house.title, house.roots) == ("`house`", ["house"])
    assert list(house.rows()) == [("`house.others`", "[paint](#paint)s by name", "none", "By room")]
    assert (paint.title, paint.roots) == ("Paint", ["house.roof", "house.wall", "house.others.NAME"])
    assert tool.docstring_of(PaintConfig) == "What is put on, docs/data.md."
    assert list(paint.rows()) == [
        ("`.colour`", "choice", "`red`", r"Which colour it has<br>`red`, `green`<br>`blue`: as the sky \| the sea"),
        ("`.amount`", "number", "`2` in `roof`, `5e-7` in `wall`, `5e-7` in `others`", r"Nats, and more of a \< b"),
        ("`.tins`", "list of whole numbers or none", "`[]`", "By size"),
        ("`.name`", "text", "required", ""),
        ("`.silent`", "true or false", "`true`", ""),
    ]
