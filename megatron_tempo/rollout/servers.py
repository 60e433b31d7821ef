"""The engine made of any number of SGLang or vLLM servers.

The first rank sends them requests (`fleet.py`). The first tensor rank of each pipeline stage, of every copy of the
model, sends them weights (`transfer.py`). The first rank of each node starts them (`supervisor.py`). The first rank
broadcasts what happens, so that all ranks take part when a restarted server needs the weights.
"""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_tempo.config.choices import EnginePrecision, Transport
from megatron_tempo.config.schema import ServersConfig
from megatron_tempo.data.tokenizer import end_tokens
from megatron_tempo.errors import DriftError, EngineError, InputError
from megatron_tempo.files import read_text
from megatron_tempo.rollout.addresses import chosen_devices, own_address, visible_devices
from megatron_tempo.rollout.checked_fleet import CheckedFleet
from megatron_tempo.rollout.checksum import whole_checksums
from megatron_tempo.rollout.engine import Arrived, EngineWork, Request, Sampling, TrainerGpus
from megatron_tempo.rollout.placement import placed, visible_gpus
from megatron_tempo.rollout.read_back import EVERYTHING, SELECTIONS, Selection
from megatron_tempo.rollout.replica import Answered, Event, Failed, GenerationJob, Starter
from megatron_tempo.rollout.served_stream import ServedStream
from megatron_tempo.rollout.server import Server
from megatron_tempo.rollout.server_adapter import ServerAdapter
from megatron_tempo.rollout.server_nodes import server_nodes
from megatron_tempo.rollout.supervisor import (
    ExternalServers,
    ServerSupervisor,
    SupervisedServers,
    parts_are_taken,
    private_store,
)
from megatron_tempo.rollout.transfer import Senders
from megatron_tempo.rollout.verifying_nodes import joined
from megatron_tempo.types import Completion, EngineHealth, TokenCount, Weights

log = logging.getLogger(__name__)

# Seconds after which waiting ranks are sent "nothing new": well within the timeout of their groups.
_HEARTBEAT = 30.0

_T = TypeVar("_T")


