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
import json
import zlib
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from typing import Any

from megatron_tempo.errors import InputError
from megatron_tempo.files import json_type

PACKED = "zlib:"
PACKED_FROM = 2000  # characters from which on tests are compressed
LARGEST = 2**28  # bytes of one question's tests, uncompressed
KINDS = ("inputs", "calls", "asserts")


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
    if kind == "asserts":
        names, call = fields.get("names"), fields.get("call")
        if not isinstance(names, list) or not names or not all(map(_is_name, names)):
            raise InputError('"names" of asserts lists the functions of the program that they use, at least one')
        if call is not None and not _is_name(call):
            raise InputError('"call" of asserts is the name of a function of the tests, or null')
        code = _text(fields, "tests")
        _check_code("tests", code)
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
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the answer holds no tests: it is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise InputError(f"the answer holds no tests: it is a JSON {json_type(fields)}, not an object")
    return fields


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
    return test[first], test[second]


def _text(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    text = fields.get(name, default)
    if not isinstance(text, str):
        raise InputError(f'"{name}" of the tests is code, as text')
    return text


def _check_code(name: str, code: str) -> None:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f'"{name}" is no Python code ({error})') from error


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isidentifier()
