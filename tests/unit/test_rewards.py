"""Verifiers: right and wrong answers, hostile text, and workers that die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_tempo.config.choices import Verifier
from megatron_tempo.rewards.answers import last_boxed
from megatron_tempo.rewards.math import RESPONSE_CHARS
from megatron_tempo.rewards.math_classes import Classes
from megatron_tempo.rewards.math_pool import MEMORY_MB
from megatron_tempo.rewards.scorer import Item
from megatron_tempo.rewards.verifiers import Verifiers
from megatron_tempo.types import LabelledPrompt, UnlabelledPrompt

PAIRS = json.loads((Path(__file__).parents[1] / "fixtures" / "math_pairs.json").read_text())
ENDLESS = r"\boxed{10^{10^{10^{10}}}}"
HOSTILE = {
    "tower": "The answer is 9**9**9**9",
    "tower in a box": r"\boxed{9^{9^{9^{9}}}}",
    "endless tower": ENDLESS,
    "factorials": r"\boxed{((((9!)!)!)!)!}",
    "big factorial": r"\boxed{100000000!}",
    "sum": r"\boxed{\sum_{i=1}^{10^{12}} \frac{1}{i^3+1}}",
    "power of a sum": r"\boxed{(x+y+z)^{5000}}",
    "megabyte of digits": r"\boxed{" + "7" * 2**20 + "}",
    "megabyte of text": "answer " * 2**17,
    "megabyte of lines": "\n" * 2**20,
    "braces": "{" * 100_000 + "}" * 100_000,
    "parentheses in a box": r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "open boxes": "\\boxed{" * 100_000,
    "boxes in boxes": "\\boxed{" * 100_000 + "1" + "}" * 100_000,
    "fractions": r"\boxed{" + r"\frac{1}{1+" * 100 + "x" + "}" * 101,
    "open brackets": "\\[ a " * 20_000,
    "open dollars": "$$ a " * 20_000,
    "null bytes": "\x00" * 1000 + "\\boxed{4\x002}",
    "surrogates": "\\boxed{\ud800\udfff\ud800}",
    "matrix": r"\boxed{\begin{pmatrix}" + r"1&2&3\\" * 180 + r"\end{pmatrix}}",
    "python": "The answer is __import__('os').abort()",
    "json": '"}\n{"correct": true, "retire": false}\n',
}


def item(answer: str, response: str) -> Item:
    return Item("math", "Find it.", response, answer)


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    """The math workers below a process, each of which has a child that answers."""
    workers = []
    for worker in process.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "megatron_tempo.rewards.math_worker" in " ".join(worker.cmdline()):
                workers.append(worker)
    return workers


def children() -> list[psutil.Process]:
    """The processes that answer."""
    processes = []
    for worker in workers_of(psutil.Process()):
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += worker.children()
    return processes


@pytest.fixture(scope="module")
def verifiers() -> Iterator[Verifiers]:
    with Verifiers(workers=1, seconds=30) as verifiers:
        yield verifiers


def test_every_verifier_of_the_config_is_known(verifiers: Verifiers) -> None:
    assert set(verifiers.names) == set(Verifier.__members__)


@pytest.mark.parametrize(("verdict", "kind"), [(1.0, "equivalent"), (0.0, "wrong")])
def test_pairs(verifiers: Verifiers, verdict: float, kind: str) -> None:
    pairs = PAIRS[kind]
    assert len(pairs) >= 25
    scores = verifiers.score([item(answer, response) for answer, response in pairs])
    assert [pair for pair, score in zip(pairs, scores, strict=True) if score != verdict] == []


def test_the_end_of_a_long_response_counts(verifiers: Verifiers) -> None:
    thought = "Let us think about it. " * (RESPONSE_CHARS // 10)
    scores = verifiers.score([item("42", thought + r"\boxed{42}"), item("42", r"\boxed{42}" + thought)])
    assert scores == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{1} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {3}", "3"),
        (r"{ \boxed{1} \boxed{2", "1"),
        (r"} \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{}", ""),
        (r"\boxed{1", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_last_boxed(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


def test_countdown_and_math_in_one_call(verifiers: Verifiers) -> None:
    right = "2 * 4 = 8 + 5 = 13 - 6 = 7 n $"
    items = [
        Item("countdown", "2 4 5 6 > 7 :", right, "*+-"),
        item("7", r"\boxed{7}"),
        Item("countdown", "2 4 5 6 > 8 :", right, "*+-"),
        item("7", r"\boxed{8}"),
        Item("countdown", "2 4 5 6 > 7 :", "\ud800" * 2**20, "*+-"),
    ]
    assert verifiers.score(items) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert verifiers.score([]) == []


# name: responses, their classes
CLASSES = {
    "numbers": ([r"\boxed{0.5}", r"So \boxed{\frac12}.", r"\boxed{1}", r"\boxed{ 1/2 }"], [0, 0, 1, 0]),
    "boxed or not": ([r"\boxed{42}", "The answer is 42.", "no number at all", "The answer is $42$."], [0, 0, None, 0]),
    "terms": ([r"\boxed{x^2+1}", r"\boxed{2}", r"\boxed{1+x^2}", r"\boxed{2}", r"\boxed{}"], [0, 1, 0, 1, None]),
    "the last box": ([r"\boxed{1} no, \boxed{2}", r"\boxed{2}", r"\boxed{1}"], [0, 0, 1]),
    "none": (["", "who knows", r"\boxed{}"], [None, None, None]),
    "too long": ([r"\boxed{" + "7" * 2001 + "}", r"\boxed{7}"], [None, 0]),
    "several boxes": (
        [r"\boxed{4} and \boxed{9}", r"\boxed{9}", r"\boxed{4, 9}", r"\boxed{9}, \boxed{4}"],
        [0, 1, 0, 0],
    ),
    "per cent with its number": ([r"\boxed{30\%}", r"\boxed{0.3}", r"\boxed{30}"], [0, 1, 0]),
    "per cent without it": ([r"\boxed{30\%}", r"\boxed{0.3}", r"\boxed{3}"], [0, 0, 1]),
    "per cent as a fraction": ([r"\boxed{0.3\%}", r"\boxed{0.3}", r"\boxed{0.003}"], [0, 1, 0]),
    "degrees": ([r"\boxed{60^\circ}", r"\boxed{\pi/3}", r"\boxed{60}", r"\boxed{60°}"], [0, 1, 0, 0]),
    "units": ([r"\boxed{5\text{ cm}}", r"\boxed{5\text{ m}}", r"\boxed{5}", r"\boxed{5 cm}"], [0, 1, 0, 0]),
    "bases": ([r"\boxed{1001_2}", r"\boxed{9}", r"\boxed{11_8}"], [0, 0, 1]),
    "end tokens": (["So it is 1/2<|im_end|>", r"\boxed{1/2}</s>", "The answer is 1.<|endoftext|>"], [0, 0, 1]),
    "thoughts": ([r"<think>\boxed{4}</think>\boxed{5}", r"\boxed{5}", r"<think>\boxed{5}"], [0, 0, None]),
    "not to be parsed": ([r"\boxed{a \mid 6}", r"\boxed{6}", r"\boxed{a\mid 6}"], [0, 1, 0]),
    "functions": ([r"\boxed{\tan x}", r"\boxed{\frac{\sin 2x}{1+\cos 2x}}", r"\boxed{\cot x}"], [0, 0, 1]),
}


def partition(classes: Sequence[int | None]) -> set[frozenset[int]]:
    return {frozenset(i for i, number in enumerate(classes) if number == one) for one in classes if one is not None}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_mathematical_answers(verifiers: Verifiers, name: str) -> None:
    responses, classes = CLASSES[name]
    assert verifiers.classes("math", "Find it.", responses) == classes
    reverse = verifiers.classes("math", "Find it.", responses[::-1])[::-1]
    assert partition(reverse) == partition(classes), "the order of the responses does not decide"


def test_right_and_wrong_responses_are_never_of_one_class(verifiers: Verifiers) -> None:
    """For each answer of the fixture with responses of both kinds, boxed as itself too."""
    by_answer: dict[str, list[tuple[str, float]]] = {}
    for verdict, kind in ((1.0, "equivalent"), (0.0, "wrong")):
        for answer, response in PAIRS[kind]:
            by_answer.setdefault(answer, []).append((response, verdict))
    mixed = {answer: judged for answer, judged in by_answer.items() if len({verdict for _, verdict in judged}) == 2}
    assert len(mixed) >= 5
    for answer, judged in mixed.items():
        classes = verifiers.classes("math", "", [response for response, _ in judged])
        verdicts: dict[int, set[float]] = {}
        for number, (_, verdict) in zip(classes, judged, strict=True):
            if number is not None:
                verdicts.setdefault(number, set()).add(verdict)
        assert all(len(of_class) == 1 for of_class in verdicts.values()), answer


def test_classes_of_countdown(verifiers: Verifiers) -> None:
    one, other = "2 * 4 = 8 + 5 = 13 - 6 = 7 n $", "2 + 4 = 6 - 5 = 1 + 6 = 7 y $"
    wrong, slip = "2 + 4 = 6 + 5 = 11 + 6 = 17 y $", "2 * 4 = 8 + 5 = 13 - 6 = 8 y $"
    assert verifiers.classes("countdown", "2 4 5 6 > 9 :", [wrong, one, slip, other, wrong]) == [0, 1, None, 1, 0]
    with pytest.raises(ValueError, match="no countdown question"):
        verifiers.classes("countdown", "Find 1+1.", [])


def test_questions_whose_answers_cannot_be_read_are_named() -> None:
    prompts = [UnlabelledPrompt("a", "2 4 > 8 :", ()), UnlabelledPrompt("b", "Find 1+1.", ())]
    with Verifiers() as fresh:
        with pytest.raises(ValueError, match=r"prompt 'b': prompt 'Find 1\+1\.' is no countdown question"):
            fresh.check_questions("countdown", prompts)
        with pytest.raises(ValueError, match="verifier 'maths' is unknown"):
            fresh.check_questions("maths", prompts)
        fresh.check_questions("math", prompts)
        assert children_started_by(fresh) == 0


@pytest.mark.long
def test_a_hostile_answer_spoils_no_other() -> None:
    """It is no answer, wherever it comes, and the others are what they were."""
    sound = [r"\boxed{1}", r"\boxed{2}", r"\boxed{1.0}"]
    with Verifiers(workers=1, seconds=2.5) as fresh:
        fresh.classes("math", "", sound)  # the worker has started
        for place in (0, 2):
            responses = [*sound[:place], ENDLESS, *sound[place:]]
            wanted: list[int | None] = [0, 1, 0]
            wanted.insert(place, None)
            assert fresh.classes("math", "", responses) == wanted


def answer(text: str, at: float | None = None, kind: str = "", unit: str = "") -> dict[str, Any]:
    """An answer as a worker reads it; `at` is its value."""
    points = None if at is None else [[at, 0.0]]
    value = [[at / 100, 0.0]] if at is not None and kind == "%" else points
    return {"statement": [text, True, ""], "kind": kind, "unit": unit, "form": "", "face": points, "value": value}


class Compares:
    """Equal is what begins with the same letter. Whatever is compared with "tar" takes too long."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def equal(self, one: list[Any], other: list[Any], by: str) -> bool | None:
        self.asked.append((one[0], other[0]))
        return None if "tar" in (one[0], other[0]) else bool(one[0][0] == other[0][0])


