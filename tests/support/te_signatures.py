"""The names and signatures of Transformer Engine (TE) that the stand-in in tests/support/te has, and a comparison.

    python -m tests.support.te_signatures tests/fixtures/te_signatures.json    # where the real one is installed

The file is the record of the real one, with its version. tests/unit/test_te_api.py compares the stand-in with it, and
tests/nullgpu/test_te_api.py the record with the installed TE. Nothing is computed, so no GPU is needed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

STAND_IN = Path(__file__).parent / "te"
ABSENT, BUILTIN = "absent", "builtin"
# Modules that only the stand-in has.
OWN = {"transformer_engine.pytorch.record", "transformer_engine.pytorch.collectives"}
# Modules of the stand-in whose names TE has elsewhere.
PLACES = {
    "transformer_engine.pytorch.module.linear": "transformer_engine.pytorch.module",
    "transformer_engine.pytorch.absent": "transformer_engine.pytorch",
}
# Keywords of Megatron-Core that TE drops without a message. Any other such keyword is an error in the stand-in.
DROPPED = {
    "transformer_engine.common.recipe.DelayedScaling": ("override_linear_precision", "params_dtype", "device"),
}


def names() -> Iterator[tuple[str, str, list[str]]]:
    """(module, name, methods) of each public class and function that the stand-in defines, from its sources."""
    for file in sorted(STAND_IN.rglob("*.py")):
        module = ".".join(file.relative_to(STAND_IN).with_suffix("").parts).removesuffix(".__init__")
        if module in OWN:
            continue
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef)]
                public = [name for name in methods if not name.startswith("_")]
                yield PLACES.get(module, module), node.name, public
            elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield PLACES.get(module, module), node.name, []
            elif isinstance(node, ast.Assign) and "__all__" not in (ids := _targets(node)):
                yield from ((PLACES.get(module, module), name, []) for name in ids if name[0] != "_")


def _targets(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def signatures() -> dict[str, Any]:
    """Of each of these names in the package that is imported: its parameters, `ABSENT`, or what kind of thing it is."""
    found: dict[str, Any] = {}
    for module, name, methods in names():
        place = _module(module)
        thing = getattr(place, name, None) if place is not None else None
        key = f"{module}.{name}"
        found[key] = ABSENT if thing is None else _described(thing)
        for method in methods:
            found[f"{key}.{method}"] = _described(getattr(thing, method)) if hasattr(thing, method) else ABSENT
    return found


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _described(thing: Any) -> Any:
    """[name, kind, default] of each parameter; members of an enumeration; else what kind of thing it is."""
    if inspect.isclass(thing) and issubclass(thing, Enum):
        return {"members": sorted(thing.__members__)}
    if not callable(thing):
        return type(thing).__name__
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return BUILTIN
    return [[p.name, p.kind.name, _default(p.default)] for p in parameters]


def _default(default: Any) -> Any:
    if default is inspect.Parameter.empty or str(default) == "<required parameter>":  # torch's, of an optimizer
        return "required"
    if isinstance(default, Enum):
        return str(default)
    return default if isinstance(default, int | float | str | bool | None) else repr(default)


def differences(ours: Mapping[str, Any], real: Mapping[str, Any]) -> list[str]:
    """Where the stand-in has what TE has not, or has it otherwise. It may lack parameters that have a default."""
    found = []
    for name, mine in ours.items():
        theirs = real.get(name, ABSENT)
        if theirs == ABSENT:
            found.append(f"{name} is not in TE's record")
        elif isinstance(mine, dict):
            found += [f"{name}.{member} is not TE's" for member in mine["members"] if member not in theirs["members"]]
        elif isinstance(mine, list) and isinstance(theirs, list):
            found += [f"{name}: {text}" for text in _of_parameters(mine, theirs, DROPPED.get(name, ()))]
        elif mine != theirs and BUILTIN not in (mine, theirs):
            found.append(f"{name} is {mine}, and TE's is {theirs}")
    return found


def _of_parameters(mine: list[list[Any]], theirs: list[list[Any]], dropped: Sequence[str]) -> Iterator[str]:
    if [kind for _, kind, _ in mine] == ["VAR_POSITIONAL", "VAR_KEYWORD"]:
        return  # a name that is only imported: it takes anything, and raises
    known = {name: [kind, default] for name, kind, default in theirs}
    for name, kind, default in mine:
        if name not in known and name not in dropped:
            yield f"TE has no parameter {name}"
        elif name in known and known[name] != [kind, default]:
            yield f"{name} is {kind}={default}, and TE's is {known[name][0]}={known[name][1]}"
    own = [name for name, _, _ in mine if name in known]
    if own != [name for name in known if name in own]:
        yield f"{own} are in another order than TE's"
    for name, kind, default in theirs:
        if default == "required" and not kind.startswith("VAR") and name not in own:
            yield f"TE requires {name}"


def main(out: str) -> None:
    """Write the record."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        version = importlib.import_module("transformer_engine").__version__
        record = {"transformer_engine": version, "signatures": signatures()}
    Path(out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
