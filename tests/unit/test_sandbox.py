"""Hostile programs, in both sandboxes: what they must not do, and that they gain no verdict by it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_tempo.config.choices import SandboxKind
from megatron_tempo.errors import InputError
from megatron_tempo.rewards import sandbox
from megatron_tempo.rewards.code_run import ProgramLimits, SandboxError, first_working, judge
from megatron_tempo.rewards.code_tests import ProgramTests
from megatron_tempo.rewards.sandbox import Interpreter, Sandbox, Subprocess, compiled, sandboxes
from megatron_tempo.rewards.sandboxed import lockdown, syscalls

pytestmark = pytest.mark.long  # a process for each program

LIMITS = ProgramLimits(seconds=20.0, wall_seconds=300.0, memory_mb=256)  # so that no load matters
SHORT = ProgramLimits(seconds=0.2, wall_seconds=1.0, memory_mb=256)
HELD = ProgramTests("inputs", cases=(("", "held"),))
EACH_KIND = (
    HELD,
    ProgramTests("calls", names=("f",), cases=(([], None),)),
    ProgramTests("asserts", names=("f",), code="f()"),
)
SECRET = 918273645


@pytest.fixture(scope="module", params=["bubblewrap", "subprocess"])
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    kind = SandboxKind[request.param]
    try:
        first_working(kind, None)
    except InputError as error:
        if kind is SandboxKind.subprocess:
            raise
        pytest.skip(str(error))
    with compiled(sandboxes(kind, None)[0]) as ready:
        yield ready


def attempt(*codes: str) -> str:
    """A program that prints "held" for each code that raises or calls `held`, "escaped" if it runs to its end."""
    tries = "\n".join(
        "def attack():\n" + "\n".join(f"    {line}" for line in code.splitlines()) + "\nprint(outcome(attack))"
        for code in codes
    )
    return f"""
import ctypes, gc, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
class Held(Exception): pass
def held(is_held):
    if is_held: raise Held
