"""megatron-tempo prepare: HumanEval, MBPP and LiveCodeBench, in rows of our own in their published forms."""

from __future__ import annotations

import base64
import json
import os
import pickle
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo import cli
from megatron_tempo.config.benchmarks import BENCHMARKS
from megatron_tempo.config.choices import SandboxKind, Verifier
from megatron_tempo.config.schema import CodeConfig
from megatron_tempo.data.prepare import Order, Report, prepare
from megatron_tempo.errors import InputError
from megatron_tempo.rewards.code_tests import ProgramTests, read_tests
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers

pytestmark = pytest.mark.long  # a process for each program
SHARED: dict[str, Verifiers] = {}


@pytest.fixture(scope="module", autouse=True)
def verifiers() -> Iterator[None]:
    with Verifiers(code=CodeConfig(SandboxKind.subprocess, workers=2)) as SHARED["verifiers"]:
        yield


def make(folder: Path, name: str, *rows: dict[str, Any], **changes: Any) -> tuple[list[dict[str, Any]], Report]:
    """The rows written, and the report."""
    source = folder / "task.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = Order(name, [source], **{"out": folder / "out.jsonl", **changes})
    report = prepare(order, SHARED["verifiers"])
    return [json.loads(line) for line in order.out.read_text().splitlines()], report


def verdicts(row: dict[str, Any], *programs: str) -> list[float]:
    fenced = [f"```python\n{program}\n```" for program in programs]
    return SHARED["verifiers"].score([Item("code", row["prompt"], one, row["answer"]) for one in fenced])


HUMANEVAL = {
    "task_id": "HumanEval/900",
    "prompt": "from typing import List\n\n\ndef half(x: int) -> int:\n    return x // 2\n\n\ndef halves(xs: List[int]) "
    '-> List[int]:\n    """ Halve each number, with half.\n    >>> halves([4, 7])\n    [2, 3]\n    """\n',
    "entry_point": "halves",
    "canonical_solution": "    return [half(x) for x in xs]\n",
    "test": "\n\nMETADATA = {'author': 'us'}\n\n\ndef check(candidate):\n    assert candidate([4, 7]) == [2, 3]\n"
    "    assert candidate([]) == []\n    assert candidate([9]) == [half(9)], 'one'\n",
}
MBPP = {
    "task_id": 900,
    "text": "Write a function to find the length of a chain of links.",
    "code": "class Link:\r\n    def __init__(self, next):\r\n        self.next = next\r\ndef chain_length(link):\r\n"
    "    return 0 if link is None else 1 + chain_length(link.next)",
    "test_setup_code": "first = Link(None)\r\nfirst = Link(first)",
    "test_list": ["assert chain_length(first) == 2", "assert chain_length(Link(None)) == 1"],
    "challenge_test_list": [],
}
SANITIZED = {
    "source_file": "Benchmark Questions.ipynb",
    "task_id": 901,
    "prompt": "Write a function that finds the root of a number.",
    "code": "def sum(x):\n    return x ** 0.5",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(sum(2), 1.4142135, rel_tol=1e-6)", "assert set([sum(4)]) == set([2])"],
}


