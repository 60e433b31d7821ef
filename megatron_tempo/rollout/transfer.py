"""Sends weights from a trainer rank to the workers of every server.

A sender has one process group for each server, not one for all: when a worker dies during a broadcast, the others of
its group wait until a timeout, and that should affect only its own server. The cost: a sender's link carries each
bucket once for each server.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import accumulate

import httpx
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tempo.config.choices import Transport
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.errors import EngineError
from megatron_tempo.models.megatron_compat.torch_private import join_separate_group
from megatron_tempo.rollout.addresses import own_address
from megatron_tempo.rollout.answer_checks import checked
from megatron_tempo.rollout.replica import LIMITS, Target
from megatron_tempo.rollout.server_adapter import Call, ServerAdapter, WeightGroupInfo, authorised
from megatron_tempo.rollout.supervisor import private_store
from megatron_tempo.types import Bucket, Weights


class Senders:
    """The links of a rank that sends weights: one to each server."""

    def __init__(self, adapter: ServerAdapter, config: ServersConfig, key: str, backend: str) -> None:
        self._adapter, self._config, self._key, self._backend = adapter, config, key, backend
        self._links: dict[Target, _Link] = {}
        self._pool = ThreadPoolExecutor(thread_name_prefix="sender")

    def send(
        self, weights: Weights, targets: Sequence[Target], version: int, *, compare: bool
    ) -> tuple[dict[int, str], dict[str, tuple[str, float]]]:
        """Send this rank's buckets to all servers. Returns (failures by server, the tensors' checksums if requested).

        The next bucket is made while the servers load the previous one. Collective, as `weights` is.
        """
        shared = self._config.transport is Transport.shared
        failed: dict[int, str] = {}
        if weights.sends:
            self._connect(targets, failed)
        expected: dict[str, tuple[str, float]] = {}
        loading: dict[Target, Future[httpx.Response]] = {}
        for bucket in weights.from_stages(shared=shared):
            if compare:
                expected |= self._adapter.expected(bucket)
            _collect_failures(loading, failed)
            left = [target for target in targets if target.index not in failed]
            sent = {target: self._pool.submit(self._links[target].send, bucket, version, compare) for target in left}
            loading = {}
            for target, future in sent.items():
                try:
                    loading[target] = future.result()
                except (httpx.HTTPError, EngineError, RuntimeError) as error:
                    failed[target.index] = _describe(error)
            del bucket  # before the next one is made
        _collect_failures(loading, failed)
        if shared and torch.cuda.is_available():
            torch.cuda.ipc_collect()  # what servers have released
        return failed, expected

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
        news = [target for target in targets if target not in self._links]
        made = {target: self._pool.submit(_Link, self._adapter, self._config, self._key, target) for target in news}
        for target, future in made.items():
            self._links[target] = link = future.result()
            if self._config.transport is Transport.group:
                try:
                    link.join_group(self._backend)
                except (httpx.HTTPError, EngineError, RuntimeError) as error:
                    failed[target.index] = _describe(error)


def _collect_failures(loading: dict[Target, Future[httpx.Response]], failed: dict[int, str]) -> None:
    for target, future in loading.items():
        try:
            future.result()
        except (httpx.HTTPError, EngineError) as error:
            failed[target.index] = _describe(error)


def _describe(error: Exception) -> str:
    kind = "" if isinstance(error, EngineError) else f"{type(error).__name__} "
    return f"failed in a weight update: {kind}{error}".rstrip()


class _Link:
    """The connection from one sender to one server."""

    def __init__(self, adapter: ServerAdapter, config: ServersConfig, key: str, target: Target) -> None:
        self._adapter, self._config = adapter, config
        timeout = config.update_seconds
        self._client = httpx.Client(
            base_url=target.url, headers=authorised(key), timeout=timeout, limits=LIMITS, trust_env=False
        )
        self._posting = ThreadPoolExecutor(1, thread_name_prefix="link")
        self._name = f"megatron_tempo_{secrets.token_hex(4)}"
        self._group: dist.ProcessGroup | None = None

    def join_group(self, backend: str) -> None:
        """Open a process group with the server's workers, of which this is rank 0."""
        world, seconds = 1 + self._config.tensor, self._config.update_seconds
        timeout = timedelta(seconds=seconds)
        host = own_address(self._config.host)
        self._store = private_store(host, timeout)
        call = self._adapter.join_group(WeightGroupInfo(host, self._store.port, self._name, world, backend, seconds))
        joined = self._post(call)
        store = dist.PrefixStore(self._name, self._store)
        self._group = join_separate_group(store, self._name, 0, world, backend, timeout)
        joined.result()

    def send(self, bucket: Bucket, version: int, compare: bool) -> Future[httpx.Response]:
        """Send a bucket. The returned future completes when the server has loaded it."""
        in_group = self._group is not None
        call = self._adapter.update(bucket, self._name if in_group else None, version, compare=compare)
        answer = self._post(call)
        if in_group:
            work = dist.broadcast(
                joined_bytes([tensor for _, tensor in bucket]), src=0, group=self._group, async_op=True
            )
            assert work is not None
            while not work.is_completed():
                if answer.done() and answer.exception() is not None:
                    answer.result()  # rejected: nobody will receive it
                time.sleep(0.0005)
            work.wait()
        return answer

    def _post(self, call: Call) -> Future[httpx.Response]:
        return self._posting.submit(lambda: checked(self._client.post(call.path, json=call.body), call))

    def close(self) -> None:
        self._client.close()
        self._posting.shutdown(wait=False, cancel_futures=True)
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None


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