def test_the_largest_class_is_tried_first_and_one_that_takes_too_long_spoils_no_other() -> None:
    worker = Compares()
    texts = ["b1", "tar", "c1", "c2", "b2", "tar", "d1", "c3"]
    assert Classes(worker, 9.0).numbers([answer(text) for text in texts]) == [0, 1, 2, 2, 0, 1, 3, 2]
    # Once "tar" has taken too long twice it is compared no more; the same text needs no comparison.
    assert worker.asked == [
        ("b1", "tar"),
        ("b1", "c1"), ("tar", "c1"), ("b1", "c2"), ("c1", "c2"), ("c1", "b2"), ("b1", "b2"),
        ("b1", "d1"), ("c1", "d1"), ("b1", "c3"), ("c1", "c3"),
    ]  # fmt: skip


def test_answers_whose_values_differ_are_not_compared() -> None:
    worker = Compares()
    read = [answer(f"{i}", i) for i in range(16)] + [answer("7.0", 7), None, answer("7 of unknown value")]
    assert Classes(worker, 9.0).numbers(read) == [*range(16), 7, None, 7]
    assert worker.asked == [("7", "7.0"), ("7", "7 of unknown value")], "the larger class first"


def test_comparisons_of_an_answer_end_with_its_time() -> None:
    worker = Compares()
    assert Classes(worker, 0.0).numbers([answer("b1"), answer("b2"), answer("b1")]) == [0, 1, 0]
    assert worker.asked == []