def outcome(attack):
    try: attack()
    except (Held, OSError, MemoryError, ValueError): return "held"
    return "escaped"
{tries}
"""


# None of them would do harm outside if it succeeded.
ATTACKS = {
    "fork": "os.fork()",
    "fork by C": "held(libc.fork() < 0)",
    "fork by vfork": "held(libc.syscall(58 if os.uname().machine == 'x86_64' else 1071) < 0)",
    "fork by clone": "held(libc.syscall(56 if os.uname().machine == 'x86_64' else 220, 17, 0, 0, 0, 0) < 0)",
    "a shell": "held(os.system('true') != 0)",
    "a command": "subprocess.run(['/bin/true'])",
    "spawn": "os.posix_spawn('/bin/true', ['true'], {})",
    "network": "socket.create_connection(('127.0.0.1', 9))",
    "name server": "socket.getaddrinfo('example.com', 80)",
    "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    "unix socket": "socket.socket(socket.AF_UNIX).connect('/run/systemd/private')",
    "pair to elsewhere": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', '/dev/log')",
    "signal the parent": "os.kill(os.getppid(), 0)",
    "signal everything": "os.kill(-1, 0)",
    "signal by a file": "import fcntl; fcntl.fcntl(0, 10, 9)",  # F_SETSIG
    "signal by a file to others": "import fcntl; fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())",
    "signal by a pair of sockets": "import fcntl; fcntl.ioctl(socket.socketpair()[0], 0x8901, bytes(4))",  # FIOSETOWN
    "attributes of files": "held(libc.syscall(463, 0, None, 0, None, None, 0) < 0 and ctypes.get_errno() == 1)",
    "a call of the future": "held(libc.syscall(4000, 0, 0, 0) < 0 and ctypes.get_errno() == 38)",
    "a group of its own": "os.setsid()",
    "trace": "held(libc.ptrace(16, os.getppid(), 0, 0) < 0)",
    "more time": "resource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
    "more memory": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "limits of others": "resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))",
    "priority": "os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)",
    "survive the parent": "held(libc.prctl(1, 0, 0, 0, 0) < 0)",
    "namespace": "held(libc.unshare(0x10000000) < 0)",
    "mount": "held(libc.mount(b'none', b'/none', b'tmpfs', 0, None) < 0 and ctypes.get_errno() == 1)",
    "memory": "bytearray(2**33)",
    "memory in pieces": "kept = [bytearray(2**24) for _ in range(64)]",
    "memory outside the limit": "os.memfd_create('x')",
    "shared memory": "held(libc.shmget(0, 2**30, 0o1600) < 0)",
    "keys of the kernel": "held(libc.syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -4, 0) < 0)",
    "large file": "open('/tmp/large', 'wb').write(bytes(2**26))",
    "many files": "[open(f'/tmp/{i}', 'wb').write(bytes(2**19)) for i in range(100)]",
    "many open files": "kept = [os.open('/dev/null', 0) for _ in range(1000)]",
    "write to the code": "open(sys.modules['sandboxed'].__path__[0] + '/main.py', 'a')",
    "write to the interpreter": "open(os.__file__, 'a')",
    "read passwords": "open('/etc/passwd').read()",
    "read another process": "open('/proc/1/environ').read()",
    "read its parent": "open(f'/proc/{os.getppid()}/mem', 'rb').read()",
    "environment": "held('SECRET_KEY' not in os.environ and len(os.environ) < 12)",
    "descriptors": "[os.write(place, b'x') for place in range(3, 64)]",
}


def test_attacks_are_held(box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_KEY", "x")
    together = ProgramTests("inputs", cases=(("", "held\n" * len(ATTACKS)),))
    if judge(attempt(*ATTACKS.values()), together, LIMITS, box) != ("right", ""):
        failed = [name for name, code in ATTACKS.items() if judge(attempt(code), HELD, LIMITS, box) != ("right", "")]
        pytest.fail(f"not held: {failed}")


def test_attack_is_noticed(box: Sandbox) -> None:
    """The programs above can print both."""
    both = ProgramTests("inputs", cases=(("", "escaped\nheld"),))
    assert judge(attempt("pass", "raise OSError"), both, LIMITS, box) == ("right", "")


def test_files_outside(box: Sandbox, tmp_path: Path) -> None:
    """The answers can be neither read nor changed, and nothing is left behind."""
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"answer": "{SECRET}"}}')
    os.utime(data, (1, 1))
    attacks = (
        "print(open(PATH).read())",
        "open(PATH, 'w')",
        "open(PATH, 'a')",
        "os.truncate(PATH, 0)",
        "os.unlink(PATH)",
        "os.rename(PATH, PATH + '2')",
        "os.link(PATH, PATH + '2')",
        "os.symlink('/', PATH + '2')",
        "os.mkdir(PATH + '2')",
        "os.mkfifo(PATH + '2')",
        "os.chmod(PATH, 0)",
        "os.utime(PATH)",
        "os.listdir(os.path.dirname(PATH))",
        "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
        "os.rmdir(os.path.dirname(PATH))",
    )
    if box.name == "bubblewrap":
        attacks = tuple(one for one in attacks if "TMPFILE" not in one)  # it has a /tmp of its own
    tries = "\n".join(f"try:\n    {one}\n    print('escaped: ' + {one!r})\nexcept OSError: pass" for one in attacks)
    program = f"import os\nPATH = {str(data)!r}\n{tries}\nprint('held')"
    assert judge(program, HELD, LIMITS, box) == ("right", "")
    assert data.read_text() == f'{{"answer": "{SECRET}"}}'
    assert data.stat().st_mtime == 1
    assert os.listdir(tmp_path) == ["data.jsonl"]


def test_own_files_are_gone(box: Sandbox) -> None:
    """Of what one program writes, the next one sees nothing."""
    write = "try:\n    open('/tmp/left', 'w').write('x')\nexcept OSError: pass\nprint('held')"
    assert judge(write, HELD, LIMITS, box).outcome == "right"
    look = "import os\nprint('escaped' if os.path.exists('/tmp/left') else 'held')"
    assert judge(look, HELD, LIMITS, box).outcome == "right"
    assert not Path("/tmp/left").exists()


ENDLESS = {
    "busy": ("while True: pass", "timeout"),
    "busy, deaf": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
        "timeout error",
    ),
    "sleep": ("import time\ntime.sleep(1000)", "timeout"),
    "thread": ("import threading, time\nthreading.Thread(target=time.sleep, args=(1000,)).start()", "timeout"),
    "output": ("while True: print('x' * 10000)", "error"),
    "errors": ("import sys\nwhile True: sys.stderr.write('x' * 10000)", "timeout error"),
    "crash": ("import ctypes\nctypes.string_at(0)", "error"),
    "recursion": ("import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()", "error timeout"),
    "compiler": ("eval('(' * 100000)", "error"),
    "no descriptors": ("import os\nos.closerange(0, 1000)", "error wrong"),
    "its own end": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "error"),
    "exit before the answer": ("import os\nos._exit(0)\nprint('held')", "wrong"),
    "failure behind the answer": ("print('held')\nraise SystemExit(1)", "error"),
    "syntax": ("def", "error"),
    "null": ("print('held')\0", "error"),
    "not UTF-8": ("import os\nos.write(1, b'held\\xff')", "wrong"),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_program_that_does_not_end_well(box: Sandbox, name: str) -> None:
    program, outcomes = ENDLESS[name]
    before = set(psutil.Process().children(recursive=True))
    limits = SHORT if "timeout" in outcomes else LIMITS
    assert judge(program, HELD, limits, box).outcome in outcomes.split()
    left = set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(left, timeout=20)  # what bubblewrap's first process leaves, the kernel ends
    assert not alive


def test_threads_are_allowed(box: Sandbox) -> None:
    """The customary way to a deep recursion: it must not be taken for an attack."""
    program = """
