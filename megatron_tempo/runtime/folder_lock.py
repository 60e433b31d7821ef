"""An exclusive lock on a folder or a file that a command writes, across processes and machines.

The lock is a file that holds a record of its holder: host, process, command and a counter that rises every `BEAT`
seconds. Who may take it is decided in two ways:

- by `flock` if the file system supports it. The system releases it when the process that holds it ends in any way.
- by the counter if the holder is on another machine, because not every network file system supports `flock` across
machines. A process that needs the lock watches the counter for `WATCH` seconds; a holder that does not count is dead.
So no two clocks are compared.

The `filelock` package is not used: it empties the file when it opens it, so it cannot say who holds the lock, and it
does not handle a file system where `flock` works only within one machine.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType

from megatron_tempo.errors import InputError

log = logging.getLogger(__name__)

LOCK = "lock.json"  # in a run's folder
BEAT = 5.0  # seconds between two counts
WATCH = 25.0  # seconds without a count after which a holder on another machine is dead
PATIENCE = 3.0  # seconds that an ending holder has to release it
_BYTES = 1024  # bytes of a record, padded with blanks, so that one write replaces it
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock."""

    host: str
    pid: int
    machine: str  # equal for processes that see each other's pids; empty where that is unknown
    born: str  # when the process started, in the system's ticks: tells it from a later process with the same pid
    command: str
    since: float  # unix time
    token: str
    count: int

    @classmethod
    def here(cls, command: str) -> Holder:
        """This process."""
        born = _start_ticks(os.getpid()) or ""
        return cls(socket.gethostname(), os.getpid(), machine(), born, command, time.time(), secrets.token_hex(8), 0)

    @property
    def is_here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return bool(self.machine) and self.machine == machine()

    @property
    def is_gone(self) -> bool:
        """Whether it is known to have ended."""
        return self.is_here and _start_ticks(self.pid) != self.born

    def __str__(self) -> str:
        try:
            began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        except (ValueError, OverflowError, OSError):  # not a valid time
            began = str(self.since)
        return f"process {self.pid} on {self.host} ({self.command}, since {began})"


_KINDS = {
    "host": str,
    "pid": int,
    "machine": str,
    "born": str,
    "command": str,
    "since": float,
    "token": str,
    "count": int,
}


