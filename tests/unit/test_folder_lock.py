"""One process a folder: the lock, its takeover, and what a refused attempt leaves."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_tempo.errors import InputError
from megatron_tempo.runtime import folder_lock
from megatron_tempo.runtime.folder_lock import FolderLock, Holder, parse
from tests.support.fork_server import ROOT


def lock(path: Path, command: str = "train", **options: object) -> FolderLock:
    quick = {"watch": 0.3, "patience": 0.0, "beat": 0.05, "log": lambda _: None} | options
    return FolderLock(path, "run.dir=RUN", command, "give another run.dir", **quick)  # type: ignore[arg-type]


def elsewhere(**changes: object) -> Holder:
    """A holder on another machine."""
    here = Holder.here("train")
    return replace(here, host="node9", pid=4242, machine="another", token="theirs", **changes)  # type: ignore[arg-type]


def left(path: Path, holder: Holder) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))


@pytest.fixture
def counting(tmp_path: Path) -> Iterator[Path]:
    """A lock whose holder lives on another machine, on a file system whose flock does not reach this one."""
    path, over = tmp_path / "run/lock.json", threading.Event()
    left(path, elsewhere())

    def count() -> None:
        number = 0
        while not over.wait(0.02):
            number += 1
            fresh = path.with_name("fresh")
            left(fresh, replace(elsewhere(), count=number))
            fresh.replace(path)

    thread = threading.Thread(target=count)
    thread.start()
    yield path
    over.set()
    thread.join()


def test_a_second_process_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run/lock.json"
    with lock(path), pytest.raises(InputError) as raised:
        lock(path, "eval").acquire()
    assert str(raised.value).startswith(f"run.dir=RUN is in use by process {os.getpid()} on ")
    assert "(train, since " in str(raised.value)
    assert str(raised.value).endswith("wait until it has ended, or end it, or give another run.dir")


def test_nothing_is_left_of_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "new/deeper/run/lock.json"
    with lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
    path.parent.mkdir(parents=True)
    with lock(path):
        (path.parent / "metrics.jsonl").touch()
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_refused_attempt_leaves_the_holders_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with lock(path, beat=100.0):
        before = path.read_bytes(), path.stat().st_mtime_ns
        with pytest.raises(InputError):
            lock(path).acquire()
        assert (path.read_bytes(), path.stat().st_mtime_ns) == before


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_tempo.runtime.folder_lock import FolderLock
FolderLock(Path(sys.argv[1]), "run.dir=RUN", "train", "").acquire()
if sys.argv[2] == "with a child":  # which has the file open, as long as it lives
    if (child := os.fork()) == 0:
        os.closerange(0, 3)
        signal.pause()
    print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["alone", "with a child"])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lock.json"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(path), kind], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    try:
        assert done.returncode == -9, done.stderr
        assert path.exists()
        began = time.monotonic()
        with lock(path, watch=60.0):
            assert time.monotonic() - began < 5, "a process of this machine need not be watched"
            with pytest.raises(InputError):
                lock(path).acquire()
    finally:
        if done.stdout:
            os.kill(int(done.stdout), 9)


def test_a_copied_folder_is_not_locked(tmp_path: Path) -> None:
    with lock(tmp_path / "lock.json"):
        (tmp_path / "copy").mkdir()
        (tmp_path / "copy/lock.json").write_bytes((tmp_path / "lock.json").read_bytes())
        with lock(tmp_path / "copy/lock.json", watch=60.0):
            pass


def test_a_holder_on_another_machine_that_counts_is_alive(counting: Path) -> None:
    with pytest.raises(InputError, match=r"in use by process 4242 on node9 \(train, since "):
        lock(counting, watch=10.0).acquire()
    holder = parse(counting.read_bytes())
    assert holder is not None
    assert holder.token == "theirs"


def test_a_holder_on_another_machine_that_does_not_count_is_dead(tmp_path: Path) -> None:
    path, messages = tmp_path / "lock.json", []
    left(path, elsewhere(since=time.time() + 1e6))  # whatever its clock says
    with lock(path, log=messages.append):
        holder = parse(path.read_bytes())
        assert holder is not None
        assert holder.pid == os.getpid()
    (line,) = messages
    assert "process 4242 on node9" in line
    assert not path.exists()


def test_without_flock_the_counter_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", absent)
    path = tmp_path / "lock.json"
    with lock(path, watch=0.2), pytest.raises(InputError, match=f"in use by process {os.getpid()} on "):
        lock(path, watch=5.0).acquire()
    left(path, replace(Holder.here("train"), born="1"))  # a process of this number that has ended
    with lock(path, watch=0.2):
        pass


def test_of_two_that_take_over_at_a_time_the_later_record_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock.json"
    left(path, elsewhere())
    write = FolderLock._write

    def overtaken(self: FolderLock, file: int, holder: Holder) -> None:
        write(self, file, holder)
        left(path, elsewhere(command="eval"))

    monkeypatch.setattr(FolderLock, "_write", overtaken)
    with pytest.raises(InputError, match=r"process 4242 on node9 \(eval"):
        lock(path, watch=0.1).acquire()


def test_a_process_that_has_lost_its_lock_is_told(tmp_path: Path) -> None:
    path, messages, lost = tmp_path / "lock.json", [], threading.Event()

    def note(why: str) -> None:
        messages.append(why)
        lost.set()

    held = lock(path, on_lost=note)
    held.acquire()
    path.unlink()  # as a suspended machine finds it: another one has taken over
    left(path, elsewhere())
    assert lost.wait(10)
    held.release()
    assert "was taken over by process 4242 on node9" in messages[0]
    assert path.exists(), "the lock is the other's"


def test_a_file_of_the_users_is_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    path.write_text("my notes")
    with pytest.raises(InputError, match=r"lock\.json is not a lock of this program: move it away"):
        lock(path).acquire()
    assert path.read_text() == "my notes"
    path.write_text(json.dumps(asdict(elsewhere()) | {"since": "yesterday"}))
    with pytest.raises(InputError, match=r"is not a lock of this program"):
        lock(path).acquire()
    left(path, elsewhere(since=1e300))
    with lock(path, watch=0.1):
        pass
    for empty in (b"", b"\0" * 10):  # of a machine that lost its power
        path.write_bytes(empty)
        with lock(path, watch=0.1):
            pass


def test_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with lock(path):
        first = parse(path.read_bytes())
        deadline = time.monotonic() + 10
        while parse(path.read_bytes()) == first and time.monotonic() < deadline:
            time.sleep(0.01)
        assert parse(path.read_bytes()) != first
    assert folder_lock.WATCH > 4 * folder_lock.BEAT
