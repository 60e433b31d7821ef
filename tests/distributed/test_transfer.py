"""A sender of weights gives up a lost server in bounded time, and sends from its own device only."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.choices import Transport
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.models.megatron_compat.torch_private import join_separate_group
from megatron_tempo.rollout import transfer
from megatron_tempo.rollout.replica import Target
from megatron_tempo.rollout.server_adapter import Call, WeightGroupInfo
from megatron_tempo.rollout.slices import Block, Places, Slices
from megatron_tempo.rollout.transfer import Senders, _Link
from megatron_tempo.types import Bucket, Share
from megatron_tempo.weights.shared_memory import in_shared_memory
from tests.support.fork_server import FORK_SERVER, Forked
from tests.support.weights import Given

CPU = torch.device("cpu")
TARGET = Target(0, 0, "http://127.0.0.1:1")
# More than the two sockets of a connection hold: a broadcast of it lasts until somebody receives.
LARGE = 64 << 20


class Adapter:
    """Stands for a server's adapter. `join_group` says in a file where the sender waits."""

    takes_parts = True

    def __init__(self, place: Path) -> None:
        self.place = place

    def join_group(self, group_info: WeightGroupInfo) -> Call:
        partial = self.place.with_suffix(".tmp")
        partial.write_text(json.dumps({"host": group_info.host, "port": group_info.port, "group": group_info.group}))
        partial.rename(self.place)
        return Call("/join", {})

    def asks_for_places(self) -> Call | None:
        return None

    def update(self, bucket: Bucket, group: str | None, version: int, *, compare: bool) -> Call:
        return Call("/update", {})

    def expected(self, bucket: Bucket) -> dict[str, tuple[str, float]]:
        return {}


def receive_one(place: str) -> None:
    """A worker that joins, receives one bucket, says so, and takes no other one."""
    while not Path(place).exists():
        time.sleep(0.01)
    where = json.loads(Path(place).read_text())
    store = dist.TCPStore(where["host"], where["port"], is_master=False, timeout=timedelta(seconds=60))
    prefixed = dist.PrefixStore(where["group"], store)
    group = join_separate_group(prefixed, where["group"], 1, 2, "gloo", timedelta(seconds=60))
    dist.broadcast(torch.empty(8, dtype=torch.uint8), src=0, group=group)
    Path(place).with_suffix(".one").touch()
    threading.Event().wait()


class Disturbed(Given):
    """`disturb` is called when the first bucket has been sent."""

    def __init__(self, buckets: list[Bucket], disturb: Callable[[], None]) -> None:
        super().__init__(buckets)
        self.disturb = disturb

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        for number, bucket in enumerate(self.buckets):
            if number == 1:
                self.disturb()
            yield bucket


