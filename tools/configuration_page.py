"""Writes the tables of docs/configuration.md: fields from the dataclasses and their comments, presets from configs/.

    python tools/configuration_page.py            # rewrites the tables in docs/configuration.md
    python tools/configuration_page.py --check    # exit status 1 if they are outdated

A field's meaning is the comment above and next to it, or else the docstring of its choices. A group's meaning is its
docstring.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import sys
import tokenize
import typing
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from enum import Enum
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from made_parts import write_or_check

from megatron_tempo.config.benchmarks import BENCHMARKS
from megatron_tempo.config.extensions import Extension
from megatron_tempo.config.method_settings import SETTINGS, Method
from megatron_tempo.config.schema import Config
from megatron_tempo.config.stages import StageConfig
from megatron_tempo.config.tree import MISSING, is_optional, strip_optional, takes_extension

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "configuration.md"
# What each group of presets sets, in the order of the page.
PRESETS = {
    "experiment": "a whole run",
    "model": "checkpoint, precision, layout",
    "data": "labelled, unlabelled and evaluation sets",
    "benchmark": "an evaluation set of that name, or several, `[NAME,NAME]` ([data.md](data.md))",
    "engine": "who generates, and on which GPUs ([engines.md](engines.md))",
    "algorithm": "what stage 2 does; `reference` is TEMPO as its published code has it ([methods.md](methods.md))",
    "cluster": "the machines that `plan` plans for ([planning.md](planning.md)), and how a site takes jobs "
    "([cluster.md](cluster.md))",
}
TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text", Extension: "`import:MODULE:NAME`"}


@dataclass(frozen=True, slots=True)
class Group:
    """A dataclass of the tree, its paths in the tree, and its default at each path."""

    kind: type
    by_path: dict[str, Any]

    @property
    def roots(self) -> list[str]:
        """The paths, with both stages as one."""
        return list(dict.fromkeys(re.sub(r"^stage\d", "stageN", place) for place in self.by_path))

    @property
    def title(self) -> str:
        """The path or, if there are several, the class's name in words: ActorUpdateConfig is "Actor update"."""
        if len(self.by_path) == 1:
            return f"`{self.roots[0]}`"
        return re.sub(r"(?<!^)[A-Z]", lambda letter: f" {letter[0].lower()}", self.kind.__name__.removesuffix("Config"))

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Name, type, default and meaning of each field that is not a group itself."""
        comments = comments_of(self.kind)
        start = self.roots[0] if len(self.roots) == 1 else ""
        for name, hint in typing.get_type_hints(self.kind).items():
            if self.kind is StageConfig and name == "settings":  # by the method, which chooses them
                choices = default_text({place: node.method for place, node in self.by_path.items()})
                kind = f"choice or {TYPES[Extension]}"
                yield f"`{start}.method`", kind, choices, meaning(comments[name], Method)
                continue
            inner = strip_optional(hint)
            if is_dataclass(inner) and inner is hint:
                continue
            default = default_text({place: getattr(node, name) for place, node in self.by_path.items()})
            kind = type_of(inner)
            if inner is not Extension and takes_extension(hint):
                kind += f" or {TYPES[Extension]}"
            if is_optional(hint) and default != "none":
                kind += " or none"
            yield f"`{start}.{name}`", kind, default, meaning(comments[name], inner)


def groups(root: type = Config) -> list[Group]:
    """Every dataclass of the tree below its root, in the order of the root's fields, less deep ones first."""
    order = list(typing.get_type_hints(root))
    nodes = sorted(_nodes(root(), ""), key=lambda node: (order.index(node[0].split(".")[0]), node[0].count(".")))
    merged: dict[type, Group] = {}
    for place, node in nodes:
        merged.setdefault(type(node), Group(type(node), {})).by_path[place] = node
    return list(merged.values())


