"""The log of the package: what reaches which stream, with which words before it, and what stays silent."""

from __future__ import annotations

import ast
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tempo.config.choices import LogLevel
from megatron_tempo.config.schema import MetricsConfig
from megatron_tempo.observability import logs
from megatron_tempo.observability.metrics import Metrics
from megatron_tempo.observability.records import read_warnings
from tests.support.fork_server import ROOT

PACKAGE = ROOT / "megatron_tempo"
log = logging.getLogger("megatron_tempo.some.module")


def spoken(capsys: pytest.CaptureFixture[str], **how: object) -> tuple[list[str], list[str]]:
    """What a message of each level writes to standard output and error."""
    logs.configure(**how)  # type: ignore[arg-type]
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logs.ALERT, logging.ERROR):
        log.log(level, "of level %d", level)
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


ALL = ["of level 20", "warning: of level 30", "alert: of level 35", "error: of level 40"]


@pytest.mark.parametrize(("level", "shown"), [("info", ALL), ("warning", ALL[1:]), ("error", ALL[3:])])
def test_the_first_rank_prints_bare_messages_of_its_level(
    capsys: pytest.CaptureFixture[str], level: str, shown: list[str]
) -> None:
    assert spoken(capsys, rank=0, run="one", level=LogLevel[level].value) == (shown, [])


def test_other_ranks_name_themselves_and_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    prefixed = [line.replace(": ", ": rank 3 of one: ") for line in ALL[1:]]
    assert spoken(capsys, rank=3, run="one") == ([], prefixed)
    assert spoken(capsys, rank=3, run="one", level=logging.ERROR) == ([], prefixed[2:])
    assert spoken(capsys, rank=12)[1][0] == "warning: rank 12: of level 30"


def test_a_later_call_replaces_an_earlier_one(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(rank=5)
    assert spoken(capsys, rank=0) == (ALL, [])


def test_other_packages_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    logs.configure(rank=0)
    assert (root.level, root.handlers) == before
    for name in ("megatron.core.x", "transformers.models", "httpx", "torch.distributed", "megatron_tempoX"):
        logging.getLogger(name).info("noise")
    assert capsys.readouterr() == ("", "")


def test_a_root_handler_of_a_library_repeats_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(rank=0)
    other = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(other)
    try:
        log.info("once")
    finally:
        logging.getLogger().removeHandler(other)
    assert capsys.readouterr().out == "once\n"


def test_a_message_is_safe_for_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(rank=0)
    log.info("a %s\nb", "\x1b[31m\u202e\x9b\r")
    log.info("100% of %s")  # no arguments: a percent sign is one
    assert capsys.readouterr().out == "a \u241b[31m<U+202E><U+009B>\u240d\nb\n100% of %s\n"


def test_a_handler_of_ones_own_gets_rank_and_run(tmp_path: Path) -> None:
    logs.configure(rank=2, run="one", level=logging.ERROR)
    own = logging.FileHandler(tmp_path / "log")
    own.setFormatter(logging.Formatter("%(levelname)s %(run)s/%(rank)d %(name)s %(message)s"))
    logger = logging.getLogger(logs.PACKAGE)
    logger.addHandler(own)
    try:
        log.info("saved")
        logs.configure(rank=2, run="two")  # which leaves it there
        log.warning("lost")
    finally:
        logger.removeHandler(own)
        own.close()
    assert (tmp_path / "log").read_text().splitlines() == [
        "INFO one/2 megatron_tempo.some.module saved", "WARNING two/2 megatron_tempo.some.module lost"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "rank"), [(None, 0), ("0", 0), ("17", 17), ("x", 0), ("-1", 0), ("", 0), ("9" * 5000, 0)]
)
def test_the_rank_is_the_launchers(text: str | None, rank: int) -> None:
    assert logs.rank_of({} if text is None else {"RANK": text}) == rank


