"""Converts rows of public sets of programming questions: HumanEval, MBPP and LiveCodeBench.

The names of columns are those of the published files: openai/human-eval's JSONL, google-research's mbpp.jsonl and
sanitized-mbpp.json, and livecodebench/code_generation_lite. A question's answer is its tests
(`megatron_tempo.rewards.code_tests`).
"""

from __future__ import annotations

import ast
import builtins
import io
import json
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

from megatron_tempo.data.public import PublicRow
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.code_tests import ProgramTests, read_tests, unpacked

BROKEN = "its tests cannot be read"
NO_TESTS = "has no tests"
LCB_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics"),
    *("itertools", "functools", "operator", "io", "sys", "json", "builtins", "typing"),
)
# What programs may use without importing it, as in the set's own evaluation and on LeetCode.
LCB_BEFORE = "\n".join(
    [
        *(f"from {module} import *" for module in LCB_MODULES),
        f"import {', '.join(LCB_MODULES)}",
        "sys.setrecursionlimit(50000)",
    ]
)


class BadTests(ValueError):
    """Why a row's tests cannot be used."""


class Form(NamedTuple):
    """How the rows of a set are read. Each function raises BadTests if a row cannot be used."""

    prompt: Callable[[PublicRow], str]
    tests: Callable[[PublicRow], ProgramTests]
    solution: Callable[[PublicRow], str | None]  # a program that passes the tests, if the row has one


def _humaneval_prompt(row: PublicRow) -> str:
    return f"Complete this Python function:\n\n```python\n{_text(row, 'prompt').rstrip()}\n```"


def _humaneval_tests(row: PublicRow) -> ProgramTests:
    """The tests are a function `check`, which takes the function that the prompt begins."""
    name, code, begun = (_text(row, column) for column in ("entry_point", "test", "prompt"))
    return ProgramTests("asserts", names=(name,), code=code, call="check", before=begun)


def _humaneval_solution(row: PublicRow) -> str | None:
    rest = _solution(row, "canonical_solution")
    return None if rest is None else _text(row, "prompt") + rest


def _mbpp_prompt(row: PublicRow) -> str:
    """With the tests, as in published evaluations: they show the names and the forms of arguments."""
    question = _text(row, "text" if "text" in row.fields else "prompt").strip()
    shown = "\n".join(test.strip() for test in _lines(row, "test_list"))
    return f"{question}\n\nYour program must pass these tests:\n\n```python\n{shown}\n```"


def _mbpp_tests(row: PublicRow) -> ProgramTests:
    """`test_imports` stand before the program, `test_setup_code` before the tests: it may use the program's classes."""
    tests, setup = _lines(row, "test_list"), row.fields.get("test_setup_code") or ""
    imports = _lines(row, "test_imports") if row.fields.get("test_imports") is not None else []
    if not tests or not isinstance(setup, str):
        raise BadTests(NO_TESTS)
    code = "\n".join([*filter(None, [setup]), *tests])
    names = _used_names("\n".join([*imports, code]), _solution(row, "code"))
    return ProgramTests("asserts", names=names, code=code, before="\n".join(imports))


def _lcb_prompt(row: PublicRow) -> str:
    question, starter = _text(row, "question_content").strip(), row.fields.get("starter_code")
    if isinstance(starter, str) and starter.strip():
        return f"{question}\n\nUse this code to begin with:\n\n```python\n{starter.strip()}\n```"
    return f"{question}\n\nThe program reads from standard input and writes to standard output."


def _lcb_tests(row: PublicRow) -> ProgramTests:
    cases = [*_cases(row.fields.get("public_test_cases")), *_cases(row.fields.get("private_test_cases"))]
    if not cases:
        raise BadTests(NO_TESTS)
    kinds = {case.get("testtype") for case in cases}
    if kinds == {"stdin"}:
        return ProgramTests("inputs", tuple((case["input"], case["output"]) for case in cases), before=LCB_BEFORE)
    if kinds != {"functional"}:
        raise BadTests("has tests of other kinds than stdin or functional")
    name = _metadata(row).get("func_name")
    if not isinstance(name, str):
        raise BadTests("names no function that its tests call")
    pairs = tuple((_values(case["input"]), _value(case["output"])) for case in cases)
    return ProgramTests("calls", pairs, (name,), before=LCB_BEFORE)


