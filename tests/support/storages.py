"""The bytes of the tensors that are there, as torch's operations make them and let go of them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What a peak may be too high by, where a test does not say it.
SETTLED = 0.01


class Storages(TorchDispatchMode):
    """Counts the storages that operations in it give back, until they are gone: what autograd keeps among them.

    What is in an operation alone, such as a temporary inside a fused kernel, is not seen.
    """

    def __init__(self, before: Iterable[Tensor] = (), settled: float = SETTLED) -> None:
        """`before`: tensors that do not count; `settled`: for a growth below this share nobody waits."""
        super().__init__()
        self._before = {StorageWeakRef(tensor.untyped_storage()) for tensor in before}
        self._settled = settled
        self._there: set[StorageWeakRef] = set()
        self._most = 0  # bytes that can be there: those of the last count, and what was made since
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        if self._most > self.peak:  # a count looks at every storage, so it is made only where it can matter
            if self.now() > (1 + self._settled) * self.peak:
                time.sleep(0.05)  # gloo's thread lets go of a message's tensor a moment after it is waited for
            self.peak = max(self.peak, self.now())
        return found

    def _add(self, storage: UntypedStorage) -> None:
        ref = StorageWeakRef(storage)
        if ref not in self._there:
            self._there.add(ref)
            self._most += storage.nbytes()

    def now(self) -> int:
        """Bytes that are there."""
        self._there -= self._before
        sizes = {ref: _bytes(ref) for ref in self._there}
        self._there = {ref for ref, size in sizes.items() if size is not None}
        self._most = sum(size for size in sizes.values() if size is not None)
        return self._most

    def restart(self) -> int:
        """Begin to look for a peak anew; bytes that are there."""
        self.peak = self.now()
        return self.peak


def _bytes(ref: StorageWeakRef) -> int | None:
    """What a storage holds now, which may be less than when it was made; none: it is gone."""
    storage = UntypedStorage._new_with_weak_ptr(ref.cdata)  # type: ignore[attr-defined]
    return None if storage is None else storage.nbytes()


def bytes_of(tensors: list[Tensor]) -> int:
    """Of the storages of these tensors, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
