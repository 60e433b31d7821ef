"""Offloads models to host memory: keeps all of a run's models on the device, or one at a time.

To offload a model, the storages of its weights and optimizer state are copied to host memory and emptied in place, so
every view of them stays valid. Its gradients are dropped, because each step starts from zero. On a GPU the host memory
is page-locked, and copies run in both directions: the next model's storages are loaded into the memory that the
previous model's storages have freed.

If servers have the same GPUs by turns (`rollout.placement=colocated`), all models are offloaded while the trainer has
lent the GPUs. Then only the weights of a model can be loaded, to send them. They are dropped afterwards: the host
still has them.
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

    def sent_tensors(self) -> Iterable[Tensor]:
        """Those of them that are sent to the engine."""
        ...

    def transient_tensors(self) -> Iterable[Tensor]:
        """Tensors whose contents are dropped when the model is offloaded."""
        ...

    def drop_leftovers(self) -> None:
        """Drop what the last pass needed and left behind, before the model is offloaded."""
        ...

    def drop_caches(self) -> None:
        """Drop copies that a pass makes anew, before the model is offloaded for servers."""
        ...


@dataclass(frozen=True, slots=True)
class _OffloadedStorage:
    """A storage that was emptied, and its contents in host memory."""

    storage: torch.UntypedStorage
    size: int  # in bytes
    host: Tensor | None  # uint8 [size]. None if the contents were dropped
    is_weight: bool = False


class ModelOffloader:
    """The models on the device. With `one_at_a_time`, loading one offloads the others.

    On a CPU, `load` and `offload_all` finish before they return. On a GPU, work that is queued afterwards finds the
    model loaded.
    """

    def __init__(self, *, one_at_a_time: bool, lends: bool = False) -> None:
        """`lends`: whether servers have the same GPUs by turns, which implies one model at a time."""
        self.one_at_a_time = one_at_a_time or lends
        self._lends = lends
        self._lent = False
        self._loaded: Offloadable | None = None
        self._sent: list[_OffloadedStorage] = []  # of the loaded model, if only its weights are on the device
        self._offloaded: dict[int, list[_OffloadedStorage]] = {}  # by the model's id
        self._hosts: dict[int, Tensor] = {}  # host memory by the model's id, kept for the next offload

    def load(self, model: Offloadable) -> None:
        """Load `model` to the device. At its first load it must be on the device already."""
        assert not self._lent, "the engine has the GPUs: it must sleep first"
        if not self.one_at_a_time or (self._loaded is model and not self._sent):
            return
        outgoing, there = ([], self._sent) if self._loaded is model else (self._offload(), [])
        self._sent = []
        incoming = self._offloaded.pop(id(model), [])
        _exchange(model.device, outgoing, [one for one in incoming if one not in there])
        self._loaded = model

    def load_weights(self, model: Offloadable) -> None:
        """Load what a weight sync reads of `model`: all of it, unless the GPUs are lent by turns.

        Nobody may write to these weights before `load`.
        """
        if not self._lends:
            self.load(model)
        elif self._loaded is not model:
            outgoing = self._offload()
            self._sent = [one for one in self._offloaded[id(model)] if one.is_weight]
            _exchange(model.device, outgoing, self._sent)
            self._loaded = model

    def offload_all(self) -> None:
        """Offload all models, so that another one can be built on the device."""
        if self._loaded is not None:
            device = self._loaded.device
            _exchange(device, self._offload(), [])
            self._loaded, self._sent = None, []

    def lend(self) -> None:
        """See `rollout.engine.TrainerGpus`: nothing of a model stays on the device, nor in torch's allocator."""
        assert self._lends, "rollout.placement=colocated"
        self.offload_all()
        self._lent = True
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.ipc_collect()  # buckets that servers have released
            torch.cuda.empty_cache()

    def take_back(self) -> None:
        self._lent = False

    def _offload(self) -> list[_OffloadedStorage]:
        """The storages of the loaded model to empty, each with a part of its host memory if it is to be copied."""
        model = self._loaded
        if model is None:
            return []
        if self._sent:  # nobody has changed them
            return [_OffloadedStorage(one.storage, one.size, None) for one in self._sent]
        model.drop_leftovers()
        if self._lends:  # servers need the room
            model.drop_caches()
        persistent, transient = _storages(model.persistent_tensors()), _storages(model.transient_tensors())
        weights = _storages(model.sent_tensors())
        total = sum(storage.nbytes() for storage in persistent.values())
        host = self._hosts.get(id(model))
        if host is None or len(host) < total:
            field, other = ("rollout.placement", "disaggregated") if self._lends else ("parallel.offload", "false")
            what = f"{field}={'colocated' if self._lends else 'true'}"
            host = self._hosts[id(model)] = host_memory(total, model.device, what, f"set {field}={other}")
        offloaded, at = [], 0
        for address, storage in sorted(persistent.items(), key=lambda item: -item[1].nbytes()):
            part = host[at : at + storage.nbytes()]
            offloaded.append(_OffloadedStorage(storage, storage.nbytes(), part, address in weights))
            at += storage.nbytes()
        offloaded += [
            _OffloadedStorage(one, one.nbytes(), None)
            for address, one in transient.items()
            if address not in persistent
        ]
        self._offloaded[id(model)] = offloaded
        return offloaded


