"""The tests of a question about code, as its answer holds them, and how a program's outputs are compared with them.

An answer is JSON, or `zlib:` and the same JSON compressed, in base64. By "kind":

    {"kind": "inputs", "tests": [{"input": "2 3\\n", "output": "5\\n"}, ...]}
    {"kind": "calls", "name": "add", "tests": [{"arguments": [2, 3], "result": 5}, ...]}
    {"kind": "asserts", "names": ["add"], "tests": "assert add(2, 3) == 5", "call": null}

"inputs": the program reads standard input and writes standard output. "calls": its function `name`, or the method of
this name of its class Solution, is called. "asserts": the code of the tests calls the program's `names`; if "call"
names a function of the tests, that is called with the first of them. "before", optional, is code in front of the
program; the asserts run behind it too.
"""

from __future__ import annotations

import ast
import base64
import binascii
import codeop
import json
import keyword
import math
import warnings
import zlib
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from megatron_tempo.errors import InputError
from megatron_tempo.files import json_type, repeated_name

PACKED = "zlib:"
PACKED_FROM = 2000  # characters from which on tests are compressed
LARGEST = 2**28  # bytes of one question's tests, uncompressed
KINDS = ("inputs", "calls", "asserts")
DEEPEST = 200  # levels of lists and objects in a test: what is sent and compared level by level


@dataclass(frozen=True, slots=True)
class ProgramTests:
    """The tests of a question. `cases`: pairs of input and output, or of arguments and result; none for asserts.

    >>> ProgramTests("inputs", cases=(("2 3", "5"),))
    """

    kind: str
    cases: tuple[tuple[Any, Any], ...] = ()
    names: tuple[str, ...] = ()
    code: str = ""  # of asserts
    call: str | None = None
    before: str = ""

    def write(self) -> str:
        """The answer that holds these tests."""
        fields: dict[str, Any] = {"kind": self.kind}
        if self.kind == "inputs":
            fields["tests"] = [{"input": given, "output": wanted} for given, wanted in self.cases]
        elif self.kind == "calls":
            fields["name"] = self.names[0]
            fields["tests"] = [{"arguments": given, "result": wanted} for given, wanted in self.cases]
        else:
            fields |= {"names": list(self.names), "tests": self.code, "call": self.call}
        if self.before:
            fields["before"] = self.before
        text = json.dumps(fields)
        if len(text) < PACKED_FROM:
            return text
        return PACKED + base64.b64encode(zlib.compress(text.encode("ascii"), 9)).decode("ascii")


@lru_cache(maxsize=32)
def read_tests(answer: str) -> ProgramTests:
    """The tests that an answer holds. Raises InputError that says what is wrong with it."""
    fields = _fields(answer)
    kind = fields.get("kind")
    if kind not in KINDS:
        raise InputError(f'the tests have the "kind" {kind!r}; known are {", ".join(KINDS)}')
    before = _text(fields, "before", "")
    _check_before(before)
    if kind == "asserts":
        names, call = fields.get("names"), fields.get("call")
        if not isinstance(names, list) or not names or not all(map(_is_name, names)):
            raise InputError('"names" of asserts lists the functions of the program that they use, at least one')
        if call is not None and not _is_name(call):
            raise InputError('"call" of asserts is the name of a function of the tests, or null')
        code = _text(fields, "tests")
        _check_asserts(code, call, before)
        return ProgramTests(kind, (), tuple(names), code, call, before)
    first, second = ("input", "output") if kind == "inputs" else ("arguments", "result")
    tests = fields.get("tests")
    if not isinstance(tests, list) or not tests:
        raise InputError(f'"tests" of {kind} is a list of at least one test')
    cases = tuple(_case(number, test, first, second) for number, test in enumerate(tests))
    if kind == "inputs":
        return ProgramTests(kind, cases, before=before)
    name = _text(fields, "name", "")
    if not _is_name(name):
        raise InputError('"name" of calls is the name of the function that is called')
    return ProgramTests(kind, cases, (name,), before=before)


def outputs_agree(output: str, wanted: str) -> bool:
    """Whether a program's output is right. Blanks at the ends of lines make no difference, nor do forms of a number.

    `5` is `5.0`, and `1e3` is `1000`: exactly, without a tolerance.
    """
    lines, wanted_lines = (text.strip().split("\n") for text in (output, wanted))
    if len(lines) != len(wanted_lines):
        return False
    return all(map(_lines_agree, lines, wanted_lines))


def results_agree(form: Any, wanted: Any) -> bool:
    """Whether a result in the form of `sandboxed.plain` is right. A tuple counts as a list, its items do not.

    The form is hostile: nothing is made of it.
    """
    if isinstance(form, dict) and form.keys() == {"tuple"}:
        form = form["tuple"]
    try:
        return _same(form, wanted)
    except RecursionError:
        return False


