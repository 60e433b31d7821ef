"""Converts plain data (dicts, lists and scalars, as in YAML and JSON) to the typed tree and back.

Reading collects every unknown field and every value of a wrong type in the whole tree.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from megatron_tempo.config.earlier import replacement, stage_of_now
from megatron_tempo.config.extensions import PREFIX, Extension, ExtensionError, call_failed, described
from megatron_tempo.config.method_settings import SETTINGS, Method, MethodSettings
from megatron_tempo.config.problem import Problem, as_text, did_you_mean, show
from megatron_tempo.config.schema import Config, to_plain
from megatron_tempo.config.stages import ExtensionSettings, StageConfig, load_method
from megatron_tempo.errors import InputError, hidden
from megatron_tempo.files import read_json

MISSING = "???"  # Hydra's mark of a value that the user must give

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_EXAMPLE = {bool: "true", int: "8", float: "0.1", str: "NAME"}
_Node = TypeVar("_Node")


class _BadValue(Exception):
    def __init__(self, problem: Problem) -> None:
        self.problem = problem


def read(plain: Mapping[str, Any]) -> tuple[Config, list[Problem]]:
    """The configuration that `plain` describes, and the problems of unreadable fields, which keep their defaults."""
    problems: list[Problem] = []
    return _fill(Config(), plain, "", problems), problems


def save(config: Config, path: str | Path) -> None:
    """Write the whole tree as JSON. Raises FileExistsError if the file exists."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(as_json(config))


def as_json(config: Config) -> str:
    """The text of a file of `save`."""
    return json.dumps(to_plain(config), indent=2) + "\n"


def load(path: str | Path) -> Config:
    """Read a file of `save`. Raises InputError for fields or values that this version does not know."""
    config, problems = read(without_default_settings(read_json(Path(path), dict)))
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        fields = ", ".join(f"{problem.field}={show(problem.value)}" for problem in problems[:5])
        raise InputError(
            f"{path} was written by another version of the program, or changed by hand: this one does not know "
            f"{fields}{more}; use the version that wrote it"
        )
    return config


def differences(old: Config, new: Config) -> list[str]:
    """The fields in which two configs differ, as `path: old -> new`."""
    before, after = dict(leaves(to_plain(old))), dict(leaves(to_plain(new)))
    names = [*before, *(name for name in after if name not in before)]
    return [f"{n}: {before.get(n)!r} -> {after.get(n)!r}" for n in names if before.get(n) != after.get(n)]


