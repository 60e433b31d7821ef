"""Sends weights from a trainer rank to the workers of its servers.

The copies of the model (data and context parallelism) divide the servers among them (`rounds`), so each sends an equal
part of all bytes, at the same time as the others. Where weights go through shared memory, the copies on a machine so
divide the servers of that machine (`Fed`). A sender has one process group for each of its servers, not one for
all: when a worker dies during a broadcast, the others of its group wait until a timeout, and that should affect only
its own server. The cost: a sender's link carries each bucket once for each of its servers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate
from threading import Thread
from typing import TypeVar

import httpx
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.choices import Transport
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.models.megatron_compat.torch_private import abort_separate_group, join_separate_group
from megatron_tempo.rollout.addresses import own_address
from megatron_tempo.rollout.answer_checks import checked
from megatron_tempo.rollout.connections import LIMITS, authorised
from megatron_tempo.rollout.replica import Target
from megatron_tempo.rollout.server_adapter import Call, ServerAdapter, WeightGroupInfo
from megatron_tempo.rollout.slices import Places, Slices, sliced
from megatron_tempo.rollout.supervisor import private_store
from megatron_tempo.types import Bucket, Share, Weights

_POLL = 0.0005  # seconds between two looks at a broadcast
_ABORT_SECONDS = 30.0  # limit on leaving a group
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Fed:
    """Servers and the copies of the model that feed them, both by their numbers.

    >>> Fed(servers=(2, 3), copies=(2, 3))  # of the second of two nodes
    """

    servers: tuple[int, ...]
    copies: tuple[int, ...]

    def rounds(self, copy: int) -> list[tuple[Share, list[int]]]:
        """`rounds` among these alone: what a copy sends; nothing if it is none of these."""
        if copy not in self.copies:
            return []
        own = rounds(len(self.servers), len(self.copies), self.copies.index(copy))
        here = len(self.copies)
        return [(replace(share, senders=here), [self.servers[place] for place in of]) for share, of in own]


def rounds(servers: int, copies: int, copy: int) -> list[tuple[Share, list[int]]]:
    """What a copy of the model sends, round by round: some of its buckets, and the servers that get them.

    A copy sends everything to as many servers as every other copy does. Each of the remaining servers, fewer than the
    copies, gets `copies` shares, and each copy sends as many of these shares. A copy makes no bucket in two rounds.

    >>> rounds(servers=3, copies=2, copy=1)
    [(Share(count=2, taken=(0,)), [1]), (Share(count=2, taken=(1,)), [1, 2])]
    """
    left = servers % copies
    whole = tuple(range(copy, servers - left, copies))
    if left == 0:
        return [(Share(), list(whole))]
    mine = range(copy * left, (copy + 1) * left)  # of the remaining servers' shares, counted through
    divided = {number % copies: servers - left + number // copies for number in mine}
    taken: dict[tuple[int, ...], list[int]] = {}
    for number in range(copies):
        if targets := (*whole, divided[number]) if number in divided else whole:
            taken.setdefault(targets, []).append(number)
    return [(Share(copies, tuple(numbers)), list(targets)) for targets, numbers in taken.items()]


class Senders:
    """The links of a rank that sends weights: one to each of its servers."""

    def __init__(
        self,
        adapter: ServerAdapter,
        config: ServersConfig,
        key: str,
        device: torch.device,
        servers: int,
        fed: Sequence[Fed] | None = None,
    ) -> None:
        """`device`: this rank's, from which buckets are sent. `servers`: the number of all servers. `fed`: which copies
        of the model feed which of them, each server once; None: all copies feed all servers."""
        self._adapter, self._config, self._key, self._device = adapter, config, key, device
        self._servers, self._fed = servers, fed
        self._links: dict[Target, _Link] = {}
        self._pool = ThreadPoolExecutor(thread_name_prefix="sender")

    def send(
        self, weights: Weights, targets: Sequence[Target], version: int, *, compare: bool
    ) -> tuple[dict[int, str], dict[str, tuple[str, float]]]:
        """Send what this rank's copy of the model sends to its servers among `targets`.

        Returns (failures by server, if requested the checksums of what was sent, of parts by the parts' names).
        Collective, as `weights` is: the ranks of a copy give the same targets.
        """
        failed: dict[int, str] = {}
        expected: dict[str, tuple[str, float]] = {}
        fed = self._fed or [Fed(tuple(range(self._servers)), tuple(range(weights.copies)))]
        for share, servers in (one for group in fed for one in group.rounds(weights.copy)):
            if mine := [target for target in targets if target.index in servers]:
                expected |= self._send(weights, share, mine, version, failed, compare=compare)
        if self._config.transport is Transport.shared and torch.cuda.is_available():
            torch.cuda.ipc_collect()  # what servers have released
        return failed, expected

    def _send(
        self,
        weights: Weights,
        share: Share,
        targets: Sequence[Target],
        version: int,
        failed: dict[int, str],
        *,
        compare: bool,
    ) -> dict[str, tuple[str, float]]:
        """One round. The next bucket is made while the servers load the previous one, and the round ends when they
        have loaded the last one. A server that fails is added to `failed` and loses its link at once."""
        if weights.sends:
            self._connect([target for target in targets if target.index not in failed], failed)
        shared = self._config.transport is Transport.shared
        expected: dict[str, tuple[str, float]] = {}
        loading: dict[Target, Future[httpx.Response]] = {}
        held: Bucket | None = None
        for bucket in weights.from_stages(shared=shared, parts=self._adapter.takes_parts, share=share):
            if compare:
                expected |= self._adapter.expected(bucket)
            self._collect(loading, failed)
            cuts = self._cut(bucket, [target for target in targets if target.index not in failed], failed)
            sent = {
                target: self._pool.submit(self._links[target].send, bucket, version, compare, cut)
                for target, cut in cuts.items()
            }
            loading = self._collect(sent, failed)
            del cuts, sent  # the slices' memory
            # Shared memory may be the bucket's own, and is gone with it: it stays until every server has loaded it.
            held = bucket if shared else None
            del bucket  # before the next one is made
        self._collect(loading, failed)
        del held
        return expected

    def _cut(self, bucket: Bucket, targets: Sequence[Target], failed: dict[int, str]) -> dict[Target, Slices | None]:
        """The bucket's slices for each server, None where all of it is broadcast. Servers with equal workers share."""
        cuts: dict[Target, Slices | None] = {}
        for target in targets:
            places = self._links[target].places
            same = [cut for other, cut in cuts.items() if self._links[other].places == places]
            try:
                cuts[target] = same[0] if same else sliced(bucket, places, self._device) if places else None
            except EngineError as error:
                self._give_up(target, error, failed)
        return cuts

    def _give_up(self, target: Target, error: Exception, failed: dict[int, str]) -> None:
        failed[target.index] = _describe(error)
        self._links.pop(target).close()

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links = {}
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _connect(self, targets: Sequence[Target], failed: dict[int, str]) -> None:
        """Open links to newly started servers, and close links to servers that are gone."""
        for target in set(self._links) - set(targets):
            if any(target.index == new.index for new in targets):
                self._links.pop(target).close()
        for target in targets:
            if target not in self._links:
                self._links[target] = link = _Link(self._adapter, self._config, self._key, target, self._device)
                if self._config.transport is Transport.group:
                    self._collect({target: self._pool.submit(link.join_group)}, failed)

    def _collect(self, futures: dict[Target, Future[_T]], failed: dict[int, str]) -> dict[Target, _T]:
        """The results, without the failures, which are noted; the links of those servers are closed."""
        results = {}
        for target, future in futures.items():
            try:
                results[target] = future.result()
            except (httpx.HTTPError, EngineError, RuntimeError) as error:
                self._give_up(target, error, failed)
        return results


def _describe(error: Exception) -> str:
    kind = "" if isinstance(error, EngineError) else f"{type(error).__name__} "
    return f"failed in a weight update: {kind}{error}".rstrip()


class _Link:
    """The connection from one sender to one server.

    No wait here is longer than `rollout.servers.update_seconds`. Calls that torch does not bound run in threads that do
    not keep the process alive: NCCL opens a communicator with a group's first broadcast, and waits for a lost member
    for ever.
    """

    def __init__(
        self, adapter: ServerAdapter, config: ServersConfig, key: str, target: Target, device: torch.device
    ) -> None:
        self._adapter, self._config, self._device = adapter, config, device
        self._seconds = config.update_seconds
        self._client = httpx.Client(
            base_url=target.url, headers=authorised(key), timeout=self._seconds, limits=LIMITS, trust_env=False
        )
        self._posting = ThreadPoolExecutor(1, thread_name_prefix="link")
        self._name = f"megatron_tempo_{secrets.token_hex(4)}"
        self._group: dist.ProcessGroup | None = None
        self.places: Places = []  # what the workers need; nothing: whole tensors

    def join_group(self) -> None:
        """Open a process group with the server's workers, of which this is rank 0."""
        world, seconds, cpu = 1 + self._config.tensor, self._seconds, self._device.type == "cpu"
        backend = "gloo" if cpu else "nccl"
        host = own_address(self._config.host)
        self._store = private_store(host, timedelta(seconds=seconds))
        call = self._adapter.join_group(WeightGroupInfo(host, self._store.port, self._name, world, backend, seconds))
        joined = self._post(call)
        store = dist.PrefixStore(self._name, self._store)
        # torch's NCCL watchdog ends this process when a broadcast takes longer. A link gives up before.
        timeout = timedelta(seconds=seconds if cpu else 2 * seconds + 60)
        opened = _in_thread(lambda: join_separate_group(store, self._name, 0, world, backend, timeout))
        self._wait(opened.done, joined)
        self._group = opened.result()
        joined.result()
        if (ask := self._adapter.asks_for_places()) is not None:
            self.places = self._adapter.places(self._post(ask).result().json())

    def send(self, bucket: Bucket, version: int, compare: bool, slices: Slices | None = None) -> Future[httpx.Response]:
        """Send a bucket, or its slices. The returned future completes when the server has loaded it.

        Raises httpx.HTTPError, EngineError or RuntimeError if the server rejects it or does not receive it in time.
        """
        group = self._group
        name = None if group is None else self._name
        if slices is None or group is None:
            answer = self._post(self._adapter.update(bucket, name, version, compare=compare))
            common = [tensor for _, tensor in bucket]
        else:
            answer = self._post(self._adapter.update(bucket, name, version, compare=compare, slices=slices))
            common = slices.common
        if group is not None and common:
            # NCCL sends from GPUs only, gloo from the CPU: weights that lie elsewhere are copied.
            flat = joined_bytes(common).to(self._device)
            self._finish(lambda: [dist.broadcast(flat, src=0, group=group, async_op=True)], answer)
        if group is not None and slices is not None and any(own.numel() for own in slices.own):
            self._finish(lambda: self._isend(slices.own, group), answer)
        return answer

    def _isend(self, own: Sequence[Tensor], group: dist.ProcessGroup) -> list[dist.Work | None]:
        """Start a message to each worker that is sent something. Under NCCL, each is a communicator of two ranks.

        gloo does not say whether a message is over, except to the one who waits, once: it is waited for here.
        """
        messages = [
            dist.isend(data, group=group, group_dst=1 + worker) for worker, data in enumerate(own) if data.numel()
        ]
        if self._device.type != "cpu":
            return list(messages)
        for message in messages:
            assert message is not None
            message.wait()
        return []

    def _finish(self, start: Callable[[], Sequence[dist.Work | None]], answer: Future[httpx.Response]) -> None:
        """Start sending, and wait until everything has been sent, as `_wait` does."""
        begun = _in_thread(start)
        self._wait(
            lambda: begun.done() and (begun.exception() is not None or all(map(_is_over, begun.result()))), answer
        )
        for work in begun.result():
            assert work is not None
            work.wait()  # raises what it failed with

    def _wait(self, is_done: Callable[[], bool], answer: Future[httpx.Response]) -> None:
        """Until `is_done`. Raises the server's error if it rejects the call, EngineError if it takes too long."""
        deadline = time.monotonic() + self._seconds
        while not is_done():
            if answer.done() and answer.exception() is not None:
                answer.result()  # nobody will receive it
            if time.monotonic() > deadline:
                raise EngineError(f"took no weights for rollout.servers.update_seconds={self._seconds:g}")
            time.sleep(_POLL)

    def _post(self, call: Call) -> Future[httpx.Response]:
        return self._posting.submit(lambda: checked(self._client.post(call.path, json=call.body), call))

    def close(self) -> None:
        """Leave the group, even in the middle of a broadcast that nobody receives."""
        group, self._group = self._group, None
        if group is not None:
            left = _in_thread(lambda: abort_separate_group(group))
            with suppress(TimeoutError, RuntimeError, ValueError):
                left.result(_ABORT_SECONDS)
        self._client.close()
        self._posting.shutdown(wait=False, cancel_futures=True)


def _is_over(work: dist.Work | None) -> bool:
    return work is None or work.is_completed()


def _in_thread(make: Callable[[], _T]) -> Future[_T]:
    """The future result of `make`, which runs in a thread of its own that no exit waits for."""
    future: Future[_T] = Future()

    def run() -> None:
        try:
            result = make()
        except (RuntimeError, OSError, ValueError) as error:  # raised where the result is read
            future.set_exception(error)
        else:
            future.set_result(result)

    Thread(target=run, daemon=True).start()
    return future


def joined_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """The bytes of all tensors, one after another: uint8 [sum of sizes]. A view if they are already contiguous."""
    first = tensors[0]
    storage, ends = first.untyped_storage(), list(accumulate((tensor.nbytes for tensor in tensors), initial=0))
    start = first.data_ptr() - storage.data_ptr()
    in_line = all(
        tensor.is_contiguous() and tensor.data_ptr() == first.data_ptr() + end
        for tensor, end in zip(tensors, ends, strict=False)
    )
    if in_line and start + ends[-1] <= storage.nbytes():
        return torch.empty(0, dtype=torch.uint8, device=first.device).set_(storage, start, (ends[-1],), (1,))
    return torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