def _same(form: Any, wanted: Any) -> bool:
    if isinstance(wanted, list):
        return isinstance(form, list) and len(form) == len(wanted) and all(map(_same, form, wanted))
    if isinstance(wanted, dict):
        pairs = form.get("dict") if isinstance(form, dict) else None
        if not isinstance(pairs, list) or len(pairs) != len(wanted):
            return False
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            return False
        return {key for key, _ in pairs} == wanted.keys() and all(_same(value, wanted[key]) for key, value in pairs)
    if isinstance(form, dict):
        return isinstance(wanted, int) and form.keys() == {"int"} and form["int"] == hex(wanted)
    return not isinstance(form, list) and bool(form == wanted)


def _lines_agree(line: str, wanted: str) -> bool:
    line, wanted = line.strip(), wanted.strip()
    if line == wanted:
        return True
    parts, wanted_parts = line.split(), wanted.split()
    if len(parts) != len(wanted_parts):
        return False
    try:
        return all(Decimal(part) == Decimal(other) for part, other in zip(parts, wanted_parts, strict=True))
    except ArithmeticError:  # no number
        return False


def _fields(answer: str) -> dict[str, Any]:
    text: str | bytes = answer
    if answer.startswith(PACKED):
        text = unpacked(answer.removeprefix(PACKED))
    try:
        fields = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the answer holds no tests: it is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"the answer holds no tests: it is a JSON {json_type(fields)}, not an object")
    return fields


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (twice := repeated_name(pairs)) is not None:
        raise ValueError(f"the name {twice!r} is there twice")
    return dict(pairs)


def unpacked(text: str) -> bytes:
    """Bytes from base64 and zlib. Raises InputError if they are damaged or larger than `LARGEST`."""
    try:
        stream = zlib.decompressobj()
        content = stream.decompress(base64.b64decode(text, validate=True), LARGEST)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise InputError(f"the tests cannot be decompressed ({error})") from error
    if not stream.eof:
        larger = bool(stream.unconsumed_tail)
        raise InputError(f"the tests are larger than {LARGEST >> 20} MiB" if larger else "the tests are cut short")
    return content


def _case(number: int, test: Any, first: str, second: str) -> tuple[Any, Any]:
    if not isinstance(test, dict) or first not in test or second not in test:
        raise InputError(f'test {number} is no object with "{first}" and "{second}"')
    if first == "input" and not (isinstance(test[first], str) and isinstance(test[second], str)):
        raise InputError(f'test {number}: "input" and "output" are text')
    if first == "arguments" and not isinstance(test[first], list):
        raise InputError(f'test {number}: "arguments" is a list')
    if first == "arguments" and _is_deeper(test, DEEPEST):
        raise InputError(f"test {number} is nested more than {DEEPEST} levels deep")
    return test[first], test[second]


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    text = fields.get(name, default)
    if not isinstance(text, str):
        raise InputError(f'"{name}" of the tests is code, as text')
    return text


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects in a value are nested more than `levels` deep."""
    level = [value]
    for _ in range(levels + 1):
        level = [one for of in level for one in (of.values() if isinstance(of, dict) else of)
                 if isinstance(one, list | dict)]  # fmt: skip
    return bool(level)


def _check_asserts(code: str, call: str | None, before: str) -> None:
    """Raises InputError if the tests are no code, define no `call`, or without one check nothing."""
    steps = _parsed("tests", code)
    if call is not None:
        if call not in _assigned(steps) | _assigned(_steps(before)):
            raise InputError(f'"call" is {call!r}, which the code of "tests" does not define')
    elif all(isinstance(step, _NO_CHECKS) or _is_text(step) for step in steps):
        fix = 'add assertions, or give the function that has them as "call"'
        raise InputError(f'"tests" of asserts only define things, so every program passes them; {fix}')


_NO_CHECKS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom | ast.Assign | ast.Pass


def _is_text(step: ast.stmt) -> bool:
    return isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant)


def _assigned(steps: list[ast.stmt]) -> set[str]:
    """The names that these statements may define, at any depth; all that occur in a definition or an assignment."""
    nodes = [node for step in steps for node in ast.walk(step)]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    imported = {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}
    return defined | imported | {node.id for node in nodes if isinstance(node, ast.Name)}


def _steps(code: str) -> list[ast.stmt]:
    try:
        return ast.parse(code).body
    except SyntaxError:  # the function that a program continues
        return []


def _check_before(code: str) -> None:
    """Raises InputError if no program can make whole code of it."""
    try:
        _parsed("before", code)
    except InputError:
        if not _is_unfinished(code):
            raise


def _is_unfinished(code: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return codeop.compile_command(f"{code}\n", symbol="exec") is None
        except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
            return False


def _parsed(name: str, code: str) -> list[ast.stmt]:
    """The statements of code that compiles. Raises InputError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(code, name)
            compile(tree, name, "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise InputError(f'"{name}" is no Python code ({error})') from error
    return tree.body


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not keyword.iskeyword(name)
