"""Takes from the process, for the rest of its life, what a program that is judged must not have.

Limits of resources, capabilities, files (Landlock) and system calls (seccomp). Nothing here can be undone, so it is
the last thing that happens before the program's own code.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import resource
import struct
import time

from .syscalls import DENIED, JUDGED, UNKNOWN

OPEN_FILES = 64
STACK_BYTES = 64 * 2**20  # for deep recursion; of the address space

_NO_NEW_PRIVS, _SECCOMP, _CAPBSET_DROP, _PDEATHSIG = 38, 22, 24, 1  # options of prctl
_FILTER = 2  # SECCOMP_MODE_FILTER
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every machine
_VERSION = 1  # LANDLOCK_CREATE_RULESET_VERSION
_SIGKILL = 9  # by number, because the module signal takes milliseconds to import
_READ, _READ_FOLDER, _WRITE = 4, 8, 2  # rights of Landlock
_RIGHTS = (0, 13, 14, 15, 15, 16)  # how many rights each version of Landlock knows; later ones know no more of files
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000  # system calls of another interface of x86-64
_CLONE_THREAD = 0x00010000
_SCOPED = 3  # rights of Landlock: no abstract sockets of others, no signals to them
_SCOPES_FROM = 6  # version of Landlock
_ARGUMENTS = 16  # where the arguments are in what a filter sees, 8 bytes each

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Lock:
    """How a process is locked. The sandbox outside decides it.

    >>> Lock(memory_mb=512, seconds=5.0, file_bytes=2**20, processes=None, readable=None, filtered=True)
    """

    def __init__(
        self,
        *,
        memory_mb: int,  # address space
        seconds: float,  # processor time from now on
        file_bytes: int,  # of each file that is written
        processes: int | None,  # processes and threads of the user; None: not limited
        readable: list[str] | None,  # files and folders that may be read, by Landlock; None: no Landlock
        filtered: bool,  # seccomp
    ) -> None:
        self.memory_mb = memory_mb
        self.seconds = seconds
        self.file_bytes = file_bytes
        self.processes = processes
        self.readable = readable
        self.filtered = filtered


def lock(how: Lock) -> None:
    """Lock this process. Raises OSError if a part of it fails."""
    set_limits(how)
    end_with_parent()
    _checked(_prctl(_NO_NEW_PRIVS, 1))
    drop_capabilities()
    if how.readable is not None:
        restrict_files(how.readable)
    if how.filtered:
        filter_calls()


def end_with_parent() -> None:
    """The kernel kills this process when the one that started it ends."""
    _checked(_prctl(_PDEATHSIG, _SIGKILL))


def set_limits(how: Lock) -> None:
    memory = how.memory_mb * 2**20
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_FSIZE: how.file_bytes,
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if how.processes is not None:
        limits[resource.RLIMIT_NPROC] = how.processes
    for kind, limit in limits.items():
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit))
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, hard))
    allow_seconds(how.seconds)


def allow_seconds(seconds: float) -> None:
    """Limit the processor time from now on. The limit is in whole seconds: it is rounded up."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = math.ceil(time.process_time() + seconds)
    soft = soft if hard == resource.RLIM_INFINITY else min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard if hard != resource.RLIM_INFINITY else soft + 1))


def drop_capabilities() -> None:
    """A process of root keeps root's number and none of its powers."""
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    for capability in range(64):
        if _prctl(_CAPBSET_DROP, capability) != 0:  # unknown, or not ours to drop
            break
    _checked(libc.capset(header, nothing))


def landlock_version() -> int:
    """The kernel's version of Landlock; 0 if it has none."""
    return max(0, _syscall(_CREATE_RULESET, None, 0, _VERSION))


def restrict_files(readable: list[str]) -> None:
    """Allow reading below `readable`, and nothing else: no other file is opened, made, removed or run.

    Where the kernel can, Landlock holds back signals as well: those of an asynchronous file are sent by no system call
    that a filter could refuse.
    """
    version = landlock_version()
    handled = 2 ** _RIGHTS[min(version, len(_RIGHTS) - 1)] - 1
    wanted = struct.pack("=QQQ", handled, 0, _SCOPED) if version >= _SCOPES_FROM else struct.pack("=Q", handled)
    rules = _checked(_syscall(_CREATE_RULESET, wanted, len(wanted), 0))
    paths = [(path, _READ | (_READ_FOLDER if os.path.isdir(path) else 0)) for path in readable]
    for path, rights in [*paths, ("/dev/null", _READ | _WRITE)]:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        _checked(_syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights & handled, place), 0))
        os.close(place)
    _checked(_syscall(_RESTRICT_SELF, rules, 0))
    os.close(rules)


