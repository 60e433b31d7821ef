"""The fuzzer finds each kind of fault that is planted here. One that is blind would pass everything else."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_tempo.observability import records
from tests.fuzz import __main__ as program
from tests.fuzz.cases import KINDS, maker
from tests.fuzz.judge import Case, Command, Limits, faults

QUICK = Limits(processor=1, memory=64 << 20, clock=3.0)


def tried(run: Callable[[], int], *, may_write: tuple[str, ...] = ()) -> list[str]:
    """What the fuzzer says of a command, given a folder with a.json and a link that leads nowhere."""

    def make(folder: Path) -> Case:
        (folder / "a.json").write_text("{}")
        (folder / "locked.json").write_text("{}")
        (folder / "locked.json").chmod(0)
        (folder / "link").symlink_to("x" * 300)
        return Case([Command("planted", run, may_write=may_write)], ["a.json"])

    return faults(make, QUICK)


def say(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status


def spin() -> int:
    while True:
        pass


def locked() -> int:
    try:
        return len(Path("locked.json").read_text())
    except PermissionError:
        return say("error: a.json", 2)


def fail() -> int:
    raise KeyError("step")


PLANTED: dict[str, tuple[Callable[[], int], str]] = {
    "an exception": (fail, "raises KeyError"),
    "a traceback": (lambda: say("Traceback (most recent call last):", 0), "prints a traceback"),
    "an exit status": (lambda: 7, "exits with 7"),
    "a control character": (lambda: say("a.json: \x1b[31m", 2), "prints U+001B as it is"),
    "a mark of direction": (lambda: say("a.json: \u202e", 2), "prints U+202E as it is"),
    "no UTF-8": (lambda: os.write(1, b"\xff") - 1, "prints what is not UTF-8"),
    "no name": (lambda: say("error: wrong", 2), "does not name any of a.json"),
    "a library's warning": (lambda: say("x.py:3: FutureWarning: old", 0), "prints a library's FutureWarning"),
    "an endless text": (lambda: say("x" * 200_000, 0), "prints 200001 characters"),
    "processor time": (spin, "is slow"),
    "a wait": (lambda: time.sleep(60) or 0, "hangs"),
    "memory": (lambda: len(bytearray(1 << 28)), "raises MemoryError"),
    "a changed file": (lambda: Path("a.json").write_text("") or 0, "changes a.json"),
    "a removed file": (lambda: Path("a.json").unlink() or 0, "changes a.json"),
    "a new file": (lambda: Path("b.json").write_text("") or 0, "changes b.json"),
    "an abort": (os.abort, "the case ends with status -6"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str) -> None:
    run, words = PLANTED[fault]
    (reported,) = tried(run)
    assert words in reported


def test_good_commands_have_no_fault() -> None:
    assert tried(lambda: say("fine\n\t数学", 0)) == []
    assert tried(lambda: say("error: a.json is wrong", 2)) == []
    assert tried(locked) == [], "not even root can read what the case has locked"
    assert tried(lambda: Path("b.json").write_text("") or 0, may_write=("b.json",)) == []


def test_a_fault_planted_in_the_program_is_found_and_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Records that are not checked: `status` then fails at those that the fuzzer damages."""
    options = ["--kind", "run", "--seed", "6", "--cases", "3", "--seconds", "100"]
    monkeypatch.setattr(records, "_wrong", lambda file, record, whole: None)
    assert program.main(options) == 1
    faults = re.findall(r"FAULT of run, seed (\d+): `(.*?) /.*?raises (\w+Error)", capsys.readouterr().out)
    assert any(command.startswith("megatron-tempo") for _, command, _ in faults)
    assert program.main([*options[:2], "--seed", faults[0][0], "--cases", "1"]) == 1
    assert faults[0][2] in capsys.readouterr().out
    monkeypatch.undo()
    assert program.main([*options[:2], "--seed", faults[0][0], "--cases", "1"]) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_depends_on_its_kind_and_seed_alone(kind: str, tmp_path: Path) -> None:
    made: list[Any] = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        case = maker(kind, 3)(folder)
        made.append(json.dumps([case.done, case.names, [command.text for command in case.commands]]))
    assert made[0].replace(str(tmp_path / "one"), "") == made[1].replace(str(tmp_path / "two"), "")
    assert json.loads(made[0])[0], "something is damaged"