class FolderLock:
    """Held from `acquire` to `release`; also a context manager.

    with FolderLock(run_dir / LOCK, f"run.dir={run_dir}", "train", "give another run.dir"):
        ...
    """

    def __init__(
        self,
        path: Path,
        what: str,
        command: str,
        other: str,
        *,
        on_lost: Callable[[str], None] | None = None,
        watch: float = WATCH,
        patience: float = PATIENCE,
        beat: float = BEAT,
    ) -> None:
        """`path`: the lock's file. `what` it protects and `other`, the way out, are for messages. `on_lost` is called,
        from a thread, if another process has taken the lock; by default it ends this one."""
        self._path, self._what, self._other = path, what, other
        self._on_lost = on_lost or _end
        self._watch, self._patience, self._beat = watch, patience, beat
        self._own = Holder.here(command)
        self._file: int | None = None
        self._made: list[Path] = []  # folders that did not exist
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Take the lock. Raises InputError, which names the holder, if another process has it, OSError if the file
        cannot be written. Then nothing is left of the attempt."""
        try:
            self._make_folders()
            self._file = self._taken()
        except BaseException:
            self._remove_folders()
            raise
        self._thread = threading.Thread(target=self._count, name="folder lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Release the lock. Removes the lock's file and the empty folders that were made for it."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                if self._is_at_path(file):
                    self._path.unlink()
            os.close(file)
            self._remove_folders()

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    # Acquiring

    def _taken(self) -> int:
        """The lock's file, open and locked, with this process's record in it."""
        deadline = time.monotonic() + self._patience
        while True:
            file, is_new = self._open()
            try:
                locked = _flock(file)
                if not self._is_at_path(file):  # it was removed in between
                    os.close(file)
                    continue
                if locked is False:
                    self._wait_for_holder(file, deadline)
                    os.close(file)
                    continue
                self._take(file, is_new=is_new, locked=locked is True)
            except BaseException:
                with suppress(OSError):
                    if is_new and self._is_at_path(file):
                        self._path.unlink()
                    os.close(file)
                raise
            return file

    def _take(self, file: int, *, is_new: bool, locked: bool) -> None:
        holder = self._parsed(os.pread(file, _BYTES, 0))
        # On this machine, `flock` decides: a remaining record is a copy, or of a process that was killed.
        certain = is_new or (locked and holder is not None and holder.is_here)
        if holder is not None and not holder.is_gone and not certain:
            self._watch_holder(holder)
        self._write(file, self._own)
        if not certain or not locked:
            time.sleep(min(1.0, self._watch))  # another machine may do the same: the later record wins
            now = self._current()
            if now is None or now.token != self._own.token:
                raise InputError(self._refusal(now))

    def _wait_for_holder(self, file: int, deadline: float) -> None:
        """Wait until the holder releases the lock. Raises InputError if it does not."""
        holder = self._parsed(os.pread(file, _BYTES, 0))
        if holder is not None and holder.is_gone:  # a child process still has the file open
            self._path.unlink(missing_ok=True)
            return
        if time.monotonic() >= deadline:
            raise InputError(self._refusal(holder))
        time.sleep(0.1)

    def _watch_holder(self, holder: Holder) -> None:
        """Raises InputError if the holder, which may be on another machine, still counts."""
        log.info("%s: watching for %.0f s whether %s is still there", self._what, self._watch, holder)
        deadline = time.monotonic() + self._watch
        while time.monotonic() < deadline:
            time.sleep(min(0.5, self._watch / 10))
            now = self._current()
            if now is None:
                return
            if now != holder:
                raise InputError(self._refusal(now))

    def _refusal(self, holder: Holder | None) -> str:
        who = "another process" if holder is None else str(holder)
        return f"{self._what} is in use by {who}: wait until it has ended, or end it, or {self._other}"

    # The file

    def _open(self) -> tuple[int, bool]:
        with suppress(FileExistsError):
            return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        try:
            return os.open(self._path, os.O_RDWR), False
        except FileNotFoundError:  # just released
            return os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), False

    def _is_at_path(self, file: int) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(file), os.stat(self._path))
        return False

    def _current(self) -> Holder | None:
        """The record at the path. The file is reopened, since network file systems check for changes only then."""
        for _ in range(3):  # it may be in the middle of a write
            with suppress(FileNotFoundError, InputError):
                return self._parsed(self._path.read_bytes())
            time.sleep(0.05)
        return None

    def _parsed(self, text: bytes) -> Holder | None:
        """The record in a lock's file; None if the file is empty. Raises InputError for anything else."""
        text = text.strip(b"\0 \n")
        if not text:
            return None
        holder = parse(text)
        if holder is None:
            raise InputError(f"{self._path} is not a lock of this program: move it away, or {self._other}")
        return holder

    def _write(self, file: int, holder: Holder) -> None:
        text = json.dumps(asdict(holder)).encode()
        os.pwrite(file, text.ljust(_BYTES - 1) + b"\n", 0)
        os.fsync(file)

    def _count(self) -> None:
        """Count, and check that this process still holds the lock, until it is released."""
        while not self._over.wait(self._beat):
            with suppress(OSError, InputError):
                now = self._current()
                if now is not None and now.token != self._own.token:
                    self._on_lost(f"{self._what} was taken over by {now}: this process ends")
                    return
            self._own = replace(self._own, count=self._own.count + 1)
            with suppress(OSError):
                assert self._file is not None
                self._write(self._file, self._own)

    def _make_folders(self) -> None:
        folder = self._path.parent
        absent = []
        for path in (folder, *folder.parents):
            if path.exists() or path.is_symlink():
                break
            absent.append(path)
        for path in reversed(absent):
            path.mkdir(exist_ok=True)
            self._made.append(path)
        if not folder.is_dir():
            raise InputError(f"{self._what}: {folder} is not a folder that exists: mount it, or {self._other}")

    def _remove_folders(self) -> None:
        for path in reversed(self._made):
            with suppress(OSError):  # in use
                path.rmdir()
        self._made = []


def parse(text: bytes) -> Holder | None:
    """The record of a lock's file; None if it is not valid."""
    with suppress(ValueError, TypeError):
        holder = Holder(**json.loads(text))
        if all(isinstance(getattr(holder, name), kind) for name, kind in _KINDS.items()):
            return holder
    return None


def _flock(file: int) -> bool | None:
    """Try to lock the file. Whether it is locked now; None if the file system does not support `flock`."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise
    return True


def _start_ticks(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None if it has ended."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else words[19]


def machine() -> str:
    """Equal for processes that see each other in /proc; empty if they cannot."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _end(why: str) -> None:
    os.write(2, f"error: {why}\n".encode())
    os._exit(1)