class ServersEngine:
    """An `Engine`. Whether the seeds of requests are used depends on `Sampling.seeded` and on the servers."""

    def __init__(
        self,
        adapter: ServerAdapter,
        config: ServersConfig,
        model: Path,
        work: Path,
        precision: EnginePrecision,
        device: torch.device,
        vocab: int,
        timeout: timedelta,
        gpus: TrainerGpus | None = None,
        *,
        copy: int,
        resyncs: bool = False,
    ) -> None:
        """Collective. Started servers write below `work`. The first rank logs each that fails.
        `timeout`: how long a rank waits for the first one, which may be waiting for servers. `gpus`: the trainer's
        side of GPUs that it shares with the servers by turns; None if they have their own. The engine is asleep then.
        `copy`: the number of the copy of the model that this rank holds a part of. `resyncs`: whether wrong weights are
        sent once more, before the run stops.

        Raises InputError if a server does not start, or if it or its weights cannot be reached from the trainer.
        """
        self.counted = TokenCount()
        self.work = EngineWork()
        self._adapter, self._config = adapter, config
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        if gpus is not None:
            gpus.lend()  # servers measure the free memory when they start
        self._weights: Weights | None = None
        self._version = -1
        self._updates = 0
        self._gpus, self._asleep = gpus, gpus is not None
        self._resyncs, self.resynced = resyncs, 0  # the latter counts
        self.gate: Callable[[], None] | None = None
        self._is_in_gate = False
        self._closing = ExitStack()
        found = server_nodes(config, device, self._control, copy, colocated=gpus is not None)
        nodes = found.first
        self.replicas = config.replicas * len(nodes) if config.addresses is None else len(config.addresses)
        self.nodes = joined(self._control, self._open_store)  # every node has taken part in the above: it is reachable
        if self.nodes is not None:
            self._closing.callback(self.nodes.close)
        key = self._agree(self._key)
        self._senders = Senders(adapter, config, key, device, self.replicas, found.fed)
        self._closing.callback(self._senders.close)
        places = self._placed(nodes, found.trainers) if config.addresses is None and device.type == "cuda" else []

        def make(index: int) -> Server:
            return Server(adapter, config, model, work / str(index), key, precision, self._devices(index, places))

        self._fleet: CheckedFleet | None = None
        self._supervisor: ServerSupervisor | None = None
        starter = self._external(key) if config.addresses is not None else self._supervised(nodes, make)
        if starter is not None:
            common = (adapter, config, starter, self.replicas, key, end_tokens(model), vocab, self.work)
            self._fleet = CheckedFleet(*common, sleeps=gpus is not None)
            self._closing.callback(self._fleet.close)
            if (warning := adapter.other_ends(model, found=config.addresses is not None)) is not None:
                log.warning("%s", warning)
        self._start(key)
        if gpus is not None:
            gpus.take_back()

    def _start(self, key: str) -> None:
        """Start the servers, or reach those in `addresses`, and ask these what they take. Collective."""
        adapter, addresses = self._adapter, self._config.addresses
        try:
            self._agree(lambda: self._first.open())
            if addresses is not None:
                adapter.takes_parts = self._agree(lambda: parts_are_taken(adapter, addresses, key))
        except BaseException:
            self.close()
            raise

    @property
    def asleep(self) -> bool:
        return self._asleep

    def sleep(self) -> None:
        if self._gpus is not None and not self._asleep:
            self._agree(lambda: self._first.sleep())
            self._asleep = True
            self._gpus.take_back()

    def start(
        self, requests: Sequence[Request], sampling: Sampling, arrived: Arrived | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        assert self._weights is not None, "load_weights comes first"
        assert not self._asleep, "load_weights wakes the engine"
        job = None
        if self._fleet is not None:
            job = self._fleet.submit(requests, sampling, GenerationJob(arrived))
        return self._answers(job)

    def stream(self, sampling: Sampling, arrived: Arrived) -> ServedStream:
        return ServedStream(self._fleet, sampling, arrived, self._answers)

    def load_weights(self, weights: Weights, version: int) -> None:
        self.sleep()  # while servers are awake, there is no room for the trainer's weights
        self._weights, self._version = weights, version
        every, selection = self._config.checksums_every, None
        if every > 0 and self._updates % every == 0:
            number = self._updates // every
            selection = Selection(number % SELECTIONS, SELECTIONS) if number else EVERYTHING
        self._updates += 1
        self._asleep = False  # before the first server wakes, so that `sleep` ends what a failure leaves awake
        self._feed(empty_only=False, selection=selection)

    def probe(
        self, requests: Sequence[Request], sampling: Sampling, *, restarted: bool
    ) -> dict[int, list[list[Completion]]]:
        answers: dict[int, list[list[Completion]]] = {}

        def ask() -> list[int]:
            answers.update(self._first.probe(requests, sampling, restarted=restarted))
            return sorted(answers)

        asked = self._agree(ask)
        self.counted.add(sum(len(one.token_ids) for of in answers.values() for row in of for one in row), 0)
        return {server: answers.get(server, []) for server in asked}

    def differences(self, weights: Weights) -> list[tuple[str, float]] | None:
        if self._gpus is not None:
            return None  # while servers are awake, there is no room for the weights to compare with
        expected: dict[str, tuple[str, float]] = {}
        for bucket in weights.from_stages(parts=self._adapter.takes_parts):
            expected |= self._adapter.expected(bucket)
        expected = self._joined(whole_checksums(expected))
        return self._agree(lambda: self._first.differences(expected))

    def health(self) -> list[EngineHealth]:
        return [] if self._fleet is None else self._fleet.health()

    def close(self) -> None:
        self._closing.close()

    # Agreement between ranks

    @property
    def _first(self) -> CheckedFleet:
        assert self._fleet is not None
        return self._fleet

    def _agree(self, make: Callable[[], _T]) -> _T:
        """The result of `make` on the first rank, on every rank. Raises its error on every rank."""
        result: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                result[0] = make()
            except (InputError, EngineError, OSError) as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0, group=self._control)
        if result[1] is not None:
            raise result[1]
        return result[0]

    def _joined(self, mine: dict[Any, Any]) -> dict[Any, Any]:
        """The entries of all ranks, on every rank."""
        shares: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(shares, mine, group=self._control)
        return {key: value for share in shares for key, value in share.items()}

    # Starting servers

    def _placed(self, nodes: list[int], trainers: set[str]) -> list[int]:
        """The GPUs of this node's servers (`placement.placed`); none on ranks that start no server.

        Raises InputError on every rank if the servers of a node cannot be placed.
        """
        gpus: list[int] = []
        wrong: dict[int, str] = {}
        if dist.get_rank() in nodes:
            try:
                gpus = placed(self._config, visible_gpus(), trainers, colocated=self._gpus is not None)
            except InputError as error:
                wrong[dist.get_rank()] = f"{socket.gethostname()}: {error}"
        if wrong := self._joined(wrong):
            raise InputError(next(iter(wrong.values())))
        return gpus

    def _key(self) -> str:
        if self._config.key_file is not None:
            return read_text(Path(self._config.key_file)).strip()
        return secrets.token_hex(24)  # hexadecimal: a command line would take a leading "-" for an option

    def _external(self, key: str) -> Starter | None:
        assert self._config.addresses is not None
        first = dist.get_rank() == 0
        return (
            ExternalServers(self._adapter, self._config.addresses, key, self._config.start_seconds) if first else None
        )

    def _supervised(self, nodes: list[int], make: Callable[[int], Server]) -> Starter | None:
        """Start a supervisor on the first rank of each node, and on rank 0 the `Starter` that gives them orders."""
        rank, store = dist.get_rank(), self._open_store()
        host, port = self._agree(lambda: (store.host, store.port) if store is not None else ("", 0))
        if rank in nodes:
            self._supervisor = ServerSupervisor((host, port), nodes.index(rank), make)
            self._closing.callback(self._supervisor.close)
        return None if store is None else SupervisedServers(store, self._config.replicas)

    def _open_store(self) -> dist.TCPStore | None:
        """A store that all ranks reach, on the first rank; None on the others."""
        return private_store(own_address(self._config.host), timedelta(days=365)) if dist.get_rank() == 0 else None

    def _devices(self, index: int, gpus: list[int]) -> str:
        """CUDA_VISIBLE_DEVICES of a server. `gpus`: those of this node's servers; none on a CPU."""
        first = index % self._config.replicas * self._config.tensor
        own = chosen_devices(gpus[first : first + self._config.tensor])
        if own and self._config.transport is Transport.shared:
            # Its own GPUs, followed by the trainer's, whose memory it opens.
            ours = visible_devices()
            ours = [str(number) for number in range(torch.cuda.device_count())] if ours is None else ours
            own += [device for device in ours if device not in own]
        return ",".join(own)

    # Answers

    def _answers(
        self, job: GenerationJob | None, enough: Callable[[], bool] | None = None
    ) -> Iterator[tuple[int, list[Completion]]]:
        """The answers to a job's requests, until `enough` says so on the first rank; None: to all of them."""
        while True:
            event: Any = None
            if job is not None and not (enough is not None and enough()):
                event = Event.nothing if job.left or not job.events.empty() else None
                if event is not None and isinstance(event := self._first.next(job, _HEARTBEAT), Answered):
                    self.counted.add(sum(len(c.token_ids) for c in event.completions), 0)
                    yield event.number, event.completions
                    continue
            order: Any = self._agree(lambda event=event: event)  # type: ignore[misc]
            if order is None or isinstance(order, Failed):
                if job is not None and (order is not None or enough is None):
                    self._first.finish(job)
                if order is None:
                    return
                raise EngineError(order.why)
            if order is Event.weights_wanted:
                self._feed(empty_only=True, selection=EVERYTHING if self._config.checksums_every > 0 else None)

    # Weights

    def _feed(self, *, empty_only: bool, selection: Selection | None) -> None:
        """Send the weights to all servers, or only to those that have none, and let restarted ones pass the gate.

        `selection`: what is read back, besides a comparison of all that arrived; None: nothing is compared.
        Raises DriftError if a server has other weights then, and again when they are sent once more.
        """
        wrong = self._update(empty_only=empty_only, selection=selection)
        if wrong is not None and self._resyncs:
            log.warning("%s; all weights are sent again", wrong)
            self.resynced += 1
            self.sleep()  # those on the trainer's GPUs make room for the weights
            self._asleep = False
            wrong = self._update(empty_only=False, selection=EVERYTHING)
        if wrong is not None:
            raise DriftError(wrong)
        if self._agree(lambda: self._first.none_is_left()):
            raise EngineError(self._agree(lambda: self._first.loss()))
        if self.gate is not None and not self._is_in_gate:
            self._pass_gate(self.gate)

    def _pass_gate(self, gate: Callable[[], None]) -> None:
        """Let the restarted servers that have the weights pass the gate, after which they answer."""
        if self._agree(lambda: self._first.restarted()):
            self._is_in_gate = True
            try:
                gate()
            finally:
                self._is_in_gate = False
            self._agree(lambda: self._first.release())

    def _update(self, *, empty_only: bool, selection: Selection | None) -> str | None:
        """Send the weights. Returns what is wrong with a server's weights, None if nothing is."""
        assert self._weights is not None
        self._lend()
        compare = selection is not None
        targets = self._agree(lambda: self._first.begin_update(empty_only=empty_only))
        failed: dict[int, str] = {}
        expected: dict[str, tuple[str, float]] = {}
        refused: dict[int, str] = {}  # weights that are not to be sent, by rank
        if targets:
            try:
                failed, expected = self._senders.send(self._weights, targets, self._version, compare=compare)
            except InputError as error:
                refused[dist.get_rank()] = str(error)
        if refused := self._joined(refused):
            raise InputError(next(iter(refused.values())))
        self._lend()  # the weights too, for the KV cache
        failed, expected = self._joined(failed), whole_checksums(self._joined(expected))

        def end() -> str | None:
            self._first.set_gate(is_there=self.gate is not None)
            return self._first.end_update(targets, failed, self._version, expected, selection or EVERYTHING)

        return self._agree(end)

    def _lend(self) -> None:
        """Give the trainer's memory to servers on its GPUs. Every rank has done so when this returns."""
        if self._gpus is not None:
            self._gpus.lend()
            dist.barrier(self._control)