@pytest.fixture
def aborted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The groups that were aborted."""
    groups: list[object] = []
    abort = transfer.abort_separate_group

    def noted(group: Any) -> None:
        groups.append(group)
        if isinstance(group, dist.ProcessGroup):
            abort(group)

    monkeypatch.setattr(transfer, "abort_separate_group", noted)
    answer: Future[object] = Future()
    answer.set_result(None)
    # A server's answers are bounded by the HTTP client. Here they say that all is well.
    monkeypatch.setattr(_Link, "_post", lambda self, call: answer)
    return groups


def senders_of(place: Path, seconds: float, device: torch.device = CPU) -> Senders:
    config = ServersConfig(update_seconds=seconds)
    return Senders(Adapter(place), config, "key", device, 1)  # type: ignore[arg-type]


def sent(place: Path, how: signal.Signals, seconds: float = 300.0) -> tuple[dict[int, str], Forked]:
    """What fails if the only worker gets a signal after the first bucket. `seconds`: the limit from then on."""
    receiver = FORK_SERVER.call(
        "tests.distributed.test_transfer:receive_one", str(place), environment=os.environ, log=place.with_suffix(".log")
    )
    senders = senders_of(place, 300.0)
    one, large = [("a", torch.zeros(2))], [("b", torch.zeros(LARGE // 4))]

    def disturb() -> None:
        # The second broadcast is then in the middle: the worker's sockets are full, or closed.
        while not place.with_suffix(".one").exists():
            time.sleep(0.01)
        os.kill(receiver.pid, how)
        senders._links[TARGET]._seconds = seconds

    try:
        failed, _ = senders.send(Disturbed([one, large, large], disturb), [TARGET], 0, compare=False)
        assert senders._links == {}
    finally:
        senders.close()
    return failed, receiver


def test_a_receiver_that_is_killed_is_given_up(tmp_path: Path, aborted: list[object]) -> None:
    failed, receiver = sent(tmp_path / "place", signal.SIGKILL)
    assert receiver.wait(60) == -signal.SIGKILL
    assert len(aborted) == 1
    assert list(failed) == [0]
    assert failed[0].startswith("failed in a weight update: RuntimeError ")


def test_a_receiver_that_hangs_is_given_up_in_time(tmp_path: Path, aborted: list[object]) -> None:
    failed, receiver = sent(tmp_path / "place", signal.SIGSTOP, 0.5)
    receiver.kill()
    assert len(aborted) == 1
    assert failed == {0: "failed in a weight update: took no weights for rollout.servers.update_seconds=0.5"}


@pytest.mark.parametrize("stuck", ["join", "broadcast", "work"])
def test_no_wait_is_unbounded(
    tmp_path: Path, aborted: list[object], monkeypatch: pytest.MonkeyPatch, stuck: str
) -> None:
    """NCCL opens a communicator in the first broadcast, and waits there for a lost worker. Leaving may be as stuck."""
    never = threading.Event()

    class Work:
        def is_completed(self) -> bool:
            return False

    def join(*arguments: Any) -> Any:
        if stuck == "join":
            never.wait()
        else:
            senders._links[TARGET]._seconds = 0.2  # for what follows
        return "the group"

    def broadcast(*arguments: Any, **options: Any) -> Any:
        if stuck == "broadcast":
            never.wait()
        return Work()

    def abort(group: Any) -> None:
        aborted.append(group)
        never.wait()

    monkeypatch.setattr(transfer, "join_separate_group", join)
    monkeypatch.setattr(transfer, "abort_separate_group", abort)
    monkeypatch.setattr(transfer, "_ABORT_SECONDS", 0.1)
    monkeypatch.setattr(dist, "broadcast", broadcast)
    senders = senders_of(tmp_path / "place", 0.2 if stuck == "join" else 300.0)
    failed, _ = senders.send(Given([[("a", torch.zeros(2))]]), [TARGET], 0, compare=False)
    senders.close()
    assert failed == {0: "failed in a weight update: took no weights for rollout.servers.update_seconds=0.2"}
    assert aborted == ([] if stuck == "join" else ["the group"])
    never.set()


class Sliced(Adapter):
    """Of a server with two workers, each of which needs one row of the matrix "a"."""

    def asks_for_places(self) -> Call | None:
        return Call("/places", {})

    def places(self, answer: Any) -> Places:
        return [{"a": Block(row, 1, 0, 2)} for row in range(2)]

    def update(
        self, bucket: Bucket, group: str | None, version: int, *, compare: bool, slices: Slices | None = None
    ) -> Call:
        assert slices is not None
        return Call("/update", {})


@pytest.mark.parametrize(("stuck", "device"), [("start", "cpu"), ("message", "cpu"), ("message", "meta")])
def test_slices_that_nobody_takes_are_given_up(
    tmp_path: Path, aborted: list[object], monkeypatch: pytest.MonkeyPatch, stuck: str, device: str
) -> None:
    """gloo waits for a message, NCCL opens a communicator with it. torch's meta device stands for a GPU."""
    never = threading.Event()
    begun: list[tuple[int, int]] = []

    class Message:
        def is_completed(self) -> bool:
            assert device == "meta"  # gloo always says no
            return False

        def wait(self) -> None:
            never.wait()

    def isend(data: Tensor, *, group: str, group_dst: int) -> Message:
        assert data.device.type == device
        begun.append((group_dst, data.nbytes))
        if stuck == "start":
            never.wait()
        return Message()

    answer: Future[object] = Future()
    answer.set_result(SimpleNamespace(json=lambda: None))
    monkeypatch.setattr(_Link, "_post", lambda self, call: answer)
    monkeypatch.setattr(transfer, "join_separate_group", lambda *arguments: "the group")
    monkeypatch.setattr(dist, "isend", isend)
    config = ServersConfig(update_seconds=0.2, tensor=2)
    senders = Senders(Sliced(tmp_path / "place"), config, "key", torch.device(device), 1)  # type: ignore[arg-type]
    failed, _ = senders.send(Given([[("a", torch.zeros(2, 2))]]), [TARGET], 0, compare=False)
    senders.close()
    assert failed == {0: "failed in a weight update: took no weights for rollout.servers.update_seconds=0.2"}
    assert begun == ([(1, 8)] if stuck == "start" else [(1, 8), (2, 8)])
    assert aborted == ["the group"]
    never.set()


