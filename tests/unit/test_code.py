"""Programs in responses, the forms of tests, how outputs are compared, and the pool that judges them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import psutil
import pytest

from megatron_tempo.commands import code_sandbox
from megatron_tempo.config.choices import SandboxKind, Verifier
from megatron_tempo.config.schema import CodeConfig, Config, DatasetConfig
from megatron_tempo.errors import EngineError, InputError
from megatron_tempo.rewards import code, code_pool, code_run
from megatron_tempo.rewards.code import CodeScorer, program_of
from megatron_tempo.rewards.code_tests import DEEPEST, ProgramTests, outputs_agree, read_tests, results_agree
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers

ADDS = ProgramTests("asserts", names=("add",), code="assert add(2, 3) == 5\nassert add(-1, 1) == 0").write()
ECHO = ProgramTests("inputs", cases=(("a\n", "a"), ("b", "b"))).write()


def fenced(program: str, mark: str = "python") -> str:
    return f"I would write:\n\n```{mark}\n{program}\n```\n\nThat is all."


PROGRAMS = {
    "marked": (fenced("x = 1"), "x = 1"),
    "py": (fenced("x = 1", "py"), "x = 1"),
    "Python 3": (fenced("x = 1", "Python3"), "x = 1"),
    "attributes": (fenced("x = 1", '{.python startLine="1"}'), "x = 1"),
    "unmarked": (fenced("x = 1", ""), "x = 1"),
    "the last": (fenced("x = 1") + fenced("x = 2"), "x = 2"),
    "marked before unmarked": (fenced("x = 1") + fenced("5 passed", ""), "x = 1"),
    "not the shell's": (fenced("x = 1") + fenced("python x.py", "bash"), "x = 1"),
    "only the shell's": (fenced("python x.py", "bash"), None),
    "tildes": ("~~~python\nx = 1\n~~~", "x = 1"),
    "longer fence": ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''"),
    "words behind the mark": ('```python title="a"\nx = 1\n```', "x = 1"),
    "in a list": ("1. So:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1"),
    "at a list's mark": ("- ```python\n  def f():\n      return 1\n  ```", "def f():\n    return 1"),
    "continues a function": ("```python\n    return 1\n```", "    return 1"),
    "Windows": ("```python\r\nx = 1\r\n```\r\n", "x = 1\r"),
    "not ended": ("```python\nx = 1", None),
    "no fence": ("def f(): return 1", None),
    "in a line": ("Write ```x = 1``` there.", None),
    "empty": (fenced("  \n"), None),
    "nothing": ("", None),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_of_a_response(name: str) -> None:
    response, program = PROGRAMS[name]
    assert program_of(response) == program


def test_reading_is_linear() -> None:
    for text in ("`" * 20_000, "``` " + " " * 20_000 + "`", "```\n" * 5_000, " " * 20_000 + "`", "1. " * 7_000 + "```"):
        began = time.process_time()
        program_of(text)
        assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("output", "wanted", "agree"),
    [
        ("5\n", "5", True),
        ("  5  \n\n", "5", True),
        ("1 2\n3", "1 2 \n3\n", True),
        ("5.0", "5", True),
        ("1e3", "1000", True),
        ("0.5", ".5", True),
        ("0.3333333", "0.3333334", False),  # without a tolerance, as in LiveCodeBench
        ("yes", "Yes", False),
        ("1\n2", "1 2", False),
        ("1 2", "1 2 3", False),
        ("", "5", False),
        ("", "", True),
        ("nan", "nan", True),
        ("sNaN", "nan", False),
        ("1e999999999", "1", False),
        ("50000000000000001", "50000000000000000", False),
    ],
)
def test_outputs(output: str, wanted: str, agree: bool) -> None:
    assert outputs_agree(output, wanted) is agree


@pytest.mark.parametrize(
    ("form", "wanted", "agree"),
    [
        (5, 5, True),
        (5.0, 5, True),
        (True, 1, True),
        ("5", 5, False),
        (None, None, True),
        (None, 0, False),
        ([1, [2]], [1, [2]], True),
        ({"tuple": [1, 2]}, [1, 2], True),
        ([{"tuple": [1, 2]}], [[1, 2]], False),
        ([1], [1, 2], False),
        ({"dict": [["b", 2], ["a", [1]]]}, {"a": [1], "b": 2}, True),
        ({"dict": [["a", 1]]}, {"a": 1, "b": 2}, False),
        ({"dict": [["a", 1], ["a", 1]]}, {"a": 1, "b": 1}, False),
        ({"dict": [[1, 1]]}, {"1": 1}, False),
        ({"dict": [[["a"], 1]]}, {"a": 1}, False),
        ({"dict": 5}, {"a": 1}, False),
        ({"int": hex(2**80)}, 2**80, True),
        ({"int": hex(2**80)}, 2**80 + 1, False),
        ({"set": [1]}, [1], False),
        ({"kept": 0}, [], False),
        (float("nan"), float("nan"), False),
    ],
)
def test_results(form: object, wanted: object, agree: bool) -> None:
    assert results_agree(form, wanted) is agree


def test_deep_result() -> None:
    form = wanted = None
    for _ in range(100_000):
        form, wanted = [form], [wanted]  # type: ignore[assignment]
    assert results_agree(form, wanted) is False


KINDS = (
    ProgramTests("inputs", cases=(("1 2\n", "3\n"),)),
    ProgramTests("calls", names=("add",), cases=(([1, 2], 3), ([[1], {"a": None}], [1.5])), before="import math"),
    ProgramTests("asserts", names=("add", "Node"), code="assert add(1, 2) == 3", call=None, before="import math"),
    ProgramTests("asserts", names=("add",), code="def check(candidate): pass", call="check"),
    ProgramTests("inputs", cases=(("é" * 5000, "y" * 5000),) * 3),
)


@pytest.mark.parametrize("tests", KINDS)
def test_an_answer_keeps_its_tests(tests: ProgramTests) -> None:
    answer = tests.write()
    assert read_tests(answer) == tests
    assert len(answer) < 2100


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("5", "it is a JSON number, not an object"),
        ("assert f() == 1", "it is no JSON"),
        ("{}", '"kind" None; known are inputs, calls, asserts'),
        ('{"kind": "inputs", "tests": []}', "at least one test"),
        ('{"kind": "inputs", "tests": [{"input": "1"}]}', 'test 0 is no object with "input" and "output"'),
        ('{"kind": "inputs", "tests": [{"input": 1, "output": "1"}]}', '"input" and "output" are text'),
        ('{"kind": "calls", "tests": [{"arguments": 1, "result": 1}], "name": "f"}', '"arguments" is a list'),
        ('{"kind": "calls", "tests": [{"arguments": [], "result": 1}]}', '"name" of calls'),
        ('{"kind": "asserts", "names": [], "tests": ""}', '"names" of asserts'),
        ('{"kind": "asserts", "names": ["f"], "tests": "assert ("}', '"tests" is no Python code'),
        ('{"kind": "asserts", "names": ["f"], "tests": "", "call": "f g"}', '"call" of asserts'),
        ('{"kind": "asserts", "names": ["f"]}', '"tests" of the tests is code'),
        ('{"kind": "asserts", "names": ["f"], "tests": ""}', "every program passes them"),
        ('{"kind": "asserts", "names": ["f"], "tests": "def check(c): assert c(1) == 2"}', "every program passes them"),
        ('{"kind": "asserts", "names": ["f"], "tests": "def check(c): pass", "call": "chek"}', "does not define"),
        ('{"kind": "asserts", "names": ["f"], "tests": "return f(1) == 2"}', '"tests" is no Python code'),
        ('{"kind": "asserts", "names": ["class"], "tests": "assert True"}', '"names" of asserts'),
        ('{"kind": "inputs", "tests": [{"input": "", "output": ""}], "before": "def ("}', '"before" is no Python code'),
        ('{"kind": "calls", "name": "f", "tests": [{"arguments": [], "result": NaN}]}', "NaN is no finite number"),
        ('{"kind": "calls", "name": "f", "tests": [{"arguments": [], "result": 1e999}]}', "1e999 is no finite number"),
        ('{"kind": "calls", "kind": "inputs"}', "the name 'kind' is there twice"),
        (
            f'{{"kind": "calls", "name": "f", "tests": [{{"arguments": {"[" * 250}{"]" * 250}, "result": 1}}]}}',
            "200 levels",
        ),
        ("zlib:%%%", "cannot be decompressed"),
        ("zlib:eJw=", "cut short"),
    ],
)
def test_answers_without_tests(answer: str, wrong: str) -> None:
    with pytest.raises(InputError) as caught:
        read_tests(answer)
    assert wrong in str(caught.value)


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers(code=CodeConfig(SandboxKind.subprocess, workers=2, seconds=1, wall_seconds=60)) as verifiers:
        yield verifiers


def score(verifiers: Verifiers, answer: str, *programs: str) -> list[float]:
    return verifiers.score([Item("code", "Add.", program, answer) for program in programs])


@pytest.mark.long
def test_scores_and_counts(verifiers: Verifiers) -> None:
    verifiers.take_counts()
    right, wrong = fenced("def add(a, b): return a + b"), fenced("def add(a, b): return 5")
    fails = fenced("def add(a, b): raise SystemExit(0)")
    assert score(verifiers, ADDS, right, wrong, "no program", fails, right) == [1.0, 0.0, 0.0, 0.0, 1.0]
    first = {"code/programs": 4, "code/none": 1, "code/cached": 1, "code/timeouts": 0, "code/errors": 1}
    assert verifiers.take_counts() == first
    assert verifiers.take_counts() == {}
    assert score(verifiers, ADDS, right, wrong) == [1.0, 0.0]
    assert verifiers.take_counts()["code/cached"] == 2, "the same program by the same tests is not run again"
    assert score(verifiers, ECHO, fenced("print(input())"), right) == [1.0, 0.0]
    assert verifiers.take_counts()["code/cached"] == 0, "it is, by other tests"
    assert score(verifiers, ECHO, fenced("while True: pass")) == [0.0]
    assert verifiers.take_counts()["code/timeouts"] == 1


@pytest.mark.long
def test_verdicts_of_many_programs_are_theirs(verifiers: Verifiers) -> None:
    """Replies come in the order in which programs end, verdicts in the order of the responses."""
    bodies = [f"import time\ntime.sleep({0.05 if i % 3 else 0})\nprint(input() if {i} % 2 else {i})" for i in range(12)]
    assert score(verifiers, ECHO, *map(fenced, bodies)) == [0.0, 1.0] * 6


@pytest.mark.long
def test_pool_that_is_killed(verifiers: Verifiers) -> None:
    """It is started again, and what its sandboxes ran ends with it."""
    assert score(verifiers, ECHO, fenced("print(input())")) == [1.0]
    pool = verifiers._code._pool
    assert pool is not None
    assert pool._process is not None
    process = psutil.Process(pool._process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(20)
    assert score(verifiers, ECHO, fenced("print(input())  # again")) == [1.0]


def test_process_whose_end_is_not_noticed_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next try starts another process, whether the reader of the last one has run or not."""

    class Box:
        name = "subprocess"

    def start(module: str, *arguments: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
        started.append(module)
        command = ["false"] if len(started) == 1 else ["sh", "-c", f"read line; echo '{json.dumps(reply)}'; read line"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if len(started) == 1:
            process.wait()
        return process

    started: list[str] = []
    reply = {"id": 2, "index": 0, "outcome": "right", "why": ""}
    monkeypatch.setattr(code_pool, "start", start)
    pool = code_pool.CodePool(CodeConfig(), Box())  # type: ignore[arg-type]
    read = pool._read
    monkeypatch.setattr(pool, "_read", lambda process: None if len(started) == 1 else read(process))
    assert pool.run(ECHO, ["print(input())"]) == [code_run.Verdict("right")]
    pool.close()
    assert len(started) == 2


@pytest.mark.long
def test_broken_sandbox_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a wrong verdict for everyone. It is found before anything is generated, or when a pool's sandbox fails."""
    with Verifiers(code=CodeConfig(SandboxKind.subprocess, workers=1, python=None)) as verifiers:
        verifiers.score([])
        verifiers._check("code", "Add.", ADDS)
        pool = verifiers._code._pool
        assert pool is not None
        assert pool._process is None, "a question's check starts no pool"
        limits = json.loads(pool._arguments[-1]) | {"memory_mb": "x"}  # no process can lock itself then
        pool._arguments = (*pool._arguments[:-1], json.dumps(limits))
        with pytest.raises(EngineError, match="programs cannot be judged: the sandbox subprocess failed"):
            score(verifiers, ADDS, fenced("def add(a, b): return a + b"))
    monkeypatch.setattr(code_run, "_TRIAL", "raise SystemExit(1)")
    with (
        Verifiers(code=CodeConfig(SandboxKind.subprocess)) as verifiers,
        pytest.raises(InputError, match=r"no sandbox works here: subprocess: a trial program ended as error"),
    ):
        verifiers._check("code", "Add.", ADDS)


def test_sandbox_is_announced_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    class Box:
        name, gaps = "subprocess", ("faults of the kernel",)

    chosen = []

    def choose(kind: SandboxKind, python: str | None) -> tuple[Box, list[str]]:
        chosen.append(kind)
        return Box(), ["bubblewrap: there is no bwrap on PATH; apt install bubblewrap"]

    monkeypatch.setattr(code, "first_working", choose)
    scorer = CodeScorer(CodeConfig())
    with caplog.at_level("INFO"):
        scorer.check("Add.", ADDS)
        scorer.check("Add.", ECHO)
    scorer.close()
    assert chosen == [SandboxKind.auto]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "programs do not run in bubblewrap: there is no bwrap on PATH; apt install bubblewrap"),
        ("INFO", "programs run in the sandbox subprocess, which does not protect from: faults of the kernel"),
    ]