def _storages(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages of these tensors, by address."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return {address: storage for address, storage in storages.items() if address}


def host_memory(size: int, device: torch.device, what: str, fix: str) -> Tensor:
    """uint8 [size], page-locked if the device is a GPU. `what` it is for, and another `fix`, are for the error.

    It is registered with CUDA by hand, because torch rounds page-locked memory up to a power of two.
    """
    host = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and size:
        cudart, address = torch.cuda.cudart(), host.data_ptr()
        error = int(cudart.cudaHostRegister(address, size, 0))
        if error:
            raise InputError(
                f"{what} needs {size / 1e9:.1f} GB of page-locked host memory per process, which CUDA refuses (error "
                f"{error}): raise the job's memory and `ulimit -l`, or {fix}"
            )
        weakref.finalize(host, cudart.cudaHostUnregister, address)
    return host


def _exchange(device: torch.device, outgoing: list[_OffloadedStorage], incoming: list[_OffloadedStorage]) -> None:
    copies = _Copies.on(device)
    done = [copies.copy_out(one) for one in outgoing]
    waiting, freed = deque(incoming), 0
    for one, wait in zip(outgoing, done, strict=True):
        wait()
        one.storage.resize_(0)
        freed += one.size
        while waiting and waiting[0].size <= freed:
            freed -= waiting[0].size
            copies.copy_in(waiting.popleft())
    for one in waiting:
        copies.copy_in(one)
    copies.finish()


class _Copies:
    """Copies between device and host. Here each copy finishes before the call returns."""

    @staticmethod
    def on(device: torch.device) -> _Copies:
        return _CudaCopies(device) if device.type == "cuda" else _Copies()

    def copy_out(self, one: _OffloadedStorage) -> Callable[[], None]:
        """Start to copy a storage to its host memory. Returns a function that waits until the copy is complete."""
        if one.host is not None:
            one.host.copy_(_bytes(one.storage))
        return lambda: None

    def copy_in(self, one: _OffloadedStorage) -> None:
        """Restore a storage from its host memory."""
        one.storage.resize_(one.size)
        if one.host is not None:
            _bytes(one.storage).copy_(one.host)

    def finish(self) -> None:
        """Let work that is queued on the device from now on wait for all copies."""


class _CudaCopies(_Copies):
    """Copies in both directions at the same time, each on its own CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._main = torch.cuda.current_stream(device)
        self._out, self._in = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._out.wait_stream(self._main)

    def copy_out(self, one: _OffloadedStorage) -> Callable[[], None]:
        with torch.cuda.stream(self._out):
            if one.host is not None:
                one.host.copy_(_bytes(one.storage), non_blocking=True)
            event = self._out.record_event()
        return event.synchronize

    def copy_in(self, one: _OffloadedStorage) -> None:
        one.storage.resize_(one.size)  # on the main stream, because its earlier work may still use the memory
        if one.host is not None:
            self._in.wait_stream(self._main)
            with torch.cuda.stream(self._in):
                _bytes(one.storage).copy_(one.host, non_blocking=True)

    def finish(self) -> None:
        self._main.wait_stream(self._in)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
