"""Which of a run's models are on the device: all of them, or one at a time while the others wait in host memory.

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


class Resident(Protocol):
    """A model that can leave the device."""

    @property
    def device(self) -> torch.device: ...

    def kept(self) -> Iterable[Tensor]:
        """Tensors whose contents must come back."""
        ...

    def scratch(self) -> Iterable[Tensor]:
        """Tensors that may come back with any contents."""
        ...


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A storage that was emptied: its bytes, and where they wait; none: they were let go."""

    storage: torch.UntypedStorage
    size: int
    host: Tensor | None  # uint8 [size]


class Residence:
    """The device's models. With `one_at_a_time`, whoever is brought sends the others away.

    `bring` and `clear` work at once on a CPU; on a GPU what is queued afterwards finds the model there.
    """

    def __init__(self, *, one_at_a_time: bool) -> None:
        self._one_at_a_time = one_at_a_time
        self._there: Resident | None = None
        self._away: dict[int, list[_Waiting]] = {}  # by the model's id
        self._hosts: dict[int, Tensor] = {}  # its host memory, which is kept for its next leave

    def bring(self, model: Resident) -> None:
        """Have `model` on the device. A model that is brought for the first time must be there already."""
        if not self._one_at_a_time or self._there is model:
            return
        leaving = self._leave()
        _exchange(model.device, leaving, self._away.pop(id(model), []))
        self._there = model

    def clear(self) -> None:
        """Have no model on the device, so that another one can be built there."""
        if self._there is not None:
            device = self._there.device
            _exchange(device, self._leave(), [])
            self._there = None

    def _leave(self) -> list[_Waiting]:
        """The storages of the model that is there, with a place for each in host memory."""
        model = self._there
        if model is None:
            return []
        kept, scratch = _storages(model.kept()), _storages(model.scratch())
        total = sum(storage.nbytes() for storage in kept.values())
        host = self._hosts.get(id(model))
        if host is None or len(host) < total:
            host = self._hosts[id(model)] = _host_memory(total, model.device)
        waiting, at = [], 0
        for storage in sorted(kept.values(), key=lambda storage: -storage.nbytes()):
            waiting.append(_Waiting(storage, storage.nbytes(), host[at : at + storage.nbytes()]))
            at += storage.nbytes()
        waiting += [_Waiting(one, one.nbytes(), None) for place, one in scratch.items() if place not in kept]
        self._away[id(model)] = waiting
        return waiting


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages that the tensors are views of, by address."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return {address: storage for address, storage in found.items() if address}


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


def _exchange(device: torch.device, leaving: list[_Waiting], arriving: list[_Waiting]) -> None:
    copies = _Copies.on(device)
    done = [copies.away(one) for one in leaving]
    coming, room = deque(arriving), 0
    for one, wait in zip(leaving, done, strict=True):
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

    def away(self, one: _Waiting) -> Callable[[], None]:
        """Begin to copy a storage to its host memory. The result waits until it is there."""
        if one.host is not None:
            one.host.copy_(_bytes(one.storage))
        return lambda: None

    def back(self, one: _Waiting) -> None:
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

    def away(self, one: _Waiting) -> Callable[[], None]:
        with torch.cuda.stream(self._out):
            if one.host is not None:
                one.host.copy_(_bytes(one.storage), non_blocking=True)
            event = self._out.record_event()
        return event.synchronize

    def back(self, one: _Waiting) -> None:
        one.storage.resize_(one.size)  # on the main stream, whose earlier work may still use the memory that it finds
        if one.host is not None:
            self._in.wait_stream(self._main)
            with torch.cuda.stream(self._in):
                _bytes(one.storage).copy_(one.host, non_blocking=True)

    def finish(self) -> None:
        self._main.wait_stream(self._in)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