@pytest.mark.parametrize("kind", [Verifier.code, Verifier.math])
def test_check_names_the_sandbox(kind: Verifier, monkeypatch: pytest.MonkeyPatch) -> None:
    class Box:
        name, gaps = "subprocess", ("faults of the kernel",)

    monkeypatch.setattr(code_run, "first_working", lambda *_: (Box(), ["bubblewrap: there is no bwrap on PATH"]))
    config = Config()
    config.evaluation.sets["mine"] = DatasetConfig(path="mine.jsonl", verifier=kind)
    lines = [
        "warning: programs do not run in bubblewrap: there is no bwrap on PATH",
        "programs run in the sandbox subprocess, which does not protect from: faults of the kernel",
    ]
    assert code_sandbox.findings(config) == (lines if kind is Verifier.code else [])


def test_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code, "CACHED", 2)
    scorer = CodeScorer(CodeConfig())
    for key in (b"a", b"b", b"c"):
        scorer._keep({key: code_run.Verdict("right")})
    assert list(scorer._verdicts) == [b"b", b"c"]


def test_equal_programs() -> None:
    scorer = CodeScorer(CodeConfig())
    assert scorer.classes("Add.", [fenced("x"), fenced("y"), "none", fenced("x")]) == [0, 1, None, 0]


@pytest.mark.long
def test_deeply_nested_tests_are_judged(verifiers: Verifiers) -> None:
    """As deep as `read_tests` allows."""
    deep: list[object] = []
    for _ in range(DEEPEST - 3):
        deep = [deep]
    answer = ProgramTests("calls", names=("f",), cases=(([deep], deep),)).write()
    read_tests(answer)
    assert score(verifiers, answer, "```python\ndef f(x): return x\n```", "```python\ndef f(x): return []\n```") == [
        1,
        0,
    ]


@pytest.mark.parametrize("before", ["", "import math", "def f(x):", "def f(x):\n    'Doc.'\n", "class A:\n    x = (1,"])
def test_code_that_a_program_may_continue(before: str) -> None:
    tests = ProgramTests("inputs", cases=(("1", "2"),), before=before)
    assert read_tests(tests.write()) == tests