def test_unusable_items_are_refused_before_any_is_judged() -> None:
    wrong = [
        (Item("maths", "", r"\boxed{1}", "1"), "verifier 'maths' is unknown; known are math, countdown"),
        (Item("math", "", r"\boxed{1}", 1), "the answer 1 is int; give it as text"),  # type: ignore[arg-type]
        (Item("math", "", r"\boxed{1}", " "), "the answer is empty"),
        (Item("math", "", r"\boxed{1}", "1" * 3000), "the answer has 3000 characters; the math verifier takes 2000"),
        (Item("countdown", "Find 1+1.", "2", "2"), "prompt 'Find 1\\+1.' is no countdown question"),
    ]
    with Verifiers() as fresh:
        for unusable, words in wrong:
            with pytest.raises(ValueError, match=words):
                fresh.score([item("1", r"\boxed{1}"), unusable])
            prompts = [LabelledPrompt("p", unusable.prompt, (1,), unusable.answer, unusable.verifier)] * 12
            with pytest.raises(ValueError, match=f"prompt 'p': {words}(.|\n)*and 2 more"):
                fresh.check(prompts)
        fresh.check([LabelledPrompt("p", "Find 1+1.", (1,), "2", "math")])
        assert children_started_by(fresh) == 0


def children_started_by(verifiers: Verifiers) -> int:
    """Workers now, less those of a close: what `verifiers` alone has started."""
    before = len(children())
    verifiers.close()
    return before - len(children())