def test_a_block_that_a_tensor_does_not_have_costs_the_server_only(
    tmp_path: Path, aborted: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer: Future[object] = Future()
    answer.set_result(SimpleNamespace(json=lambda: None))
    monkeypatch.setattr(_Link, "_post", lambda self, call: answer)
    monkeypatch.setattr(transfer, "join_separate_group", lambda *arguments: "the group")
    config = ServersConfig(update_seconds=300.0, tensor=2)
    senders = Senders(Sliced(tmp_path / "place"), config, "key", CPU, 1)  # type: ignore[arg-type]
    buckets = [[("a", torch.zeros(1, 2))]] * 2
    failed, _ = senders.send(Given(buckets), [TARGET], 0, compare=False)
    senders.close()
    (message,) = failed.values()
    assert message.startswith("failed in a weight update: asks for Block(row=1, rows=1, column=0, columns=2) of a, ")
    assert aborted == ["the group"]


def test_a_healthy_group_is_left_without_waiting(
    tmp_path: Path, aborted: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's destroy_process_group waits under NCCL for what was launched."""
    monkeypatch.setattr(transfer, "join_separate_group", lambda *arguments: "the group")
    senders = senders_of(tmp_path / "place", 300.0)
    senders._connect([TARGET], {})
    # The server was started anew: the link to its earlier life is closed.
    senders._connect([Target(0, 1, TARGET.url)], {})
    assert aborted == ["the group"]
    senders.close()
    assert aborted == ["the group"] * 2


class Sent:
    """A broadcast that is over."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None: ...


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_group_gets_tensors_of_its_device_only(
    tmp_path: Path, aborted: list[object], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """NCCL refuses tensors on the CPU, gloo those on a GPU. Here torch's meta device stands for the GPU."""
    backends, arrived = [], []

    def join(store: object, name: str, rank: int, world: int, backend: str, timeout: timedelta) -> str:
        backends.append((backend, timeout.total_seconds()))
        return "the group"

    def refusing(tensor: Tensor, **options: Any) -> Sent:
        if tensor.device.type != device:
            raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
        arrived.append(tensor.numel())
        return Sent()

    monkeypatch.setattr(transfer, "join_separate_group", join)
    monkeypatch.setattr(dist, "broadcast", refusing)
    senders = senders_of(tmp_path / "place", 300.0, torch.device(device))
    bucket = [("a", torch.zeros(2)), ("b", torch.zeros(3))]
    failed, _ = senders.send(Given([bucket]), [TARGET], 0, compare=False)
    senders.close()
    assert failed == {}
    assert arrived == [20]
    # Under NCCL torch ends the process at the group's own limit, which is past a link's.
    assert backends == [("gloo", 300.0)] if device == "cpu" else [("nccl", 660.0)]


def test_shared_memory_opens_no_group(tmp_path: Path, aborted: list[object]) -> None:
    config = ServersConfig(update_seconds=1.0, transport=Transport.shared)
    senders = Senders(Adapter(tmp_path / "place"), config, "key", CPU, 1)  # type: ignore[arg-type]
    senders._connect([TARGET], {})
    senders.close()
    assert aborted == []


class InTurn(Given):
    """Buckets in two buffers in turn, as `Weights.from_stages` may do: each number of bucket N is N."""

    def __init__(self, count: int) -> None:
        super().__init__([])
        self.count, self.buffers = count, [torch.empty(4), torch.empty(4)]

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        assert shared
        for number in range(self.count):
            yield [("a", self.buffers[number % 2].fill_(number))]


class LastWorker(Future[Any]):
    """The answer of a server whose last worker reads the bucket as late as it can: when the sender waits for it."""

    def __init__(self, call: Call, read: list[float]) -> None:
        super().__init__()
        assert call.body is not None
        self.bucket, self.read = call.body["bucket"], read

    def result(self, timeout: float | None = None) -> None:
        self.read += set(self.bucket[0][1].tolist())


class SharedAdapter(Adapter):
    def update(self, bucket: Bucket, group: str | None, version: int, *, compare: bool) -> Call:
        assert group is None
        return Call("/update", {"bucket": bucket})


def test_no_buffer_is_overwritten_before_every_server_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ms-swift#10204: a rank copied a bucket that already held the next one's bytes."""
    read: dict[int, list[float]] = {0: [], 1: []}
    targets = [Target(index, 0, f"http://127.0.0.1:{index + 1}") for index in read]
    config = ServersConfig(transport=Transport.shared, replicas=2)
    senders = Senders(SharedAdapter(tmp_path), config, "key", CPU, 2)  # type: ignore[arg-type]
    monkeypatch.setattr(_Link, "_post", lambda self, call: LastWorker(call, read[self._client.base_url.port - 1]))
    failed, _ = senders.send(InTurn(7), targets, 0, compare=False)
    senders.close()
    assert failed == {}
    assert read == {index: [float(number) for number in range(7)] for index in (0, 1)}


class OwnMemory(Given):
    """Buckets each in memory of its own, which is gone with the bucket (`weights.shared_memory.in_shared_memory`)."""

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        for number in range(5):
            yield in_shared_memory([("a", torch.full((4,), float(number)))])


class Opening(Future[Any]):
    """The answer of a server that opens the bucket's memory only when the sender waits for it."""

    def __init__(self, call: Call, read: list[float]) -> None:
        super().__init__()
        assert call.body is not None
        self.shared, self.read = call.body["shared"], read

    def result(self, timeout: float | None = None) -> None:
        manager, name, size = self.shared
        self.read += set(
            torch.empty(0).set_(torch.UntypedStorage._new_shared_filename_cpu(manager, name, size)).tolist()
        )


class NamedAdapter(Adapter):
    def update(self, bucket: Bucket, group: str | None, version: int, *, compare: bool) -> Call:
        return Call("/update", {"shared": bucket[0][1].untyped_storage()._share_filename_cpu_()})


def test_a_buckets_own_memory_stays_until_the_server_has_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[float] = []
    config = ServersConfig(transport=Transport.shared)
    senders = Senders(NamedAdapter(tmp_path), config, "key", CPU, 1)  # type: ignore[arg-type]
    monkeypatch.setattr(_Link, "_post", lambda self, call: Opening(call, read))
    failed, _ = senders.send(OwnMemory([]), [TARGET], 0, compare=False)
    senders.close()
    assert failed == {}
    assert read == [0.0, 1.0, 2.0, 3.0, 4.0]