def leaves(node: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every field of a config as plain data, with its path."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dataclass of the tree with its path, parents first: ("", config), ("run", config.run), ..."""
    if isinstance(node, dict):
        for key, item in node.items():
            yield from walk(item, _join(path, key))
    elif is_dataclass(node):
        yield path, node
        for name in node.__dataclass_fields__:
            # The settings of a stage's method are among the stage's fields.
            below = path if isinstance(node, StageConfig) and name == "settings" else _join(path, name)
            yield from walk(getattr(node, name), below)


def field_paths(cls: type = Config, path: str = "") -> Iterator[str]:
    """The paths of all leaves; NAME stands for a key that the user chooses."""
    if cls is StageConfig:
        yield from (_join(path, name) for name in ("method", *_SETTINGS))
    for name, hint in _hints(cls).items():
        below = _join(path, name)
        if cls is StageConfig and name == "settings":
            continue
        inner = strip_optional(hint)
        if typing.get_origin(inner) is dict:
            inner, below = typing.get_args(inner)[1], _join(below, "NAME")
        if is_dataclass(inner):
            yield from field_paths(typing.cast(type, inner), below)
        else:
            yield below


@cache
def _hints(cls: type) -> dict[str, Any]:
    """The types of a class's fields. Cached: Python evaluates their text at each call."""
    return typing.get_type_hints(cls)


def _fill(default: _Node, plain: Any, path: str, problems: list[Problem]) -> _Node:
    """`default`, a dataclass, with the values of `plain` in it."""
    if isinstance(default, StageConfig) and isinstance(plain, Mapping):
        return typing.cast(_Node, _stage(default, plain, path, problems))
    return _fill_fields(default, plain, path, problems)


def _fill_fields(default: _Node, plain: Any, path: str, problems: list[Problem]) -> _Node:
    hints = _hints(typing.cast("type", type(default)))
    if not isinstance(plain, Mapping):
        wrong = "is a group of fields, not a value"
        first = "method" if isinstance(default, StageConfig) else next(iter(hints))
        problems.append(Problem(path, plain, wrong, f"set its fields, such as {path}.{first}"))
        return default
    values = {}
    for key, value in plain.items():
        below = _join(path, as_text(key))
        if key not in hints:
            problems.extend(_unknown(path, as_text(key), value, list(hints)))
            continue
        try:
            values[key] = _value(hints[key], value, below, getattr(default, key), problems)
        except _BadValue as bad:
            problems.append(bad.problem)
    return replace(default, **values)  # type: ignore[type-var]


def _stage(default: StageConfig, plain: Mapping[str, Any], path: str, problems: list[Problem]) -> StageConfig:
    """A stage. Its method defines which fields it has in addition to those of every stage."""
    shared = [name for name in StageConfig.__dataclass_fields__ if name != "settings"]
    stage = _fill_fields(default, {key: plain[key] for key in plain if key in shared}, path, problems)
    own = {as_text(key): value for key, value in plain.items() if key not in {*shared, "method"}}
    try:
        method = _value(Method | Extension, plain.get("method", default.method.name), _join(path, "method"), None, [])
    except _BadValue as bad:  # its settings are unknown
        problems.append(bad.problem)
        method, kind = None, None
    if isinstance(method, Extension):
        return replace(stage, settings=ExtensionSettings(method, own))
    kind = SETTINGS[method] if method is not None else None
    names = _SETTINGS if kind is None else kind.__dataclass_fields__
    for key in own:
        if key not in _SETTINGS:
            problems.extend(_unknown(path, key, own[key], ["method", *shared, *names]))
        elif key not in names:
            problems.append(_of_another_method(path, key, own[key], method.name))
    if kind is None:
        return stage
    return replace(stage, settings=_fill_fields(kind(), {k: own[k] for k in own if k in names}, path, problems))


def _of_another_method(path: str, key: str, value: Any, method: str) -> Problem:
    field = _join(path, key)
    users = " or ".join(name.name for name, kind in SETTINGS.items() if key in kind.__dataclass_fields__)
    fix = f"remove it (~{field} where a preset gives it), or {_join(path, 'method')}={users}"
    return Problem(field, value, f"method {method} does not use it", fix)


# The settings of all built-in methods by name: a name has one meaning and one default.
_SETTINGS = {name: value for kind in SETTINGS.values() for name, value in to_plain(kind()).items()}


def without_default_settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A tree as plain data without the settings of the stages' methods that have their default values.

    So another method can be set on top of it, and a config.json of an earlier version, which has the settings of all
    methods in each stage, can be read. So can one with a field that another one replaces (`earlier.stage_of_now`).
    """
    kept = dict(plain)
    for name in Config().stages():
        stage = plain.get(name)
        if isinstance(stage, Mapping):
            stage = stage_of_now(stage)
            is_own = str(stage.get("method")).startswith(PREFIX)
            kept[name] = {k: v for k, v in stage.items() if is_own or k not in _SETTINGS or v != _SETTINGS[k]}
    return kept


def read_settings(settings: ExtensionSettings, path: str) -> tuple[MethodSettings, list[Problem]]:
    """The settings of a user's method, as it declares them, and the problems of those that cannot be read.

    Raises ExtensionError if the method cannot be loaded.
    """
    kind, problems = load_method(settings.method).settings, list[Problem]()
    hints = _setting_types(kind)
    known = {key: value for key, value in settings.given.items() if key in hints}
    siblings = [name for name in ("method", *StageConfig.__dataclass_fields__, *hints) if name != "settings"]
    for key in settings.given.keys() - known.keys():
        problems.extend(_unknown(path, key, settings.given[key], siblings))
    try:
        return _fill_fields(kind(), known, path, problems), problems
    except ValueError as error:  # of its __post_init__
        wrong = f"rejects its settings: {error}"
        problems.append(Problem(_join(path, "method"), settings.method, wrong, "change what it names"))
        return MethodSettings(), problems
    except Exception as error:
        raise call_failed(settings.method, error) from error


def _setting_types(kind: type[MethodSettings]) -> dict[str, Any]:
    """The types of a user's settings. Raises ExtensionError if one of them cannot be given in a configuration."""
    fix = "use bool, int, float, str, an Enum, a list of one of them, or X | None"
    try:
        hints = typing.get_type_hints(kind)
    except Exception as error:
        raise ExtensionError(f"the types of its settings {kind.__name__}: {described(error)}", fix) from error
    hints = {each.name: hints[each.name] for each in fields(kind) if each.init}
    for name, hint in hints.items():
        match [each for each in _alternatives(hint) if each is not type(None)]:
            case [single]:
                item = typing.get_args(single)[0] if typing.get_origin(single) is list else single
                if item in _EXPECTED or (isinstance(item, type) and issubclass(item, Enum)):
                    continue
        raise ExtensionError(f"its setting {kind.__name__}.{name} has the type {hint}", fix)
    return hints


def _value(hint: Any, value: Any, path: str, default: Any, problems: list[Problem]) -> Any:
    inner = strip_optional(hint)
    if value is None and is_optional(hint):
        return None
    if is_dataclass(inner):
        return _fill(default if default is not None else typing.cast(type, inner)(), value, path, problems)
    if value == MISSING and inner is not str:
        raise _BadValue(Problem(path, value, "has no value", f"give {path}=VALUE"))
    origin, args = typing.get_origin(inner), typing.get_args(inner)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _BadValue(Problem(path, value, "is a group of named entries, not a value", f"set {path}.NAME fields"))
        named = {as_text(key): item for key, item in value.items()}
        if bad := [name for name in named if hidden(name) or "\n" in name or "\t" in name]:
            raise _BadValue(Problem(path, bad[0], "a name has invisible characters", f"rename {path}.{bad[0]}"))
        return {name: _value(args[1], item, _join(path, name), None, problems) for name, item in named.items()}
    if origin is list:
        if not isinstance(value, list):
            fix = f"{path}=[]" if value is None else f"{path}=[{show(value)}]"
            raise _BadValue(Problem(path, value, "must be a list", fix))
        return [_value(args[0], item, f"{path}[{i}]", None, problems) for i, item in enumerate(value)]
    if takes_extension(hint) and (inner is Extension or (isinstance(value, str) and value.startswith(PREFIX))):
        return _extension(value, path)
    if issubclass(inner, Enum):
        return _member(inner, value, path)
    return _scalar(inner, value, path)


def _extension(value: Any, path: str) -> Extension:
    try:
        return Extension.parse(as_text(value))
    except ExtensionError as error:
        raise _BadValue(Problem(path, value, error.wrong, f"{path}={error.fix}")) from error


def _member(kind: type[Enum], value: Any, path: str) -> Enum:
    if isinstance(value, str) and value in kind.__members__:
        return kind[value]
    if isinstance(value, bool) and (word := "on" if value else "off") in kind.__members__:
        return kind[word]  # what YAML makes of on and off without quotes
    names = ", ".join(kind.__members__)
    raise _BadValue(Problem(path, value, f"must be one of {names}", did_you_mean(as_text(value), kind.__members__)))


def _scalar(kind: type, value: Any, path: str) -> Any:
    if kind is float and type(value) is int:
        value = float(value) if value.bit_length() < 1024 else (math.inf if value > 0 else -math.inf)
    is_long = kind is int and type(value) is int and value.bit_length() > _BITS
    if type(value) is not kind or is_long:
        expected = _EXPECTED[kind] + (f" of at most {_DIGITS} digits" if is_long else "")
        raise _BadValue(Problem(path, value, f"must be {expected}", _scalar_fix(kind, value, path)))
    if isinstance(value, str):
        _check_text(value, path)
    return value


_DIGITS = 3000  # rules and messages print numbers, and Python refuses to print one of more than 4300 digits
_BITS = int(_DIGITS * math.log2(10))


def _scalar_fix(kind: type, value: Any, path: str) -> str:
    if kind is str and isinstance(value, list) and value and isinstance(value[0], str):
        return f"give one: {path}={value[0]}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is not str or not is_number or abs(value) > 10**300:
        return f"for example {path}={_EXAMPLE[kind]}"
    quoted = f"'{path}=\"{as_text(value)}\"'"
    if path != "cluster.slurm.time_limit" or not isinstance(value, int) or not 60 <= value < 10**9:
        return f"quote it: {quoted} (without quotes YAML reads 010, 1e3 or 12:00 as a number)"
    hours, seconds = divmod(value, 3600)
    time = f"{hours}:{seconds // 60:02}:{seconds % 60:02}"
    return (
        f"quote it: '{path}=\"{time}\"' if you wrote {time} (YAML reads that as {value} without quotes), "
        f"or {quoted} for {value} minutes"
    )


# Texts that a model reads or writes: they may have several lines, and marks that a terminal would not show.
_PROSE = ("suffix", "system", "stop")


def _check_text(value: str, path: str) -> None:
    """Raises _BadValue for characters that a shell would execute, that end a path, or that a message would not show."""
    is_prose = path.rpartition(".")[2].partition("[")[0] in _PROSE
    for character in value:
        code = ord(character)
        if 0xD800 <= code < 0xE000:
            fix = f"give {path} in UTF-8; rename a file whose name is not"
            raise _BadValue(Problem(path, value, "is not UTF-8", fix))
        if (hidden(character) and (code < 0x80 or not is_prose)) or (character in "\n\t" and not is_prose):
            fix = f"type {path} anew, without it"
            raise _BadValue(Problem(path, value, f"has the invisible character U+{code:04X}", fix))


def _unknown(path: str, key: str, value: Any, siblings: list[str]) -> Iterator[Problem]:
    """One problem for each leaf below an unknown key, with the known fields that may have been meant."""
    below = _join(path, key)
    if isinstance(value, Mapping) and value:
        for name, item in value.items():
            yield from _unknown(below, str(name), item, [])
        return
    if (new := replacement(below, value)) is not None:
        yield Problem(below, value, *new)
        return
    yield Problem(below, value, "there is no such field", _meant(below, key, siblings))


def _meant(path: str, key: str, siblings: list[str]) -> str:
    """Fields that may have been meant: its siblings, similar paths, or the same name elsewhere."""
    parent = path.rpartition(".")[0]
    known = list(field_paths())
    near = [_join(parent, name) for name in get_close_matches(key, siblings)]
    top = path.partition(".")[0]
    same = sorted((other for other in known if other.endswith(f".{key}")), key=lambda other: not other.startswith(top))
    close = near or get_close_matches(path, known, n=1, cutoff=0.9) or same[:3]
    return f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(siblings or _hints(Config))}"


def strip_optional(hint: Any) -> Any:
    """The type that a field has if it is not None: the built-in choices of a field that takes extensions too."""
    return next(arg for arg in _alternatives(hint) if arg is not type(None))


def is_optional(hint: Any) -> bool:
    """Whether a field may be None."""
    return type(None) in _alternatives(hint)


def takes_extension(hint: Any) -> bool:
    """Whether a field may be `import:package.module:name`."""
    return Extension in _alternatives(hint)


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