import sys, threading
sys.setrecursionlimit(10**5)
threading.stack_size(2**26)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
def main(): print('held' if depth(20000) == 20000 else 'lost')
thread = threading.Thread(target=main)
thread.start()
thread.join()
"""
    assert judge(program, HELD, LIMITS, box) == ("right", "")


def test_asyncio_is_allowed(box: Sandbox) -> None:
    program = "import asyncio\nasync def f(): print('held')\nasyncio.run(f())"
    assert judge(program, HELD, LIMITS, box) == ("right", "")


def test_sets_are_in_the_same_order(box: Sandbox) -> None:
    names = "{'alpha', 'beta', 'gamma', 'delta', 'epsilon'}"
    order = " ".join(
        subprocess.run(
            [sys.executable, "-c", f"print(*{names})"], env={"PYTHONHASHSEED": "0"}, capture_output=True, check=True
        )
        .stdout.decode()
        .split()
    )
    assert judge(f"print(*{names})", ProgramTests("inputs", cases=(("", order),) * 2), LIMITS, box).outcome == "right"


# Programs that return `SECRET` or pass the test without computing it. The functions' names are in the tests.
CHECK = f"def check(candidate):\n    assert candidate(3) == {SECRET}\n    assert abs(candidate(4) - {SECRET}.5) < 1e-6"
DIGEST = hashlib.sha256(str(SECRET).encode()).hexdigest()
FORGERS = {
    "exit": "import sys\nsys.exit(0)",
    "exit at the call": "import sys\ndef f(n): sys.exit(0)",
    "exit at once": "import os\nos._exit(0)",
    "exit at once at the call": "import os\ndef f(n): os._exit(0)",
    "exit later": "import atexit, os\natexit.register(os._exit, 0)\ndef f(n): raise KeyboardInterrupt",
    "always equal": """
class Equal:
    def __eq__(self, other): return True
    def __sub__(self, other): return self
    def __abs__(self): return self
    def __lt__(self, other): return True
    def __bool__(self): return True
def f(n): return Equal()
""",
    "an equal number": """
class Equal(int):
    def __eq__(self, other): return True
    def __sub__(self, other): return self
    def __lt__(self, other): return True
    def __abs__(self): return self
    __hash__ = int.__hash__
def f(n): return Equal(1)
""",
    "not a number": "def f(n): return float('nan')",
    "builtins": """
