"""Counts the bytes of all live tensors while torch's operations run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Default for the share by which a peak may be too high.
SETTLED = 0.01


class Storages(TorchDispatchMode):
    """Counts the storages that operations return, until they are freed. Includes what autograd keeps.

    Memory inside an operation, such as a temporary of a fused kernel, is not counted.
    """

    def __init__(self, before: Iterable[Tensor] = (), settled: float = SETTLED) -> None:
        """`before`: tensors that are not counted. `settled`: a growth below this share is accepted without a wait."""
        super().__init__()
        self._before = {StorageWeakRef(tensor.untyped_storage()) for tensor in before}
        self._settled = settled
        self._live: set[StorageWeakRef] = set()
        self._most = 0  # upper bound of the live bytes: the last count plus what was made since
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        if self._most > self.peak:  # counting is slow: only if the peak may have risen
            if self.now() > (1 + self._settled) * self.peak:
                time.sleep(0.05)  # gloo's thread frees a message's tensor a moment after the wait for it returns
            self.peak = max(self.peak, self.now())
        return result

    def _add(self, storage: UntypedStorage) -> None:
        ref = StorageWeakRef(storage)
        if ref not in self._live:
            self._live.add(ref)
            self._most += storage.nbytes()

    def now(self) -> int:
        """Live bytes."""
        self._live -= self._before
        sizes = {ref: _bytes(ref) for ref in self._live}
        self._live = {ref for ref, size in sizes.items() if size is not None}
        self._most = sum(size for size in sizes.values() if size is not None)
        return self._most

    def restart(self) -> int:
        """Restart the search for the peak. Returns the live bytes."""
        self.peak = self.now()
        return self.peak


def _bytes(ref: StorageWeakRef) -> int | None:
    """The current size of a storage, which may have been reduced. None if it was freed."""
    storage = UntypedStorage._new_with_weak_ptr(ref.cdata)  # type: ignore[attr-defined]
    return None if storage is None else storage.nbytes()


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