def test_numbers_of_workers_and_seconds_are_checked() -> None:
    with pytest.raises(ValueError, match="at least one worker and some time"):
        Verifiers(workers=0)
    with pytest.raises(ValueError, match="at least one worker and some time"):
        Verifiers(seconds=0)


def run_hostile(names: Iterable[str], seconds: float) -> None:
    """Each hostile response gets 0 within the limit, in bounded memory and one worker; the sound ones are right."""
    spare = 10.0  # on a machine busy with other things
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            with contextlib.suppress(psutil.NoSuchProcess):
                peak = max([peak, *(worker.memory_info().rss for worker in children())])
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with Verifiers(workers=1, seconds=seconds) as fresh:
            fresh.score([item("1", r"\boxed{1}")])
            workers = workers_of(psutil.Process())
            for name in names:
                started = time.monotonic()
                scores = fresh.score([item("x^2+1", HOSTILE[name]), item("x^2+1", r"\boxed{1+x^2}")])
                assert scores == [0.0, 1.0], name
                assert time.monotonic() - started < seconds + spare, name
            assert workers_of(psutil.Process()) == workers, "none was started again"
    finally:
        done.set()
        watcher.join()
    assert 30 * 2**20 < peak < MEMORY_MB * 2**20


@pytest.mark.slow
def test_every_hostile_text() -> None:
    run_hostile(HOSTILE, seconds=5)


@pytest.mark.long
def test_hostile_text() -> None:
    endless = {"tower in a box", "factorials", "big factorial", "sum", "power of a sum", "parentheses in a box"}
    run_hostile([name for name in HOSTILE if name not in endless], seconds=2.5)


@contextlib.contextmanager
def bare_worker(seconds: float) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A worker that is ready, and the process that answers."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "megatron_tempo.rewards.math_worker", str(MEMORY_MB), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:
        yield worker, psutil.Process(hears(worker)["ready"])
    assert worker.returncode == 0


