"""Which ranks count as dead, failed or hung, from their heartbeats and a clock set by hand."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_tempo.errors import Stopped
from megatron_tempo.observability.heartbeat import Heartbeat, read_heartbeat, write_final_heartbeat
from megatron_tempo.runtime import failure_detector, progress_marker, watchdog
from megatron_tempo.runtime.failure_detector import BEAT, DONE, ENDED, SILENT, Diagnosis, FailureDetector, RankHeartbeat
from megatron_tempo.runtime.folder_lock import machine
from megatron_tempo.runtime.watchdog import Watchdog, of_a_collective

HANG = 1800.0
WORLD = 3


class World:
    """Ranks that heartbeat, and the failure detector of one of them. What each does can be set between two checks."""

    def __init__(self, rank: int = 1, host: int | None = 0, hang: float | None = HANG) -> None:
        self.now = 1000.0
        self.detector = FailureDetector(rank, WORLD, host, hang, self.now)
        self.heartbeats = {
            i: RankHeartbeat(
                1, f"node{i}", 40 + i, f"machine{i}", "generate", 11, f"run.py:{i} in iterate", i != 2, 0.0, 0.0
            )
            for i in range(WORLD)
        }
        self.read = True  # the detector's rank reaches the store
        self.silent: set[int] = set()
        self.idle: set[int] = set()
        self.gone: set[int] = set()
        self.collective_failed = False

    def step(self, seconds: float = BEAT) -> Diagnosis | None:
        self.now += seconds
        for rank, heartbeat in self.heartbeats.items():
            if self.read and rank not in self.silent:
                idle = rank in self.idle
                progress, idle_seconds = (
                    (heartbeat.progress, heartbeat.idle_seconds + seconds) if idle else (heartbeat.progress + 1, 0.0)
                )
                self.heartbeats[rank] = replace(
                    heartbeat, count=heartbeat.count + 1, progress=progress, idle_seconds=idle_seconds
                )
        return self.detector.check(
            self.now, self.heartbeats, lambda s: s.pid - 40 in self.gone, collective_failed=self.collective_failed
        )

    def until_diagnosis(self, limit: float) -> tuple[Diagnosis, float]:
        """The diagnosis, and the seconds until it came."""
        since = self.now
        while self.now - since < limit:
            if diagnosis := self.step():
                return diagnosis, self.now - since
        raise AssertionError("no diagnosis")


def quiet_for(world: World, seconds: float) -> None:
    since = world.now
    while world.now - since < seconds:
        assert world.step() is None


def test_nothing_is_said_of_ranks_that_get_on() -> None:
    quiet_for(World(), 10 * HANG)


def test_a_silent_rank_is_named_within_the_stated_time() -> None:
    world = World()
    quiet_for(world, 100)
    world.silent = {2}
    diagnosis, seconds = world.until_diagnosis(2 * SILENT)
    assert SILENT < seconds <= SILENT + 2 * BEAT
    assert diagnosis.reason.startswith(
        "rank 2 (node2, process 42) has sent no heartbeat for 65 s: it is dead or frozen; last "
    )
    assert diagnosis.reason.endswith(", in generate, 11 iterations done, at run.py:2 in iterate")
    assert time.strftime("%H:", time.localtime(time.time() - seconds)) in diagnosis.reason


def test_a_rank_that_never_sends_a_heartbeat() -> None:
    world = World()
    del world.heartbeats[2]
    assert (
        "rank 2 has sent no heartbeat for 65 s: it is dead or frozen; it never sent a heartbeat"
        in world.until_diagnosis(100)[0].text
    )


def test_a_store_that_does_not_answer_is_its_holder_s_silence() -> None:
    world = World()
    quiet_for(world, 20)
    world.read = False
    diagnosis, seconds = world.until_diagnosis(100)
    assert seconds <= SILENT + 2 * BEAT
    assert diagnosis.reason.startswith("rank 0 (node0, process 40) has sent no heartbeat for")
    world = World(host=None)
    world.read = False
    assert "the launcher's store has not answered for" in world.until_diagnosis(100)[0].reason


def test_a_process_that_is_gone_is_seen_at_once() -> None:
    world = World()
    quiet_for(world, 20)
    world.silent = world.gone = {0}
    diagnosis, seconds = world.until_diagnosis(100)
    assert seconds <= 4 * BEAT
    assert diagnosis.reason.startswith("rank 0 (node0, process 40) has died; last heartbeat at ")


def test_one_that_ended_just_before_has_not_died() -> None:
    world = World()
    quiet_for(world, 20)
    world.gone = {2}
    assert world.step() is None
    world.heartbeats[2] = replace(world.heartbeats[2], ended=DONE)  # which was on its way
    world.silent = {2}
    quiet_for(world, 10 * SILENT)


def test_when_the_holder_of_the_store_is_done_the_last_rank_may_take_its_time() -> None:
    world = World()
    world.heartbeats[0] = replace(world.heartbeats[0], ended=DONE)
    quiet_for(world, 20)
    world.read, world.gone = False, {0, 2}
    quiet_for(world, 10 * SILENT)


def test_a_rank_that_failed() -> None:
    """The others may be about to end with the same error."""
    world = World()
    world.heartbeats[2] = replace(world.heartbeats[2], ended="OSError: [Errno 28] No space left on device")
    world.silent = {2}
    diagnosis, seconds = world.until_diagnosis(100)
    assert ENDED < seconds <= ENDED + 2 * BEAT
    assert "rank 2 (node2, process 42) ended: OSError: [Errno 28] No space left on device; " in diagnosis.text
    world = World()
    world.heartbeats[2] = replace(world.heartbeats[2], ended="OSError: x")
    world.collective_failed = True
    assert world.step() is not None


def test_a_hang_names_who_does_not_wait_for_others() -> None:
    world = World()
    world.idle = {0, 1, 2}
    diagnosis, seconds = world.until_diagnosis(2 * HANG)
    assert HANG <= seconds <= HANG + 2 * BEAT
    assert diagnosis.reason == (
        "no rank made progress for run.hang_minutes=30; likely cause, since it does not wait for other ranks: "
        "rank 2 (node2, process 42), in generate, 11 iterations done, at run.py:2 in iterate"
    )
    first, *others = diagnosis.text.splitlines()[1:]
    assert first.startswith("  rank 2 (node2, process 42): hangs, in generate, ")
    assert first.endswith(", 30:05 ago")
    assert all("waits for others" in line for line in others)
    assert diagnosis.dump == (2,)


def test_a_hang_in_which_all_wait_for_one_another() -> None:
    world = World()
    world.idle = {0, 1, 2}
    world.heartbeats[2] = replace(world.heartbeats[2], is_waiting=True)
    diagnosis, _ = world.until_diagnosis(2 * HANG)
    assert diagnosis.reason == "no rank made progress for run.hang_minutes=30; all ranks wait for one another"
    assert set(diagnosis.dump) == {0, 1, 2}


# What the ranks say of a hang: (they wait by their lines, collectives begun in groups a and b), who is suspected, and
# who waits. Under NCCL a line says nothing of a collective: the rank stands where it next needs a number from its GPU.
HANGS = {
    "one sleeps, and the others' lines do not tell": ([(0, 5, 7), (0, 5, None), (0, 4, 7)], {2}, {0, 1}),
    "one sleeps, the others wait for their GPUs": ([(1, 5, 7), (1, 5, None), (0, 4, 7)], {2}, {0, 1}),
    "one's GPU hangs": ([(1, 5, None), (1, 4, None), (1, 5, None)], {1}, {0, 2}),
    "a chain: 0 waits for 1 in a, 1 for 2 in b": ([(0, 5, None), (0, 4, 8), (0, None, 7)], {2}, {0, 1}),
    "one behind waits for a message of one that sleeps": ([(1, 5, None), (1, 4, None), (0, None, 7)], {2}, {0, 1}),
    "different orders": ([(1, 5, 7), (1, 4, 8), (1, 4, 7)], {2}, {0, 1}),
    "two cross": ([(1, 5, 7), (1, 4, 8), (1, None, None)], set(), {0, 1, 2}),
    "no counts": ([(1, None, None), (0, None, None), (0, None, None)], {1, 2}, {0}),
}


@pytest.mark.parametrize("name", HANGS)
def test_in_a_hang_the_lowest_number_of_collectives_is_suspected(name: str) -> None:
    ranks, suspects, waiting = HANGS[name]
    world = World()
    world.idle = {0, 1, 2}
    for rank, (is_waiting, a, b) in enumerate(ranks):
        counts = {group: number for group, number in (("a", a), ("b", b)) if number is not None}
        heartbeat = replace(world.heartbeats[rank], is_waiting=bool(is_waiting), collectives=counts)
        world.heartbeats[rank] = heartbeat
    diagnosis, _ = world.until_diagnosis(2 * HANG)
    words = {int(line.split()[1]): line.partition("): ")[2] for line in diagnosis.text.splitlines()[1:]}
    assert {rank for rank, text in words.items() if text.startswith("hangs, ")} == suspects
    assert {rank for rank, text in words.items() if text.startswith("waits for others, ")} == waiting
    assert set(diagnosis.dump) == (suspects or {0, 1, 2})
    assert all((f"rank {rank} (" in diagnosis.reason) == (rank in suspects) for rank in range(WORLD))


def test_ranks_that_are_at_different_numbers_and_get_on_do_not_hang() -> None:
    world = World()
    for rank in range(WORLD):
        world.heartbeats[rank] = replace(world.heartbeats[rank], collectives={"a": rank})
    quiet_for(world, 3 * HANG)


@pytest.mark.parametrize("rank", range(WORLD))
def test_as_long_as_one_gets_on_nothing_hangs(rank: int) -> None:
    world = World()
    world.idle = {0, 1, 2} - {rank}
    quiet_for(world, 3 * HANG)


def test_without_a_limit_nothing_hangs() -> None:
    world = World(hang=None)
    world.idle = {0, 1, 2}
    quiet_for(world, 10 * HANG)


def test_a_detector_that_was_suspended_counts_anew() -> None:
    world = World()
    world.idle = {0, 1, 2}
    quiet_for(world, HANG - 60)
    world.silent = {0, 2}  # they go on a little later
    assert world.step(10 * HANG) is None
    quiet_for(world, SILENT - 2 * BEAT)
    world.silent = set()
    quiet_for(world, 2 * BEAT)
    world.silent = {2}
    diagnosis, _ = world.until_diagnosis(100)
    assert "(this process was suspended for 18000 s, so that rank may have aborted because of it)" in diagnosis.text


@pytest.mark.parametrize("rank", range(WORLD))
@pytest.mark.parametrize(("machines", "gone", "speak"), [("aaa", {0}, {1}), ("aba", {0}, {1, 2}), ("aaa", {0, 1}, {2})])
def test_without_the_store_the_first_on_each_machine_speaks(
    rank: int, machines: str, gone: set[int], speak: set[int]
) -> None:
    world = World(rank)
    world.heartbeats = {i: replace(heartbeat, machine=machines[i]) for i, heartbeat in world.heartbeats.items()}
    quiet_for(world, 20)
    world.read, world.gone = False, gone
    assert world.step() is None
    world.gone = set(range(WORLD)) - {rank}  # who spoke has ended meanwhile
    world.until_diagnosis(100)
    assert rank in gone or world.detector.should_report() == (rank in speak)


def caught(make: type[Exception], cause: Exception | None = None) -> Exception:
    try:
        raise make("Connection closed by peer") from cause
    except Exception as error:  # noqa: BLE001
        return error


def test_errors_of_a_collective() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert of_a_collective(gloo)
    assert of_a_collective(dist.DistBackendError("NCCL error"))
    assert of_a_collective(caught(ValueError, gloo))
    assert not of_a_collective(caught(RuntimeError))
    assert not of_a_collective(RuntimeError("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)"))
    assert not of_a_collective(OSError("gloo"))


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("error", [None, Stopped("told to"), ValueError("x"), RuntimeError("gloo")])
def test_a_process_alone_signs_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setattr(failure_detector, "BEAT", 0.02)
    before = set(threading.enumerate())
    with pytest.raises(type(error)) if error else open(os.devnull), Watchdog(tmp_path, 30.0) as watch:
        with progress_marker.phase("generate", 11):
            deadline = time.monotonic() + 120
            while watch._heartbeats.get(0) is None or watch._heartbeats[0].phase != "generate":
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert (watch._heartbeats[0].step, watch._heartbeats[0].pid) == (11, os.getpid())
        if error:
            raise error
    assert set(threading.enumerate()) == before
    assert progress_marker.MARKER.phase == ""


@pytest.mark.usefixtures("alone")
def test_without_a_limit_a_process_alone_has_nothing_to_look_for(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Watchdog(tmp_path, None):
        assert set(threading.enumerate()) == before


def test_where_a_thread_stands() -> None:
    beat = Heartbeat.__dict__["_beat"]
    holder = type("Holder", (), {"_closed": threading.Event()})()
    thread = threading.Thread(target=beat, args=(holder,), daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not (location := watchdog._location_of(thread.ident))[0]:
        assert time.monotonic() < deadline
    assert location[0].startswith("observability/heartbeat.py:")
    assert location[0].endswith(" in _beat")
    assert not location[1]
    holder._closed.set()
    thread.join()
    assert watchdog._location_of(thread.ident) == ("", False)


class Device:
    """A tensor whose GPU does not answer. Its calls are C functions, as torch's are, so they have no frame."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.lock.acquire()
        self.item = self.cpu = self.tolist = self.append = self.lock.acquire
        self.truth = type("Truth", (), {"__bool__": self.lock.acquire})()  # such as of `loss > limit`