import builtins
builtins.abs = lambda x: 0
builtins.AssertionError = ValueError
builtins.isinstance = lambda *a: True
def abs(x): return 0
def f(n): return 0
""",
    "patched modules": "import json\njson.dumps = lambda *a: '{\"value\": 1}'\ndef f(n): return 0",
    "verdicts on all descriptors": """
import os
def f(n):
    for place in range(64):
        try: os.write(place, b'{"outcome": "right", "why": ""}\\n')
        except OSError: pass
    return 0
""",
    "results on all descriptors": """
import os
for place in range(64):
    try: os.write(place, b'{"value": 0}\\n{"value": {"kept": 0}}\\n' * 9)
    except OSError: pass
def f(n): return 0
""",
    "damaged messages": """
import os
for place in range(64):
    try: os.write(place, b'[[[[{"value": {"set": [[]]}}\\n{"raised": 5}\\n\\xff\\n' + b'[' * 100000 + b'\\n')
    except OSError: pass
def f(n): return 0
""",
    "messages of another form": """
import os
for place in range(64):
    try: os.write(place, b'{"value": {"set": [[]]}}\\n')
    except OSError: pass
def f(n): return 0
""",
    "an endless message": """
import os
def f(n):
    while True:
        for place in range(1, 64):
            try: os.write(place, b'x' * 60000)
            except OSError: pass
""",
    "an endless iterator": "def f(n):\n    while True: yield 1",
    "search of the memory": f"""
import gc, hashlib, os, sys
def right(value): return hashlib.sha256(str(value).encode()).hexdigest() == {DIGEST!r}
def f(n):
    found, seen, todo = [], set(), [sys._getframe(i) for i in range(3)] + gc.get_objects() + [os.environ, sys.argv]
    while todo and len(seen) < 200000:
        one = todo.pop()
        if id(one) in seen: continue
        seen.add(id(one))
        if isinstance(one, int) and right(one): return one
        if isinstance(one, str):
            found += [int(word) for word in one.replace(',', ' ').split() if word.isdigit() and right(word)]
        else: todo += gc.get_referents(one)
    return found[0] if found else 0
""",
    "search of descriptors": f"""
import hashlib, os, re
def f(n):
    for place in range(64):
        os.set_blocking(place, False) if os.path.exists('/dev/null') else None
    text = b''
    for place in range(64):
        try: text += os.read(place, 10**6)
        except OSError: pass
    for word in re.findall(rb'[0-9]+', text):
        if hashlib.sha256(word).hexdigest() == {DIGEST!r}: return int(word)
    return 0
""",
}


@pytest.mark.parametrize("kind", ["asserts", "calls"])
@pytest.mark.parametrize("name", FORGERS)
def test_forged_result_is_wrong(box: Sandbox, name: str, kind: str) -> None:
    calls = ProgramTests("calls", names=("f",), cases=(([3], SECRET), ([4], SECRET + 1)))
    tests = calls if kind == "calls" else ProgramTests("asserts", names=("f",), code=CHECK, call="check")
    limits = ProgramLimits(seconds=1.0, wall_seconds=3.0, memory_mb=256)
    assert judge(FORGERS[name], tests, limits, box).outcome in ("wrong", "error", "timeout", "output")


def test_honest_result_is_right(box: Sandbox) -> None:
    program = f"def f(n): return {{3: {SECRET}, 4: {SECRET}.5}}[n]"
    assert judge(program, ProgramTests("asserts", names=("f",), code=CHECK, call="check"), LIMITS, box) == ("right", "")
    calls = ProgramTests("calls", names=("f",), cases=(([3], SECRET), ([4], SECRET + 0.5)))
    assert judge(program, calls, LIMITS, box) == ("right", "")


VALUES = (
    *("None", "True", "1", "-2.5", "float('inf')", "1j", "'é\\ud800'", "b'\\x00'", "bytearray(b'a')", "[1, [2]]"),
    *("(1, (2,))", "{1, 2}", "frozenset({1})", "{'a': 1, (1, 2): [3]}", "2**70", "-(2**64)"),
    *("__import__('decimal').Decimal('1.50')", "__import__('fractions').Fraction(1, 3)"),
    "__import__('collections').deque([1, 2])",
)


def test_plain_data_arrives_unchanged(box: Sandbox) -> None:
    """Each value, as an argument and as a result, is compared with itself made in the tests."""
    code = "\n".join(f"assert same({one}) == {one} and type(same({one})) is type({one}), {one!r}" for one in VALUES)
    assert judge("def same(x): return x", ProgramTests("asserts", names=("same",), code=code), LIMITS, box) == (
        "right",
        "",
    )


def test_objects_of_the_program(box: Sandbox) -> None:
    """Classes, attributes, iterators, exceptions and functions that tests use stay with the program."""
    program = """