def hears(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    line: dict[str, Any] = json.loads(worker.stdout.readline())
    return line


def says(worker: subprocess.Popen[str], response: str) -> None:
    assert worker.stdin is not None
    worker.stdin.write(json.dumps({"id": 1, "answer": "x^2+1", "response": response}) + "\n")
    worker.stdin.flush()


def test_bare_worker_judges_within_its_limits() -> None:
    with bare_worker(5) as (worker, process):
        assert process.rlimit(psutil.RLIMIT_AS)[0] == MEMORY_MB * 2**20
        assert process.rlimit(psutil.RLIMIT_NPROC) == (0, 0)
        assert process.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        says(worker, r"\boxed{1+x^2}")
        assert hears(worker) == {"id": 1, "correct": True, "exhausted": False, "retire": False}


@pytest.mark.long
def test_memory_of_a_worker_is_limited() -> None:
    with bare_worker(300) as (worker, process):
        room = process.memory_info().vms + 4 * 2**20
        process.rlimit(psutil.RLIMIT_AS, (room, room))
        says(worker, r"\boxed{\{10^{30000000}\}}")  # a number of 12 MB
        reply = hears(worker)
        assert "ready" in reply or not reply.get("correct", False)
        assert process.memory_info().vms <= room
        says(worker, r"\boxed{1+x^2}")
        assert hears(worker)["correct"] is True


@pytest.mark.long
def test_worker_whose_trainer_keeps_no_time_ends_its_answer_by_itself() -> None:
    with bare_worker(1) as (worker, process):
        says(worker, ENDLESS)
        reply = hears(worker)
        assert reply["ended"] == -signal.SIGXCPU
        assert reply["ready"] != process.pid
        says(worker, r"\boxed{1+x^2}")
        assert hears(worker)["correct"] is True


def test_what_takes_too_long_is_counted_and_costs_no_restart() -> None:
    with Verifiers(workers=1, seconds=0.3) as fresh:
        assert fresh.take_counts() == {}, "nothing was asked"
        before = workers_of(psutil.Process())
        fresh.score([item("1", r"\boxed{1}")])
        workers = workers_of(psutil.Process())
        assert len(workers) == len(before) + 1
        started = time.monotonic()
        assert fresh.score([item("1", ENDLESS), item("1", r"\boxed{1}")] * 3) == [0.0, 1.0] * 3
        assert time.monotonic() - started < 8
        assert workers_of(psutil.Process()) == workers
        assert fresh.take_counts() == {"math/timeouts": 3, "math/failures": 0}
        assert fresh.classes("math", "", [ENDLESS, r"\boxed{1}"]) == [None, 0]
        assert fresh.take_counts() == {"math/timeouts": 1, "math/failures": 0}
        assert fresh.take_counts() == {"math/timeouts": 0, "math/failures": 0}


QUOTIENTS = [
    rf"\boxed{{\frac{{\sin({k}x)+\cos(x)^{{{k + 1}}}+{k}\tan x}}{{\cos({k + 1}x)+\sin^2 x + {k}}}}}"
    for k in range(1, 17)
]


def test_distinct_functions_are_told_apart_by_their_values(verifiers: Verifiers) -> None:
    """Pairs of these, simplified one by one, took five minutes."""
    started = time.monotonic()
    assert verifiers.classes("math", "", [*QUOTIENTS, QUOTIENTS[3]]) == [*range(16), 3]
    assert time.monotonic() - started < 15


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_worker_killed_in_the_middle_of_an_item(workers: int) -> None:
    """The worker that has the endless item is killed from outside, and once more; all others are judged right."""
    items = [item(str(number), rf"\boxed{{{number}}}") for number in range(8)]
    items.insert(3, item("42", ENDLESS))
    killed: list[int] = []

    def kill() -> None:
        deadline = time.monotonic() + 120
        while len(killed) < 2 and time.monotonic() < deadline:
            for worker in children():
                try:
                    busy = worker.cpu_times().user > 2 and worker.pid not in killed
                    # After its start a worker takes milliseconds for a sound item: this one has the endless item.
                    if busy and worker.cpu_percent(interval=0.5) > 20:
                        os.kill(worker.pid, signal.SIGKILL)
                        killed.append(worker.pid)
                except psutil.NoSuchProcess:
                    continue
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    with Verifiers(workers, seconds=60) as fresh:
        killer.start()
        scores = fresh.score(items)
        killer.join()
        assert len(killed) == 2
        assert scores == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_idle_worker_killed_between_items(verifiers: Verifiers) -> None:
    assert verifiers.score([item("1", r"\boxed{1}")]) == [1.0]
    for of in (children, lambda: workers_of(psutil.Process())):
        (worker,) = of()
        worker.kill()
        worker.wait(timeout=20)
        assert verifiers.score([item("1", r"\boxed{1}"), item("2", r"\boxed{1}")]) == [1.0, 0.0]
        (successor,) = of()
        assert successor.pid != worker.pid


def test_workers_start_when_needed_stay_and_end_with_close() -> None:
    before = {worker.pid for worker in children()}
    with Verifiers(workers=2) as fresh:
        assert {worker.pid for worker in children()} == before
        fresh.score([item("1", r"\boxed{1}")])
        first = {worker.pid for worker in children()} - before
        fresh.score([item("1", r"\boxed{1}")])
        assert {worker.pid for worker in children()} - before == first
        assert len(first) == 1
    assert {worker.pid for worker in children()} == before


def test_workers_end_when_their_trainer_is_killed() -> None:
    code = (
        "import time; from megatron_tempo.rewards.verifiers import Item, Verifiers; v = Verifiers(1);"
        "v.score([Item('math', '', 'x', '1')]); print('ready', flush=True); time.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    with trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"ready\n"
        processes = psutil.Process(trainer.pid).children(recursive=True)
        assert len(processes) == 2
        trainer.kill()
    assert psutil.wait_procs(processes, timeout=20)[1] == []


def test_rewards_and_worker_load_neither_torch_nor_more_than_needed() -> None:
    code = (
        "import sys; import megatron_tempo.rewards.verifiers; assert 'math_verify' not in sys.modules;"
        "import megatron_tempo.rewards.math_worker; assert 'math_verify' in sys.modules;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_worker_that_cannot_start_is_an_error_not_a_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Verifiers(1) as fresh, pytest.raises(RuntimeError, match="ended with code 1 before it was ready"):
        fresh.score([item("1", r"\boxed{1}")])