def test_warnings_are_records_and_the_rest_is_not(tmp_path: Path) -> None:
    logs.configure(rank=0, level=logging.ERROR)  # whatever the console shows
    log.warning("before %s", "it is open")
    with Metrics(tmp_path, MetricsConfig(), is_writer=True, begun=False) as metrics:
        log.warning("early")
        assert not list(tmp_path.iterdir())
        metrics.begin()
        for level in (logging.INFO, logging.WARNING, logs.ALERT, logging.ERROR):
            log.log(level, "level %d", level)
        thread = threading.Thread(target=log.warning, args=("of a thread",))
        thread.start()
        thread.join()
    log.warning("after")
    with Metrics(tmp_path / "other", MetricsConfig(), is_writer=False):
        log.warning("on another rank")
    assert [record["text"] for record in read_warnings(tmp_path)] == ["early", "level 30", "level 40", "of a thread"]
    assert not (tmp_path / "other").exists()


def test_a_warning_that_cannot_be_recorded_is_shown_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Metrics(tmp_path, MetricsConfig(), is_writer=True):
        (tmp_path / "warnings.jsonl").symlink_to("/dev/full")
        log.warning("one")
        log.warning("two")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "warnings.jsonl" not in line] == ["warning: one", "warning: two"]
    assert len(lines) == 3


# The end of a process

ENDING = """
import logging, os, sys, threading
from megatron_tempo.observability import logs
logs.configure(rank=int(sys.argv[1]), run="one")
logging.getLogger("megatron_tempo.x").warning("the last words")
os._exit(1)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_message_before_an_abort_is_not_lost(rank: int) -> None:
    """Into pipes, where Python keeps output until it is flushed, and os._exit flushes nothing."""
    done = subprocess.run([sys.executable, "-c", ENDING, str(rank)], capture_output=True, text=True, cwd=ROOT)
    said = "warning: rank 1 of one: the last words\n" if rank else "warning: the last words\n"
    assert (done.stdout, done.stderr) == (("", said) if rank else (said, ""))


def test_a_child_that_is_forked_while_a_thread_logs_can_log() -> None:
    logger = logging.getLogger(logs.PACKAGE)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        for handler in logger.handlers:
            handler.acquire()
        held.set()
        release.wait(60)
        for handler in logger.handlers:
            handler.release()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        threading.Thread(target=lambda: (threading.Event().wait(30), os._exit(9)), daemon=True).start()
        log.warning("in the child")
        os._exit(0)
    release.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# The sources: code that ends a process, and the ways to speak

# They print the result of a command or a banner, or speak a protocol. What else there is to say is logged.
MAY_PRINT = {
    "cli.py", "commands/convert.py", "commands/prepare.py", "commands/rehearse.py", "nullgpu/guard.py",
    "observability/logs.py", "observability/terminal.py", "rehearsal/forks.py",
    "rewards/math_worker.py",
}  # fmt: skip


def calls(name: str) -> Iterator[tuple[str, int]]:
    """Every call of a function of this name in the package, as file and line."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and name in (
                getattr(node.func, "id", None),
                getattr(node.func, "attr", None),
            ):
                yield path.relative_to(PACKAGE).as_posix(), node.lineno


def test_only_results_are_printed() -> None:
    assert {file for file, _ in calls("print")} <= MAY_PRINT


def test_one_file_configures_the_log() -> None:
    for name in ("basicConfig", "setLogRecordFactory", "StreamHandler", "setFormatter"):
        assert {file for file, _ in calls(name)} <= {"observability/logs.py"}


def test_no_signature_takes_a_function_that_logs() -> None:
    takers = [
        f"{path.relative_to(PACKAGE)}:{node.lineno} {node.arg}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.arg) and node.annotation and "Callable[[str], None]" in ast.unparse(node.annotation)
    ]
    # They act: end the process, or write a record.
    allowed = ("runtime/folder_lock.py", "observability/metrics.py", "rehearsal/meter.py")
    assert [taker for taker in takers if not taker.startswith(allowed)] == []


@pytest.mark.parametrize("file", ["runtime/watchdog.py", "runtime/stop_request.py", "runtime/folder_lock.py"])
def test_what_ends_a_process_takes_no_lock_of_the_log(file: str) -> None:
    """Functions that call os._exit, and those of signal handlers, write to a file descriptor."""
    functions = {
        node.name: node
        for node in ast.walk(ast.parse((PACKAGE / file).read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    ending = {name for name, node in functions.items() if "os._exit(" in ast.unparse(node)}
    ending |= {"_report", "_write", "_note", "_on_signal", "_listen"} & functions.keys()
    assert ending
    for name in ending:
        body = ast.unparse(functions[name])
        assert "log." not in body
        assert "print(" not in body