class Node:
    def __init__(self, value): self.value, self.left = value, None
def depth(node): return 0 if node is None else 1 + depth(node.left)
def count(n):
    for i in range(n): yield i
def fail(text): raise KeyError(text)
def twice(function, value): return function(function(value))
class Odd(ValueError): pass
def odd(): raise Odd('x')
def pairs(): return {'a': (1, Node)}
"""
    code = """
root = Node(1)
root.left = Node(2)
assert depth(root) == 2 and root.left.value == 2
assert list(count(3)) == [0, 1, 2] and sum(count(4)) == 6
try: fail('k')
except KeyError as error: assert error.args == ("'k'",)
else: assert False
try: odd()
except ValueError: pass
assert twice(depth, root) if False else True
assert Node(1) != Node(1) and root == root
assert pairs()['a'][0] == 1
import math
assert math.isclose(len(list(count(2))), 2)
"""
    names = ("Node", "depth", "count", "fail", "twice", "odd", "pairs")
    assert judge(program, ProgramTests("asserts", names=names, code=code), LIMITS, box) == ("right", "")


def test_tests_that_catch_everything(box: Sandbox) -> None:
    """A program that ends is not right because the tests catch what its end raises."""
    code = "for i in range(3):\n    try: f(i)\n    except BaseException: pass"
    tests = ProgramTests("asserts", names=("f",), code=code)
    assert judge("def f(n): return n", tests, LIMITS, box).outcome == "right"
    assert judge("import os\ndef f(n): os._exit(0)", tests, LIMITS, box).outcome == "error"


def test_code_before(box: Sandbox) -> None:
    """The program and the asserts both have what stands before it: helpers of the question, imports."""
    before = "from typing import List\ndef helper(x): return x + 1\ndef f(x: List[int]) -> int:\n    '''Add.'''\n"
    tests = ProgramTests("asserts", names=("f",), code="assert f([1]) == helper(1)", before=before)
    assert judge("def f(x: List[int]): return helper(x[0])", tests, LIMITS, box) == ("right", "")
    assert judge("    return helper(x[0])", tests, LIMITS, box) == ("right", "")  # continues the question's function
    hidden = "def helper(x): return 9\ndef f(x): return 9"
    assert judge(hidden, tests, LIMITS, box).outcome == "wrong"


MAIN_GUARDS = ("unittest.main()", "sys.exit(main())", "n = int(input()); print(f(n))")


def test_functions_behind_a_main_guard(box: Sandbox) -> None:
    """What is under the guard runs if the program is, not if its functions are called."""
    calls = ProgramTests("calls", names=("f",), cases=(([1], 2),))
    asserts = ProgramTests("asserts", names=("f",), code="assert f(1) == 2")
    for code in MAIN_GUARDS:
        program = (
            f"import sys, unittest\ndef f(a): return a + 1\ndef main(): pass\nif __name__ == '__main__':\n    {code}"
        )
        for tests in (calls, asserts):
            assert judge(program, tests, LIMITS, box) == ("right", ""), code
    inputs = ProgramTests("inputs", cases=(("1", "2"),))
    assert judge(program, inputs, LIMITS, box) == ("right", "")
    record = "from dataclasses import dataclass\n@dataclass\nclass R:\n    x: int\ndef f(a): return R(a).x + 1"
    assert judge(record, calls, LIMITS, box) == ("right", "")


def test_programs_as_an_ordinary_python_runs_them(box: Sandbox) -> None:
    """Imports from __future__ behind the question's code, `exit` and `quit`, and annotations that are evaluated."""
    tests = ProgramTests("calls", names=("f",), cases=(([1], 2),), before="import math")
    future = "from __future__ import annotations\ndef f(a: Unknown): return a + 1"
    assert judge(future, tests, LIMITS, box) == ("right", "")
    assert judge("def f(a: Unknown): return a + 1", tests, LIMITS, box).outcome == "error"
    for end in ("exit", "quit"):
        inputs = ProgramTests("inputs", cases=(("1", "2"),), before="import math")
        assert judge(f"print(int(input()) + 1)\n{end}()\nprint(3)", inputs, LIMITS, box) == ("right", "")


