"""Files and folders that get their names when they are complete: what a reader finds after every way to fail."""

from __future__ import annotations

import ast
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_tempo import files
from megatron_tempo.files import atomic_folder, atomic_paths, atomic_write, publish_folder, replace_file, temporaries_in
from tests.support.file_size import file_size_limit

OLD, NEW = b"old" * 10_000, b"new" * 20_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "state.json"
    path.write_bytes(OLD)
    return path


def test_a_file_is_written_whole(path: Path) -> None:
    with atomic_write(path, fsync=True) as file:
        file.write(NEW)
        file.flush()
        assert path.read_bytes() == OLD
    assert path.read_bytes() == NEW
    replace_file(path, "é\n", fsync=False)
    assert path.read_bytes() == "é\n".encode()
    assert list(path.parent.iterdir()) == [path]


def write(path: Path, *, fsync: bool = True) -> None:
    with atomic_write(path, fsync=fsync) as file:
        file.write(NEW)


def error_of(call: Callable[[], None]) -> OSError:
    with pytest.raises(OSError, match=r".") as caught:
        call()
    return caught.value


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(path: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if step == "write":
        with file_size_limit(len(NEW) // 2):
            error = error_of(lambda: write(path))
        assert error.errno == errno.EFBIG
    else:
        monkeypatch.setattr(os, step, full)
        error = error_of(lambda: write(path))
        assert str(error) == "[Errno 28] No space left on device"
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_error_of_the_caller_leaves_the_old_file(path: Path, kind: type[BaseException]) -> None:
    def fail() -> None:
        with atomic_write(path, fsync=False) as file:
            file.write(NEW)
            raise kind

    with pytest.raises(kind):
        fail()
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]


def test_errors_name_the_file_that_the_caller_knows(tmp_path: Path) -> None:
    folder, none = tmp_path / "folder", tmp_path / "none" / "a.json"
    folder.mkdir()
    assert str(error_of(lambda: write(folder))) == f"[Errno 21] Is a directory: '{folder}'"
    assert str(error_of(lambda: write(none))) == f"[Errno 2] No such file or directory: '{none}'"
    below = tmp_path / "file" / "a.json"
    below.parent.touch()
    assert str(error_of(lambda: write(below))) == f"[Errno 20] Not a directory: '{below}'"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


KILLED = """
import os, signal, sys
from pathlib import Path
from megatron_tempo import files

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

path = Path(sys.argv[1])
if sys.argv[2] == "write":
    with files.atomic_write(path, fsync=True) as file:
        file.write(b"new")
        file.flush()
        die()
files.os.replace = die
files.replace_file(path, b"new" * 20_000, fsync=True)
"""


@pytest.mark.parametrize("step", ["write", "replace"])
def test_a_killed_process_leaves_the_old_file(path: Path, step: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), step], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == OLD
    (left,) = temporaries_in(path.parent)
    assert left.name.startswith(".")
    write(path)  # is not disturbed by what is left, and leaves it alone: another process may be writing it
    assert path.read_bytes() == NEW
    assert left.exists()
    assert {*path.parent.glob("*.json")} == {path}


def test_what_killed_processes_left_is_removed_a_day_later(path: Path) -> None:
    folder = path.parent
    names = {
        ".state.json.0123abcd.tmp": True,
        ".state.json.bak.0123abcd.tmp": False,  # of another file
        ".state.json.mine.tmp": False,  # not from this program
        ".state.json.0123abcd.tmp.old": False,
    }
    for name in names:
        (folder / name).touch()
        os.utime(folder / name, (1e9, 1e9))
    write(path)
    assert {name: not (folder / name).exists() for name in names} == names