def _nodes(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The dataclasses below a node, with their paths. An optional one that is None is replaced by its own defaults."""
    for name, hint in typing.get_type_hints(type(node)).items():
        if isinstance(node, StageConfig) and name == "settings":
            yield from ((path, kind()) for kind in SETTINGS.values())
            continue
        inner, below = strip_optional(hint), f"{path}.{name}" if path else name
        if typing.get_origin(inner) is dict:
            inner, below = typing.get_args(inner)[1], f"{below}.NAME"
        if is_dataclass(inner):
            value = getattr(node, name)
            value = value if isinstance(value, typing.cast(type, inner)) else typing.cast(type, inner)()
            yield below, value
            yield from _nodes(value, below)


def comments_of(kind: type) -> dict[str, str]:
    """The comments of each field or member of a class: the comment lines above it, then the one next to it.

    Inherited fields are included.
    """
    comments: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base) or base is kind:
            comments |= _own_comments(base)
    return comments


def _own_comments(kind: type) -> dict[str, str]:
    source = inspect.getsource(kind)
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    own = {}
    for node in _definition(source).body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            above, line = [], node.lineno - 1
            while comments.get(line, ("", False))[1]:
                above.insert(0, comments[line][0])
                line -= 1
            inside = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            own[ast.unparse(target)] = " ".join([*above, *(comments[row][0] for row in inside if row in comments)])
    return own


def docstring_of(kind: type) -> str:
    """The first paragraph, on one line. (`__doc__` of a dataclass without a docstring is not empty.)"""
    text = ast.get_docstring(_definition(inspect.getsource(kind))) or ""
    return " ".join(text.partition("\n\n")[0].split())


def _definition(source: str) -> ast.ClassDef:
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    return definition


def meaning(comment: str, kind: Any) -> str:
    """The meaning of a field, followed by the members of its choices with their meanings."""
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        return _sentence(comment)
    members, lines = comments_of(kind), [_sentence(comment or docstring_of(kind))]
    for explained, names in groupby(kind.__members__, key=lambda name: bool(members[name])):
        if explained:
            lines += [f"`{name}`: {_escaped(members[name])}" for name in names]
        else:
            lines.append(", ".join(f"`{name}`" for name in names))
    return "<br>".join(lines)


def _sentence(text: str) -> str:
    """Format for a table: a capital first, and no full stop after a single sentence."""
    text = text[:1].upper() + text[1:]
    return _escaped(text if re.search(r"\. [A-Z]", text) else text.removesuffix("."))


def _escaped(text: str) -> str:
    """Markdown for a table cell: escapes bars and, outside code, angle brackets; links pages."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else _linked(part.replace("<", "\\<")) for part in parts)


def _linked(text: str) -> str:
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", text)


def type_of(kind: Any) -> str:
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return f"list of {type_of(arguments[0])}s"
    if typing.get_origin(kind) is dict:
        return f"{type_of(arguments[1])}s by name"
    if is_dataclass(kind):
        return _link(Group(typing.cast(type, kind), {}).title.lower())
    return "choice" if issubclass(kind, Enum) else TYPES[kind]


def default_text(defaults: dict[str, Any]) -> str:
    """The default of a field: one for all paths, or one for each part of the path that distinguishes them."""
    words = {place: _default(value) for place, value in defaults.items()}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    for parts in zip(*(place.split(".") for place in words), strict=False):
        by_part = dict.fromkeys(zip(parts, words.values(), strict=True))
        if len(by_part) == len(set(parts)):  # this part of the path determines the default
            return ", ".join(f"{word} in `{part}`" for part, word in by_part)
    return ", ".join(f"{word} in `{place}`" for place, word in words.items())


def _default(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if value == MISSING:
        return "required"
    if isinstance(value, Enum):
        return f"`{value.name}`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, float):
        return f"`{value:.12g}`".replace("e-0", "e-")
    return f"`{value}`" if value != "" else '`""`'


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def fields() -> str:
    """A heading, a sentence and a table for each group that has its own fields."""
    parts, links = [], []
    for group in groups():
        if rows := list(group.rows()):
            where = "" if len(group.by_path) == 1 else f"{', '.join(f'`{root}`' for root in group.roots)}. "
            words = f"{where}{_linked(docstring_of(group.kind))}"
            links.append(_link(group.title))
            parts.append(f"### {group.title}\n\n{words}\n\n{table(('field', 'type', 'default', 'meaning'), rows)}")
    return "\n".join([f"{', '.join(links)}.\n", *parts])


def _link(title: str) -> str:
    """A link to a heading of the page. GitHub removes dots from its name."""
    return f"[{title}](#{re.sub(r'[^a-z_ -]', '', title.lower()).replace(' ', '-')})"


def presets() -> str:
    """The groups of configs/ with their presets; defaults are bold."""
    folders = {path.name: path for path in (ROOT / "configs").iterdir() if path.is_dir()}
    if set(folders) | {"benchmark"} != set(PRESETS):
        raise SystemExit(f"PRESETS of {__file__} names {', '.join(PRESETS)}; configs/ has {', '.join(sorted(folders))}")
    chosen: dict[str, str] = {}
    for entry in yaml.safe_load((ROOT / "configs" / "config.yaml").read_text(encoding="utf-8"))["defaults"]:
        chosen |= entry if isinstance(entry, dict) else {}
    rows = []
    for group, what in PRESETS.items():
        if group == "benchmark":
            names = [name for name, benchmark in BENCHMARKS.items() if not benchmark.training]
        else:
            names = sorted((path.stem for path in folders[group].glob("*.yaml")), key=_natural)
        rows.append((f"`{group}`", what, ", ".join(f"**{name}**" if name == chosen[group] else name for name in names)))
    return table(("group", "what it sets", "shipped"), rows)


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that compares numbers by value: h100x8 comes before h100x16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def parts() -> dict[str, str]:
    """The generated parts, by their names in the page."""
    return {"tools/configuration_page.py: presets": presets(), "tools/configuration_page.py: fields": fields()}


if __name__ == "__main__":
    sys.exit(write_or_check(DOCUMENT, parts(), __doc__.partition("\n")[0]))