def test_sandbox_that_does_not_start(box: Sandbox) -> None:
    """It is an error, and no verdict."""

    class Broken(Subprocess):
        def command(self) -> list[str]:
            return ["sh", "-c", "echo no such namespace >&2; exit 1"]

    broken = Broken(Interpreter.find(None))
    for tests in (
        HELD,
        ProgramTests("calls", names=("f",), cases=(([], 1),)),
        ProgramTests("asserts", names=("f",), code="f()"),
    ):
        with pytest.raises(SandboxError, match="no such namespace"):
            judge("print('held')", tests, LIMITS, broken)


def test_process_that_cannot_lock_itself(box: Sandbox, tmp_path: Path) -> None:
    """A program never runs with a part of its locks."""

    class Unlocked(Subprocess):
        def lock(self) -> dict[str, object]:
            return super().lock() | {"readable": ["\0"]}

    unlocked, out = Unlocked(Interpreter.find(None)), tmp_path / "out"
    program = f"open({str(out)!r}, 'w')\ndef f(): pass"
    for tests in (
        HELD,
        ProgramTests("calls", names=("f",), cases=(([], None),)),
        ProgramTests("asserts", names=("f",), code="f()"),
    ):
        with pytest.raises(SandboxError):
            judge(program, tests, LIMITS, unlocked)
    assert not out.exists()


def test_without_bubblewrap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="no bwrap on PATH; apt install bubblewrap"):
        sandboxes(SandboxKind.bubblewrap, None)
    found, why = first_working(SandboxKind.auto, None)
    assert found.name == "subprocess"
    assert why == ["bubblewrap: there is no bwrap on PATH; apt install bubblewrap"]