def private(cases: list[dict[str, str]]) -> str:
    """As published: JSON, pickled, compressed, in base64."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases)))).decode("ascii")


def case(given: str, wanted: str, kind: str = "stdin") -> dict[str, str]:
    return {"input": given, "output": wanted, "testtype": kind}


LCB = {
    "question_title": "Sum",
    "question_content": "Print the sum of the numbers of a line.",
    "platform": "atcoder",
    "question_id": "abc900_a",
    "contest_id": "abc900",
    "contest_date": "2024-01-01T00:00:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps([case("1 2\n", "3\n")]),
    "private_test_cases": private([case("5 6 7\n", "18\n")]),
    "metadata": "{}",
}
LCB_CALLS = LCB | {
    "question_content": "Find the two largest of a list, the largest first. ![picture](https://example.com/a.png)",
    "platform": "leetcode",
    "question_id": "3900",
    "starter_code": "class Solution:\n    def twoLargest(self, xs: List[int], k: int) -> List[int]:\n        ",
    "public_test_cases": json.dumps([case("[3, 1, 2]\n2", "[3, 2]", "functional")]),
    "private_test_cases": private([case("[1, 5]\n2", "[5, 1]", "functional")]),
    "metadata": '{"func_name": "twoLargest"}',
}


def test_humaneval(tmp_path: Path) -> None:
    (row,), report = make(tmp_path, "humaneval", HUMANEVAL)
    assert row["id"] == "HumanEval/900"
    assert row["prompt"].startswith("Complete this Python function:\n\n```python\nfrom typing import List\n")
    assert "candidate" not in row["prompt"]
    assert "half(x) for x" not in row["answer"], "the solution is not written"
    whole = "def halves(xs):\n    return [x // 2 for x in xs]"
    assert verdicts(row, whole, "    return [half(x) for x in xs]", "def halves(xs): return xs") == [1.0, 1.0, 0.0]
    assert "note: humaneval has 164 questions as published" in "\n".join(report.lines(Order("humaneval", [], tmp_path)))


def test_mbpp(tmp_path: Path) -> None:
    (row,), _ = make(tmp_path, "mbpp", MBPP)
    assert row["id"] == "900"
    assert row["prompt"].endswith("tests:\n\n```python\n" + "\n".join(MBPP["test_list"]) + "\n```")
    assert set(read_tests(row["answer"]).names) == {"chain_length", "Link"}
    assert verdicts(row, MBPP["code"], "def chain_length(link): return 2", "x = 1") == [1.0, 0.0, 0.0]


def test_mbpp_sanitized(tmp_path: Path) -> None:
    """A function may have the name of one of Python's own, but only that one is taken from the program."""
    (row,), _ = make(tmp_path, "mbpp_sanitized", SANITIZED)
    assert read_tests(row["answer"]).names == ("sum",)
    cheat = "def sum(x): return 0\ndef set(x): return 0\nimport math\nmath.isclose = lambda *a, **k: True"
    assert verdicts(row, SANITIZED["code"], "sum = lambda x: math.sqrt(x)", cheat) == [1.0, 1.0, 0.0]


def test_mbpp_as_json(tmp_path: Path) -> None:
    """sanitized-mbpp.json is one list."""
    source = tmp_path / "sanitized-mbpp.json"
    source.write_text(json.dumps([SANITIZED]))
    report = prepare(Order("mbpp_sanitized", [source], tmp_path / "out.jsonl"), SHARED["verifiers"])
    assert report.kept == 1


def test_livecodebench(tmp_path: Path) -> None:
    (inputs, calls), _ = make(tmp_path, "livecodebench", LCB, LCB_CALLS)
    assert (inputs["id"], calls["id"]) == ("abc900_a", "3900")
    assert inputs["prompt"].endswith("writes to standard output.")
    assert "class Solution:" in calls["prompt"]
    assert "picture" in calls["prompt"], "a question about code does not depend on its picture"
    assert verdicts(inputs, "print(sum(map(int, input().split())))", "print(3)") == [1.0, 0.0]
    right = "class Solution:\n  def twoLargest(self, xs: List[int], k: int): return tuple(nlargest(k, xs))"
    assert verdicts(calls, right, "def twoLargest(xs, k): return xs") == [1.0, 0.0]