def by_item(x: Device) -> object:
    return [x.item() for _ in range(1)]


def by_cpu(x: Device) -> object:
    values = {"a": 1.0}
    values["b"] = float(len([x, x])) + (
        x  # a call over several lines
        .cpu()
    )  # fmt: skip
    return values


def by_argument(x: Device) -> object:
    return max(1, len(str(x.tolist())), 2)


def by_truth(x: Device) -> object:
    if x.truth:
        return 1
    return 2


def by_nothing(x: Device) -> object:
    return len([x.item.__name__, x.append()])  # of another kind


def by_event(x: Device) -> object:
    return x.lock.acquire()


@pytest.mark.parametrize(
    ("wait", "expected"),
    [*((wait, True) for wait in (by_item, by_cpu, by_argument, by_truth)), (by_nothing, False), (by_event, False)],
)
def test_a_wait_for_the_gpu_is_a_wait(wait: Callable[[Device], object], expected: bool) -> None:
    device = Device()
    thread = threading.Thread(target=wait, args=(device,), daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while True:  # until it stands in the call: the same instruction a hundred times
        frame = sys._current_frames().get(thread.ident or 0)
        if frame is not None and frame.f_code.co_filename == __file__:
            found = {watchdog._location_of(thread.ident)[1] for _ in range(100)}
            if found == {expected}:
                break
        assert time.monotonic() < deadline
        time.sleep(0.01)
    device.lock.release()
    thread.join()


def test_processes_that_are_gone() -> None:
    own = RankHeartbeat(1, "node", os.getpid(), machine(), "", 0, "", False, 0.0, 0.0)
    assert not watchdog._is_gone(own, own)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    heartbeat = replace(own, pid=process.pid)
    assert not watchdog._is_gone(own, heartbeat)
    process.kill()
    deadline = time.monotonic() + 120
    while not watchdog._is_gone(own, heartbeat):  # before anybody has asked for its exit status
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.communicate()
    assert watchdog._is_gone(own, heartbeat)
    assert not watchdog._is_gone(own, replace(heartbeat, machine="another")), "it cannot be seen from here"
    assert not watchdog._is_gone(replace(own, machine=""), replace(heartbeat, machine=""))


def test_the_reason_in_the_final_heartbeat(tmp_path: Path) -> None:
    mine = socket.gethostname(), os.getpid()
    write_final_heartbeat(tmp_path, "rank 1 has died", *mine)
    assert not list(tmp_path.iterdir()), "nobody has sent a heartbeat"
    beat = Heartbeat(tmp_path)
    beat.phase("generate")
    write_final_heartbeat(tmp_path, "rank 1 has died", *mine)
    record = read_heartbeat(tmp_path)
    write_final_heartbeat(tmp_path, "another job's", mine[0], mine[1] + 1)
    assert read_heartbeat(tmp_path) == record
    beat.end(DONE)
    assert record is not None
    assert (record["ended"], record["phase"], record["pid"]) == ("rank 1 has died", "", os.getpid())
    assert [path.name for path in tmp_path.iterdir()] == ["heartbeat.json"]