def test_bubblewrap_without_rights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container that allows no namespaces."""
    bwrap = tmp_path / "bwrap"
    bwrap.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    bwrap.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(bwrap))
    found, why = first_working(SandboxKind.auto, None)
    assert found.name == "subprocess"
    assert "No permissions to create new namespace" in why[0]
    with pytest.raises(InputError, match=r"no sandbox works here: .*No permissions.*rewards\.code\.sandbox=auto"):
        first_working(SandboxKind.bubblewrap, None)


def test_gaps_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = Interpreter.find(None)
    open_to_all = Subprocess(interpreter, filtered=False, landlock=0)
    assert any("Landlock" in gap for gap in open_to_all.gaps)
    assert any("network" in gap for gap in open_to_all.gaps)
    assert open_to_all.lock() == {"processes": 0, "readable": None, "filtered": False}
    assert not any("network" in gap for gap in Subprocess(interpreter, filtered=True, landlock=1).gaps)


def test_interpreter_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"rewards\.code\.python: /none does not run as a Python"):
        Interpreter.find("/none")
    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "OLDEST", (9, 0))
        with pytest.raises(InputError, match=r"is Python 3\.\d+; give 9\.0 or later"):
            Interpreter.find(None)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("kind", ["bubblewrap", "subprocess"])
def test_as_an_ordinary_user(kind: str) -> None:
    python = shutil.which("python3", path="/usr/bin")
    if python is None or (kind == "bubblewrap" and shutil.which("bwrap") is None):
        pytest.skip("the system has no python3 or no bwrap")
    if not all(folder.stat().st_mode & 0o001 for folder in sandbox.INSIDE.parents):
        pytest.skip("other users cannot read this checkout")
    try:
        Interpreter.find(python)
    except InputError as error:
        pytest.skip(str(error))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            ready = sandboxes(SandboxKind[kind], python)[0]
            tests = ProgramTests("asserts", names=("f",), code="assert f() == 'held'")
            wanted = [judge("def f(): return 'held'", tests, LIMITS, ready).outcome == "right"]
            held = ProgramTests("inputs", cases=(("", "held\n" * len(ATTACKS)),))
            wanted += [judge(attempt(*ATTACKS.values()), held, LIMITS, ready).outcome == "right"]
            status = 0 if all(wanted) else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


HEADERS = {
    0: Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    1: Path("/usr/include/asm-generic/unistd.h"),  # AArch64 uses the generic numbers
}


@pytest.mark.parametrize("column", HEADERS)
def test_numbers_of_system_calls(column: int) -> None:
    """As in the kernel's headers; calls that are younger than these are left out."""
    if not HEADERS[column].exists():
        pytest.skip(f"{HEADERS[column]} is not installed")
    lines = HEADERS[column].read_text()
    published = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", lines)}
    known = syscalls.DENIED | syscalls.JUDGED
    checked = {name: numbers[column] for name, numbers in known.items() if name in published}
    assert len(checked) > 80
    assert checked == {name: published[name] for name in checked}
    missing = {name for name, numbers in known.items() if name not in published and numbers[column] >= 0}
    younger = {"fchmodat2", "memfd_secret", "setxattrat", "removexattrat", "open_tree_attr", "file_setattr"}
    assert missing <= younger
    assert max(numbers[column] for numbers in known.values()) < syscalls.UNKNOWN


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_program(machine: str) -> None:
    """The filter, run by an interpreter of classic BPF of our own."""
    column = 0 if machine == "x86_64" else 1
    program = lockdown.filter_program(machine, 77)

    def allows(name: str, *arguments: int) -> bool:
        numbers = syscalls.DENIED | syscalls.JUDGED
        words = [numbers[name][column], lockdown._MACHINES[machine][1], 0, 0]
        for value in [*arguments, *[0] * 6][:6]:
            words += [value % 2**32, value >> 32]
        return run_filter(program, words) == 0x7FFF0000

    denied = [name for name, numbers in syscalls.DENIED.items() if numbers[column] >= 0]
    assert not any(allows(name) for name in denied)
    assert run_filter(program, [4000, lockdown._MACHINES[machine][1], *[0] * 14]) == 0x00050000 | 38
    passing = [("fcntl", 3, 1), ("fcntl", 3, 4, 0x800), ("fcntl", 3, 1030), ("ioctl", 1, 0x5413), ("prctl", 2)]
    assert all(allows(*call) for call in passing)
    failing = [("fcntl", 3, command) for command in (8, 10, 15, 2**32 + 8)]
    assert not any(allows(*call) for call in [*failing, ("ioctl", 3, 0x8901), ("ioctl", 3, 0x8902)])
    passing = [("clone", 0x00010000 | 17), ("kill", 77), ("prlimit64", 0), ("prlimit64", 77), ("sendto", 5, 1, 1, 0, 0)]
    assert all(allows(*call) for call in [*passing, ("prctl", 15), ("tgkill", 77)])
    failing = [("clone", 17), ("kill", 78), ("tgkill", 1, 1, 9), ("prlimit64", 78), ("prctl", 1)]
    assert not any(allows(*call) for call in failing)
    assert not any(allows("sendto", 5, 1, 1, 0, address) for address in (2**40, 8))
    assert run_filter(program, [0, 1, *[0] * 14]) == 0x80000000, "the system calls of another machine"
    assert run_filter(program, [63, lockdown._MACHINES[machine][1], *[0] * 14]) == 0x7FFF0000


def run_filter(program: bytes, words: list[int]) -> int:
    """The result of a filter on the 32-bit words that it sees."""
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = struct.unpack_from("=HBBI", program, 8 * at)
        at += 1
        if code == 0x20:
            accumulator = words[value // 4]
        elif code == 0x06:
            return value
        else:
            jumps = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}
            at += if_true if jumps[code] else if_false