def test_unlabelled(tmp_path: Path) -> None:
    """Neither tests nor solutions are read or written."""
    rows, _ = make(tmp_path, "livecodebench", LCB | {"private_test_cases": "damaged"}, LCB_CALLS, unlabelled=True)
    assert [set(row) for row in rows] == [{"id", "prompt"}] * 2


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def packed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode("ascii")


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "wrong solution": ("humaneval", HUMANEVAL | {"canonical_solution": "    return xs\n"}, "published solution fails"),
    "no check": ("humaneval", HUMANEVAL | {"test": ""}, "no text in the column test"),
    "no Python": ("humaneval", HUMANEVAL | {"test": "def check(candidate"}, "no Python code"),
    "no name": ("humaneval", HUMANEVAL | {"entry_point": "a b"}, "lists the functions"),
    "no tests": ("mbpp", MBPP | {"test_list": []}, "has no tests"),
    "no list": ("mbpp", MBPP | {"test_list": "assert f()"}, "no list of texts in the column test_list"),
    "other names": ("mbpp", MBPP | {"test_list": ["assert abs(1) == 1"], "test_setup_code": ""}, "use no function"),
    "base64": ("livecodebench", LCB | {"private_test_cases": "%%%"}, "cannot be decompressed"),
    "cut": ("livecodebench", LCB | {"private_test_cases": LCB["private_test_cases"][:40]}, "tests cannot be read"),
    "pickle": ("livecodebench", LCB | {"private_test_cases": packed(b"\x80\x04")}, "no pickle of plain data"),
    "JSON": ("livecodebench", LCB | {"public_test_cases": "[1,"}, "one is no JSON"),
    "case": ("livecodebench", LCB | {"public_test_cases": '[{"input": "1"}]'}, 'no "input" and "output"'),
    "kind": ("livecodebench", LCB | {"public_test_cases": json.dumps([case("1", "2", "functional")])}, "other kinds"),
    "function": ("livecodebench", LCB_CALLS | {"metadata": "{}"}, "names no function"),
    "empty": ("livecodebench", LCB | {"public_test_cases": "[]", "private_test_cases": ""}, "has no tests"),
}
# A sound row of each set of programs.
GOOD = {"humaneval": HUMANEVAL, "mbpp": MBPP, "mbpp_sanitized": SANITIZED, "livecodebench": LCB}


def test_every_set_has_a_form() -> None:
    assert set(GOOD) == {name for name, benchmark in BENCHMARKS.items() if benchmark.verifier is Verifier.code}


@pytest.mark.parametrize("name", BAD)
def test_bad_row_is_named(tmp_path: Path, name: str) -> None:
    kind, bad, reason = BAD[name]
    bad = bad | {"task_id": "bad"} if "task_id" in bad else bad
    rows, report = make(tmp_path, kind, GOOD[kind], bad)
    assert len(rows) == 1
    (line,) = report.reasons()
    assert reason in line
    assert "(task:1)" in line or "(bad)" in line


def test_pickle_that_would_run_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    evil = LCB | {"private_test_cases": packed(pickle.dumps(Evil(made)))}
    rows, report = make(tmp_path, "livecodebench", LCB, evil)
    assert len(rows) == 1
    assert "no pickle of plain data (task:1)" in report.reasons()[0]
    assert not made.exists()


def test_bomb_in_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_tempo.rewards.code_tests.LARGEST", 2**20)
    bomb = LCB | {"private_test_cases": packed(bytes(2**21))}
    _, report = make(tmp_path, "livecodebench", LCB, bomb)
    assert "the tests are larger than 1 MiB (task:1)" in report.reasons()[0]


@pytest.mark.parametrize("option", ["prompt_field", "answer_field"])
def test_columns_are_known(tmp_path: Path, option: str) -> None:
    with pytest.raises(InputError, match="the columns of mbpp are known"):
        make(tmp_path, "mbpp", MBPP, **{option: "text"})


def test_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="task:0: there is no column question_content among problem"):
        make(tmp_path, "livecodebench", {"problem": "x"})


def test_custom_set(tmp_path: Path) -> None:
    """The user's own questions: answers that hold no tests are dropped."""
    tests = ProgramTests("inputs", cases=(("1", "1"),)).write()
    rows = [{"q": "One", "a": tests}, {"q": "Two", "a": "assert f() == 2"}]
    kept, report = make(tmp_path, "custom", *rows, prompt_field="q", answer_field="a", verifier=Verifier.code)
    assert [row["answer"] for row in kept] == [tests]
    assert "does not recognise the answer (task:1)" in report.reasons()[0]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "HumanEval.jsonl", tmp_path / "humaneval.jsonl"
    source.write_text(json.dumps(HUMANEVAL) + "\n")
    assert cli.main(["prepare", "humaneval", str(source), "--out", str(out)]) == 0
    assert "1 rows read, 1 questions kept" in capsys.readouterr().out
