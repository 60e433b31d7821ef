"""Offloads models to host memory: keeps all of a run's models on the device, or one at a time.

A model that leaves has the storages of its weights and of its optimizer's state copied to host memory and emptied, so
that every view of them stays what it is; its gradients are let go, since each step begins from zero. On a GPU the host
memory is page-locked, and the next model's storages arrive while the last one's leave, in the room that they have left.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_tempo.errors import InputError


class Offloadable(Protocol):
    """A model that can be offloaded."""

    @property
    def device(self) -> torch.device: ...

    def persistent_tensors(self) -> Iterable[Tensor]:
        """Tensors whose contents are kept while the model is offloaded."""
        ...

    def transient_tensors(self) -> Iterable[Tensor]:
        """Tensors whose contents are dropped when the model is offloaded."""
        ...


@dataclass(frozen=True, slots=True)
class _OffloadedStorage:
    """A storage that was emptied: its bytes, and where they wait; none: they were let go."""

    storage: torch.UntypedStorage
    size: int
    host: Tensor | None  # uint8 [size]


class ModelOffloader:
    """The models on the device. With `one_at_a_time`, loading one offloads the others.

    `load` and `offload_all` work at once on a CPU; on a GPU what is queued afterwards finds the model there.
    """

    def __init__(self, *, one_at_a_time: bool) -> None:
        self._one_at_a_time = one_at_a_time
        self._loaded: Offloadable | None = None
        self._offloaded: dict[int, list[_OffloadedStorage]] = {}  # by the model's id
        self._hosts: dict[int, Tensor] = {}  # its host memory, which is kept for its next leave

    def load(self, model: Offloadable) -> None:
        """Load `model` to the device. At its first load it must be there already."""
        if not self._one_at_a_time or self._loaded is model:
            return
        outgoing = self._offload()
        _exchange(model.device, outgoing, self._offloaded.pop(id(model), []))
        self._loaded = model

    def offload_all(self) -> None:
        """Offload all models, so that another one can be built on the device."""
        if self._loaded is not None:
            device = self._loaded.device
            _exchange(device, self._offload(), [])
            self._loaded = None

    def _offload(self) -> list[_OffloadedStorage]:
        """The storages of the model that is there, with a place for each in host memory."""
        model = self._loaded
        if model is None:
            return []
        persistent, transient = _storages(model.persistent_tensors()), _storages(model.transient_tensors())
        total = sum(storage.nbytes() for storage in persistent.values())
        host = self._hosts.get(id(model))
        if host is None or len(host) < total:
            host = self._hosts[id(model)] = _host_memory(total, model.device)
        offloaded, at = [], 0
        for storage in sorted(persistent.values(), key=lambda storage: -storage.nbytes()):
            offloaded.append(_OffloadedStorage(storage, storage.nbytes(), host[at : at + storage.nbytes()]))
            at += storage.nbytes()
        offloaded += [
            _OffloadedStorage(one, one.nbytes(), None)
            for address, one in transient.items()
            if address not in persistent
        ]
        self._offloaded[id(model)] = offloaded
        return offloaded


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages that the tensors are views of, by address."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return {address: storage for address, storage in storages.items() if address}


def _host_memory(size: int, device: torch.device) -> Tensor:
    """uint8 [size], page-locked where the device is a GPU.

    Registered by hand: torch's own page-locked memory is rounded up to a power of two, up to twice as much.
    """
    host = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        cudart, address = torch.cuda.cudart(), host.data_ptr()
        error = int(cudart.cudaHostRegister(address, size, 0))
        if error:
            raise InputError(
                f"parallel.offload=true wants {size / 1e9:.1f} GB of page-locked host memory for a process, which CUDA "
                f"refuses (error {error}): raise the job's memory and `ulimit -l`, or set parallel.offload=false"
            )
        weakref.finalize(host, cudart.cudaHostUnregister, address)
    return host


def _exchange(device: torch.device, outgoing: list[_OffloadedStorage], incoming: list[_OffloadedStorage]) -> None:
    copies = _Copies.on(device)
    done = [copies.away(one) for one in outgoing]
    coming, room = deque(incoming), 0
    for one, wait in zip(outgoing, done, strict=True):
        wait()
        one.storage.resize_(0)
        room += one.size
        while coming and coming[0].size <= room:
            room -= coming[0].size
            copies.back(coming.popleft())
    for one in coming:
        copies.back(one)
    copies.finish()


class _Copies:
    """Copies between device and host, in order, as they are called."""

    @staticmethod
    def on(device: torch.device) -> _Copies:
        return _CudaCopies(device) if device.type == "cuda" else _Copies()

    def away(self, one: _OffloadedStorage) -> Callable[[], None]:
        """Begin to copy a storage to its host memory. The result waits until it is there."""
        if one.host is not None:
            one.host.copy_(_bytes(one.storage))
        return lambda: None

    def back(self, one: _OffloadedStorage) -> None:
        one.storage.resize_(one.size)
        if one.host is not None:
            _bytes(one.storage).copy_(one.host)

    def finish(self) -> None:
        """What is queued on the device from here on finds everything in its place."""


class _CudaCopies(_Copies):
    """Both directions at a time, each on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._out.wait_stream(self._main)

    def away(self, one: _OffloadedStorage) -> Callable[[], None]:
        with torch.cuda.stream(self._out):
            if one.host is not None:
                one.host.copy_(_bytes(one.storage), non_blocking=True)
            event = self._out.record_event()
        return event.synchronize

    def back(self, one: _OffloadedStorage) -> None:
        one.storage.resize_(one.size)  # on the main stream, whose earlier work may still use the memory that it finds
        if one.host is not None:
            self._in.wait_stream(self._main)
            with torch.cuda.stream(self._in):
                _bytes(one.storage).copy_(one.host, non_blocking=True)

    def finish(self) -> None:
        self._main.wait_stream(self._in)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
