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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_tempo.config.choices import Verifier
from megatron_tempo.rewards.math import MEMORY_MB, RESPONSE_CHARS, MathScorer, Worker
from megatron_tempo.rewards.math_worker import last_boxed
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


def children() -> list[psutil.Process]:
    workers = psutil.Process().children(recursive=True)
    return [worker for worker in workers if "megatron_tempo.rewards.math_worker" in " ".join(worker.cmdline())]


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
}


@pytest.mark.parametrize("name", CLASSES)
def test_classes_of_mathematical_answers(verifiers: Verifiers, name: str) -> None:
    responses, classes = CLASSES[name]
    assert verifiers.classes("math", "Find it.", responses) == classes


def test_right_and_wrong_responses_are_never_of_one_class(verifiers: Verifiers) -> None:
    """For each answer of the fixture with responses of both kinds, boxed as itself too."""
    by_answer: dict[str, list[tuple[str, float]]] = {}
    for verdict, kind in ((1.0, "equivalent"), (0.0, "wrong")):
        for answer, response in PAIRS[kind]:
            by_answer.setdefault(answer, []).append((response, verdict))
    mixed = {answer: found for answer, found in by_answer.items() if len({verdict for _, verdict in found}) == 2}
    assert len(mixed) >= 5
    for answer, found in mixed.items():
        classes = verifiers.classes("math", "", [response for response, _ in found])
        verdicts: dict[int, set[float]] = {}
        for number, (_, verdict) in zip(classes, found, strict=True):
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


class Compares(Worker):
    """Equal is what begins with the same letter. Whoever is compared with "tar" takes too long, and "tar" itself at all
    times where it is `endless`."""

    endless = False

    def __init__(self) -> None:
        super().__init__(1.0)
        self.asked: list[list[str]] = []

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        known, response = request["known"], request["response"]
        self.asked.append(known)
        if response == "tar" and self.endless:
            return None
        for place, other in enumerate(known):
            if other == "tar":
                return None
            if other[0] == response[0]:
                return {"equal": place, "answer": response}
        return {"equal": None, "answer": response}


def test_the_largest_class_is_tried_first_and_one_that_takes_too_long_spoils_no_other() -> None:
    scorer, worker = MathScorer(1, 1.0), Compares()
    scorer._workers = [worker]
    assert scorer.classes("", ["b1", "tar", "c1", "c2", "b2", "tar", "d1", "c3"]) == [0, 1, 2, 2, 0, 1, 3, 2]
    # "c1" takes too long: it is asked about alone, and against each one. Then "tar" is compared no more.
    assert worker.asked == [
        [], ["b1"], ["b1", "tar"], [], ["b1"], ["tar"],
        ["b1", "c1"], ["c1", "b1"], ["b1", "c1"], ["b1", "c1"], ["b1", "c1", "d1"],
    ]  # fmt: skip
    worker.asked, worker.endless = [], True
    assert scorer.classes("", ["b1", "tar", "b2", "c1", "c2", "c3"]) == [0, None, 0, 1, 1, 1]
    assert worker.asked == [[], ["b1"], [], ["b1"], ["b1"], ["b1", "c1"], ["b1", "c1"]]


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
    """Each hostile response gets 0 within the limit and a restart, in bounded memory; the sound ones are right."""
    restart = 20.0  # on a machine busy with other things
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
            for name in names:
                started = time.monotonic()
                scores = fresh.score([item("x^2+1", HOSTILE[name]), item("x^2+1", r"\boxed{1+x^2}")])
                assert scores == [0.0, 1.0], name
                assert time.monotonic() - started < seconds + restart, name
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


def ask_worker(seconds: float, response: str, room: int | None = None) -> tuple[dict[str, bool] | None, int]:
    """What a bare worker says to one response, and its exit code; `room` bytes of memory are left to it if given."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "megatron_tempo.rewards.math_worker", str(MEMORY_MB), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert json.loads(worker.stdout.readline()) == {"ready": True}
        process = psutil.Process(worker.pid)
        assert process.rlimit(psutil.RLIMIT_AS)[0] == MEMORY_MB * 2**20
        if room is not None:
            process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + room,) * 2)
        worker.stdin.write(json.dumps({"answer": "x^2+1", "response": response}) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    return json.loads(line) if line else None, worker.returncode


def test_bare_worker_judges() -> None:
    assert ask_worker(5, r"\boxed{1+x^2}") == ({"correct": True, "exhausted": False, "retire": False}, 0)


@pytest.mark.long
def test_memory_of_a_worker_is_limited() -> None:
    reply, _ = ask_worker(300, HOSTILE["power of a sum"], room=64 * 2**20)
    assert reply is None or reply["exhausted"] or reply["correct"] is False


@pytest.mark.long
def test_worker_whose_trainer_keeps_no_time_ends_by_itself() -> None:
    assert ask_worker(1, ENDLESS) == (None, -signal.SIGXCPU)


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
    (worker,) = children()
    worker.kill()
    assert verifiers.score([item("1", r"\boxed{1}"), item("2", r"\boxed{1}")]) == [1.0, 0.0]
    (successor,) = children()
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
        (worker,) = psutil.Process(trainer.pid).children()
        trainer.kill()
    assert psutil.wait_procs([worker], timeout=20)[1] == []


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
