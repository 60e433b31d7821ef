"""Counts the bytes of all live tensors while torch's operations run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch._C._distributed_c10d import FakeWork, Work
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

# Operations between two ranks. A Python object holds their tensor, and frees it with the last reference.
_POINT_TO_POINT = ("c10d::send", "c10d::recv_", "c10d::recv_any_source_")


class Storages(TorchDispatchMode):
    """Counts the storages that operations return, until they are freed. Includes what autograd keeps.

    Memory inside an operation, such as a temporary of a fused kernel, is not counted.
    """

    def __init__(self, before: Iterable[Tensor] = ()) -> None:
        """`before`: tensors that are not counted."""
        super().__init__()
        self._before = {StorageWeakRef(tensor.untyped_storage()) for tensor in before}
        self._live: set[StorageWeakRef] = set()
        self._most = 0  # upper bound of the live bytes: the last count plus what was made since
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        collective = func.namespace == "c10d" and func._schema.name not in _POINT_TO_POINT
        result = (_on_copies if collective else _as_is)(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        if self._most > self.peak:  # counting is slow: only if the peak may have risen
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


def _as_is(func: Any, args: Any, kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _on_copies(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a collective on copies of its tensors, to the end, and copy the results back.

    A worker thread of gloo holds the tensors of a collective until the system lets it run again, which may be long
    after the wait for the collective has returned. What it holds would be counted, or not, by chance. So it gets
    copies, which are made outside the mode and are not counted. The caller gets work that is finished: the wait for
    gloo's own runs operations on its temporaries. All ranks call collectives in the same order, so a wait here is safe.
    """
    originals: dict[int, Tensor] = {}

    def copied(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = copies.setdefault(id(leaf), leaf.clone())
        originals[id(copy)] = leaf
        return copy

    copies: dict[int, Tensor] = {}
    given_args, given_kwargs = tree_map(copied, (args, kwargs))
    result = func(*given_args, **given_kwargs)
    for leaf in tree_leaves(result):
        if isinstance(leaf, torch.ScriptObject):
            Work.unbox(leaf).wait()
    for copy in copies.values():
        originals[id(copy)].copy_(copy)

    def handed_back(leaf: Any) -> Any:
        return FakeWork().boxed() if isinstance(leaf, torch.ScriptObject) else originals.get(id(leaf), leaf)

    return tree_map(handed_back, result)


def _bytes(ref: StorageWeakRef) -> int | None:
    """The current size of a storage, which may have been reduced. None if it was freed."""
    storage = UntypedStorage._new_with_weak_ptr(ref.cdata)  # type: ignore[attr-defined]
    return None if storage is None else storage.nbytes()


def bytes_of(tensors: list[Tensor]) -> int:
    """Bytes of the storages of these tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