@pytest.mark.parametrize("mode", [0o600, 0o444, 0o664, 0o200])
def test_a_replaced_file_keeps_its_permissions(path: Path, mode: int) -> None:
    path.chmod(mode)
    with atomic_write(path, fsync=True):
        (temporary,) = temporaries_in(path.parent)
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o600  # nobody else reads what may be secret
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    write(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_a_link_is_replaced_and_its_target_kept(path: Path) -> None:
    links = {name: path.with_name(name) for name in ("link", "dangling")}
    links["link"].symlink_to(path)
    links["dangling"].symlink_to("none")
    for link in links.values():
        write(link)
        assert not link.is_symlink()
        assert link.read_bytes() == NEW
    assert path.read_bytes() == OLD
    assert not path.with_name("none").exists()


def test_writers_at_the_same_time(path: Path) -> None:
    """Each file is of one writer, and a reader never finds none or half of one."""
    contents = [bytes([65 + i]) * 50_000 for i in range(4)]
    seen: set[bytes] = set()
    start, over = threading.Barrier(5), threading.Event()

    def write_often(content: bytes) -> None:
        start.wait()
        for _ in range(20):
            replace_file(path, content, fsync=False)

    def look() -> None:
        start.wait()
        while not over.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=look)
    writers = [threading.Thread(target=write_often, args=(content,)) for content in contents]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    over.set()
    reader.join()
    assert seen <= {OLD, *contents}
    assert path.read_bytes() in contents
    assert list(path.parent.iterdir()) == [path]


def test_several_files_appear_together(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [path, path.with_name("other")]

    def write_both() -> None:
        with atomic_paths(paths, fsync=True) as temporaries:
            for temporary in temporaries:
                temporary.write_bytes(NEW)

    synced: list[int] = []

    def fail(file: int) -> None:
        synced.append(file)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        error_of(write_both)
    assert path.read_bytes() == OLD
    assert list(path.parent.iterdir()) == [path]
    write_both()
    assert [one.read_bytes() for one in paths] == [NEW, NEW]


@pytest.mark.parametrize("fsync", [True, False])
def test_what_is_synced_before_and_after_the_rename(path: Path, fsync: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(file: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else f"file of {os.fstat(file).st_size}")
        real_sync(file)

    def replace(source: Path, target: Path) -> None:
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write(path, fsync=fsync)
    assert calls == ([f"file of {len(NEW)}", "rename", "folder"] if fsync else ["rename"])


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "0001"
    with atomic_folder(folder) as partial:
        (partial / "below").mkdir()
        (partial / "below/a").write_text("a")
        assert not folder.exists()
    assert (folder / "below/a").read_text() == "a"

    def fail(error: BaseException) -> None:
        with atomic_folder(tmp_path / "jobs" / "0002") as partial:
            (partial / "a").write_text("a")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("late", [True, False])
def test_a_folder_that_exists_is_kept(tmp_path: Path, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`late`: another process creates it between the last look and the rename."""
    folder = tmp_path / "0001"

    def write_folder() -> None:
        with atomic_folder(folder) as partial:
            (partial / "a").write_text("new")
            if not late:
                create()

    def create() -> None:
        folder.mkdir()
        (folder / "a").write_text("old")

    def publish(partial: Path, folder: Path) -> None:
        create()
        publish_folder(partial, folder)

    if late:
        monkeypatch.setattr(files, "publish_folder", publish)
    with pytest.raises(FileExistsError, match=f"File exists: '{folder}'"):
        write_folder()
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


# What renames a folder of the user's to keep it. Everything else that gets a name when it is complete is of files.py.
ASIDE = {"checkpoint/checkpoints.py": 1, "weights/export.py": 1}


def test_only_this_module_writes_and_renames() -> None:
    package = Path(files.__file__).parent
    renames: Counter[str] = Counter()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_rename(node, node.func):
                renames[str(path.relative_to(package))] += 1
    assert renames.pop("files.py") == 2
    assert renames == ASIDE


def is_rename(call: ast.Call, function: ast.Attribute) -> bool:
    """Whether it is os.replace, os.rename, shutil.move, or a method of a path: str.replace has two arguments."""
    if isinstance(function.value, ast.Name) and function.value.id in ("os", "shutil"):
        return function.attr in ("replace", "rename", "renames", "move")
    return function.attr == "rename" or (function.attr == "replace" and len(call.args) == 1 and not call.keywords)
