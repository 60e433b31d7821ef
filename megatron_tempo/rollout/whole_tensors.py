"""Joins the parts of tensors where a function of whole parameters is needed, such as SGLang's checksums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from megatron_tempo.types import Bucket, PartName


class WholeParameters:
    """Whole tensors from buckets with parts. Those of which an engine makes one parameter come together.

    A stream's buckets are added in order. What is not whole waits in host memory.
    """

    def __init__(self, fused: Iterable[Sequence[str]]) -> None:
        """`fused`: the layers whose tensors are one parameter in the engine, as they are in the tensors' names."""
        self._fused = tuple(fused)
        self._begun: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}

    def add(self, bucket: Bucket) -> Bucket:
        """The bucket's tensors, and those that are whole with it."""
        if not any(isinstance(name, PartName) for name, _ in bucket):
            return bucket
        whole: Bucket = []
        for name, tensor in bucket:
            joined = self._joined(name, tensor) if isinstance(name, PartName) else (name, tensor)
            if joined is not None:
                whole += self._together(*joined)
        return whole

    def _joined(self, name: PartName, tensor: Tensor) -> tuple[str, Tensor] | None:
        if name.start == 0:
            self._begun[name.whole] = torch.empty(name.rows, *tensor.shape[1:], dtype=tensor.dtype)
        self._begun[name.whole][name.start : name.stop].copy_(tensor)
        return (name.whole, self._begun.pop(name.whole)) if name.stop == name.rows else None

    def _together(self, name: str, tensor: Tensor) -> Bucket:
        for layers in self._fused:
            for layer in layers:
                if f".{layer}." in name:
                    self._waiting[name] = tensor
                    names = [name.replace(f".{layer}.", f".{one}.") for one in layers]
                    if all(one in self._waiting for one in names):
                        return [(one, self._waiting.pop(one)) for one in names]
                    return []
        return [(name, tensor)]