def _solution(row: PublicRow, column: str) -> str | None:
    value = row.fields.get(column)
    return value if isinstance(value, str) and value.strip() else None


HUMANEVAL = Form(_humaneval_prompt, _humaneval_tests, _humaneval_solution)
MBPP = Form(_mbpp_prompt, _mbpp_tests, lambda row: _solution(row, "code"))
LIVECODEBENCH = Form(_lcb_prompt, _lcb_tests, lambda row: None)


def checked(tests: ProgramTests) -> str:
    """The answer that holds these tests. Raises BadTests if they cannot be used."""
    answer = tests.write()
    try:
        read_tests(answer)
    except InputError as error:
        raise BadTests(f"{BROKEN}: {error}") from error
    return answer


def _used_names(tests: str, program: str | None) -> tuple[str, ...]:
    """The names of the program that the tests use, those that are called first. Raises BadTests if there is none."""
    tree = _parsed(tests)
    used = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    if program is not None:
        defined = _defined(_parsed(program))
    else:
        own = _defined(tree) | set(dir(builtins))
        called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        defined = {function.id for function in called if isinstance(function, ast.Name)} - own
    names = tuple(dict.fromkeys(name for name in used if name in defined))
    if not names:
        raise BadTests("has tests that use no function of its solution")
    return names


def _defined(tree: ast.Module) -> set[str]:
    """The names that the statements of a module define or import."""
    names: set[str] = set()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            names.add(statement.name)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            names.update((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
        elif isinstance(statement, ast.Assign):
            names.update(
                node.id for target in statement.targets for node in ast.walk(target) if isinstance(node, ast.Name)
            )
    return names


def _parsed(code: str) -> ast.Module:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadTests("has code that is no Python") from error


def _text(row: PublicRow, column: str) -> str:
    """The text in a column. Raises InputError if there is no such column, as `questions.column` does."""
    if column not in row.fields:
        there = ", ".join(map(str, row.fields))
        raise InputError(f"{row.place}: there is no column {column} among {there}; give the set's published file")
    value = row.fields[column]
    if not isinstance(value, str) or not value.strip():
        raise BadTests(f"has no text in the column {column}")
    return value


def _lines(row: PublicRow, column: str) -> list[str]:
    lines = row.fields.get(column)
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise BadTests(f"has no list of texts in the column {column}")
    return lines


def _metadata(row: PublicRow) -> dict[str, Any]:
    value = row.fields.get("metadata")
    value = _value(value) if isinstance(value, str) else value
    return value if isinstance(value, dict) else {}


def _values(lines: str) -> list[Any]:
    return [_value(line) for line in lines.split("\n")]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadTests(f"{BROKEN}: one is no JSON") from error


def _cases(value: Any) -> list[dict[str, Any]]:
    """Tests as a list, as JSON, or as a pickle of JSON, compressed, in base64."""
    if value is None:
        return []
    if isinstance(value, str):
        if not value.strip():
            return []
        value = _value(value) if value.lstrip().startswith("[") else _unpickled(value)
    if isinstance(value, str):
        value = _value(value)
    if not isinstance(value, list):
        raise BadTests(f"{BROKEN}: they are no list")
    for case in value:
        if not isinstance(case, dict) or not all(isinstance(case.get(name), str) for name in ("input", "output")):
            raise BadTests(f'{BROKEN}: one has no "input" and "output"')
    return value


def _unpickled(text: str) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(unpacked(text.strip()))).load()
    except InputError as error:
        raise BadTests(f"{BROKEN}: {error}") from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise BadTests(f"{BROKEN}: they are no pickle of plain data") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads text, numbers, lists and dicts. A pickle that names a class or a function is refused: it could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} is no plain data")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("no plain data")
