"""The trainer's sender of weights and a receiver in a process of its own: buckets of 512 MB, and a receiver that dies.

Both transports are used: a broadcast in a process group, and CUDA's handles to memory of the sender (`shared`), which
is the one for an engine on the trainer's GPU. NCCL refuses two ranks on one GPU, so with one GPU the group is gloo's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch

from gpu_parts.measured import synchronize
from gpu_parts.receiver import PORT, RECEIVED
from gpu_parts.records import Records
from gpu_parts.setting import Setting
from megatron_tempo.config.choices import Transport
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.rollout.checksum import checksum
from megatron_tempo.rollout.cuda_memory import handle
from megatron_tempo.rollout.replica import Target
from megatron_tempo.rollout.server_adapter import Call, ServerAdapter, WeightGroupInfo
from megatron_tempo.rollout.transfer import Senders
from megatron_tempo.types import Bucket, Share
from megatron_tempo.weights.shared_memory import flat_buffer

BUCKETS, DIES_AT = 3, 2
UPDATE_SECONDS = 15.0  # after which a receiver that does not answer has failed
SLACK = 10.0  # seconds in which the sender must be free again after that


class Adapter:
    """What `Senders` asks of an engine: the calls that `receiver` understands."""

    takes_parts = False

    def join_group(self, info: WeightGroupInfo) -> Call:
        names = ("host", "port", "group", "world", "backend", "seconds")
        return Call("/join", {name: getattr(info, name) for name in names})

    def asks_for_places(self) -> Call | None:
        return None

    def update(self, bucket: Bucket, group: str | None, version: int, *, compare: bool) -> Call:
        tensors = [tensor for _, tensor in bucket]
        opened = handle(tensors[0].untyped_storage()) if group is None else None
        return Call(
            "/update",
            {"name": bucket[0][0], "bytes": sum(tensor.nbytes for tensor in tensors), "handle": opened},
        )

    def expected(self, bucket: Bucket) -> dict[str, tuple[str, float]]:
        flat = torch.cat([tensor.flatten().view(torch.uint8) for _, tensor in bucket])
        return {bucket[0][0]: (checksum(flat), 0.0)}


@dataclass(frozen=True, slots=True)
class Made:
    """Weights for a test: buckets of `size` bytes, each of two tensors that are one piece of memory."""

    device: torch.device
    size: int
    sends: bool = True
    copies: int = 1
    copy: int = 0

    def everywhere(self, *, parts: bool = False) -> Iterator[Bucket]:
        return self.from_stages(parts=parts)

    def from_stages(self, *, shared: bool = False, parts: bool = False, share: Share | None = None) -> Iterator[Bucket]:
        for number in range(BUCKETS):
            flat = flat_buffer(self.size // 2, torch.bfloat16, self.device, shared=shared).normal_()
            first, second = flat.split([self.size // 8, self.size // 2 - self.size // 8])
            synchronize()
            yield [(f"bucket {number}", first), (f"bucket {number}, second", second)]


def run(setting: Setting, records: Records) -> None:
    several = setting.device == "cuda" and torch.cuda.device_count() > 1
    backend = "nccl" if several and records.has_numbers else "gloo"
    gpus = torch.cuda.device_count() if setting.device == "cuda" else 0
    records.note("group", f"{backend}; {gpus} GPUs for the two processes")
    weights = Made(torch.device(setting.device), 1 << 20 if setting.small else 512 << 20)
    with records.attempt("group"):
        complete("group", Transport.group, weights, backend, setting, records)
    if setting.device == "cuda":
        with records.attempt("shared"):
            complete("shared", Transport.shared, weights, backend, setting, records)
    with records.attempt("killed receiver"):
        killed(weights, backend, setting, records)


def complete(name: str, transport: Transport, weights: Made, backend: str, setting: Setting, records: Records) -> None:
    """All buckets arrive as they were sent."""
    with receiver(setting, dies_at=0) as target, senders(transport, backend) as sender:
        started = time.perf_counter()
        failed, expected = sender.send(weights, [target], 1, compare=True)
        seconds = time.perf_counter() - started
        again, _ = sender.send(weights, [target], 2, compare=False)
    records.holds(f"{name}: no failure", not failed and not again, str(failed or again or "none"), numeric=False)
    lines = (setting.folder / RECEIVED).read_text(encoding="utf-8").splitlines()
    received = {line["name"]: line["checksum"] for line in map(json.loads, lines[:BUCKETS])}
    records.holds(f"{name}: all buckets arrive", len(lines) == 2 * BUCKETS, numeric=False)
    wanted = {bucket: total for bucket, (total, _) in expected.items()}
    records.holds(f"{name}: checksums are equal", received == wanted)
    records.figure(f"{name}: {BUCKETS} buckets of {weights.size / 2**20:.0f} MiB, with checksums", seconds, "s")


def killed(weights: Made, backend: str, setting: Setting, records: Records) -> None:
    """A receiver that dies costs the sender a bounded time, and the next receiver gets everything."""
    with senders(Transport.group, backend) as sender:
        with receiver(setting, dies_at=DIES_AT) as target:
            started = time.perf_counter()
            failed, _ = sender.send(weights, [target], 1, compare=False)
            seconds = time.perf_counter() - started
        records.holds("killed receiver: reported", 0 in failed, failed.get(0, "no failure"), numeric=False)
        bound = UPDATE_SECONDS + SLACK
        records.between("killed receiver: seconds until then", seconds, 0.0, bound, "s", numeric=False)
        with receiver(setting, dies_at=0) as target:
            failed, _ = sender.send(weights, [target], 2, compare=False)
            lines = (setting.folder / RECEIVED).read_text(encoding="utf-8").splitlines()
        words = str(failed or f"{len(lines)} buckets")
        records.holds(
            "killed receiver: the next one gets all", not failed and len(lines) == BUCKETS, words, numeric=False
        )
        started = time.perf_counter()
    records.between("killed receiver: the sender closes", time.perf_counter() - started, 0.0, SLACK, "s", numeric=False)


@contextmanager
def senders(transport: Transport, backend: str) -> Iterator[Senders]:
    config = ServersConfig(transport=transport, update_seconds=UPDATE_SECONDS)
    # The device that it sends from chooses the group's backend.
    device = torch.device("cpu" if backend == "gloo" else "cuda")
    made = Senders(cast(ServerAdapter, Adapter()), config, "no key", device, 1)
    try:
        yield made
    finally:
        made.close()


@contextmanager
def receiver(setting: Setting, dies_at: int) -> Iterator[Target]:
    """A receiver that has started. It is killed at the end."""
    port = setting.folder / PORT
    for path in (port, setting.folder / RECEIVED):
        path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "gpu_parts.receiver", setting.written(), str(dies_at)]
    with subprocess.Popen(command) as process:
        try:
            deadline = time.monotonic() + setting.seconds
            while not port.exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the receiver has not started: exit status {process.poll()}")
                time.sleep(0.02)
            yield Target(0, process.pid, f"http://127.0.0.1:{port.read_text(encoding='utf-8')}")
        finally:
            process.kill()