def can_filter() -> bool:
    """Whether this machine's system calls are known and its kernel takes filters."""
    known = _prctl(_SECCOMP, _FILTER, 0) != 0 and ctypes.get_errno() == errno.EFAULT  # nothing is a bad address
    return os.uname().machine in _MACHINES and known


def filter_calls() -> None:
    program = filter_program(os.uname().machine, os.getpid())
    kept = ctypes.create_string_buffer(program)
    header = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(kept)))
    _checked(_prctl(_SECCOMP, _FILTER, ctypes.addressof(header)))


def filter_program(machine: str, pid: int) -> bytes:
    """The filter for a process with the number `pid`, in classic BPF, eight bytes an instruction."""
    column, arch = _MACHINES[machine]
    code = [_step(_LOAD, 4), _step(_EQUAL, arch, 1, 0), _step(_RETURN, _KILL), _step(_LOAD, 0)]
    if machine == "x86_64":
        code += [_step(_AT_LEAST, _X32, 0, 1), _step(_RETURN, _ERROR | errno.EPERM)]
    code += [_step(_AT_LEAST, UNKNOWN, 0, 1), _step(_RETURN, _ERROR | errno.ENOSYS)]
    for name, numbers in DENIED.items():
        if numbers[column] >= 0:
            error = errno.ENOSYS if name == "clone3" else errno.EPERM
            code += [_step(_EQUAL, numbers[column], 0, 1), _step(_RETURN, _ERROR | error)]
    own = [(_EQUAL, pid), (_EQUAL, 0)]
    # For each call: the arguments that are looked at, one after the other, and what lets it pass.
    passes: dict[str, list[tuple[int, list[tuple[int, int]]]]] = {
        "clone": [(0, [(_ANY_BIT, _CLONE_THREAD)])],
        "kill": [(0, [(_EQUAL, pid)])],
        "tgkill": [(0, [(_EQUAL, pid)])],
        "prlimit64": [(0, own)],
        "sched_setaffinity": [(0, own)],
        "sendto": [(8, [(_EQUAL, 0)]), (9, [(_EQUAL, 0)])],  # both halves of the address: to nobody but the other end
    }
    for name, conditions in passes.items():
        code += _judged(JUDGED[name][column], conditions)
    # For each call: the argument that is looked at, and what does not pass.
    refused: dict[str, tuple[int, list[int]]] = {
        "prctl": (0, [_PDEATHSIG]),
        "fcntl": (1, [8, 10, 15]),  # F_SETOWN, F_SETSIG, F_SETOWN_EX: whom an asynchronous file signals, and how
        "ioctl": (1, [0x8901, 0x8902]),  # FIOSETOWN, SIOCSPGRP: the same
    }
    for name, (argument, values) in refused.items():
        code += _refused(JUDGED[name][column], argument, values)
    return b"".join([*code, _step(_RETURN, _ALLOW)])


def _judged(number: int, conditions: list[tuple[int, list[tuple[int, int]]]]) -> list[bytes]:
    """A call that passes if each of the half arguments fulfils one of its tests."""
    body: list[bytes] = []
    for half, tests in conditions:
        body.append(_half(half))
        body += [_step(test, value, len(tests) - i) for i, (test, value) in enumerate(tests)]  # past the error
        body.append(_step(_RETURN, _ERROR | errno.EPERM))
    body.append(_step(_RETURN, _ALLOW))
    return [_step(_EQUAL, number, 0, len(body)), *body]


def _refused(number: int, argument: int, values: list[int]) -> list[bytes]:
    """A call that does not pass if this argument, of 32 bits, has one of these values."""
    tests = [_step(_EQUAL, value, len(values) - i) for i, value in enumerate(values)]  # past the permission
    body = [_half(2 * argument), *tests, _step(_RETURN, _ALLOW), _step(_RETURN, _ERROR | errno.EPERM)]
    return [_step(_EQUAL, number, 0, len(body)), *body]


def _half(number: int) -> bytes:
    """Load a half of an argument: 2 n is the lower half of argument n, which comes first on both machines."""
    return _step(_LOAD, _ARGUMENTS + 4 * number)


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _prctl(option: int, *arguments: int) -> int:
    numbers = [*arguments, 0, 0, 0, 0][:4]
    return int(libc.prctl(option, *(ctypes.c_ulong(number) for number in numbers)))


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    given = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return int(libc.syscall(ctypes.c_long(number), *given))


def _checked(result: int) -> int:
    """The result of a function of the C library. Raises OSError if it is negative."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{os.strerror(error)}, when a process locked itself")
    return result
