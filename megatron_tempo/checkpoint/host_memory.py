"""One copy of a model's share of a checkpoint in host memory, from which a thread writes while training continues.

The memory is kept for the next checkpoint: to allocate and page-lock it takes longer than the copy itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tempo.models.megatron_compat.torch_private import copy_all
from megatron_tempo.models.offload import host_memory

_ALIGNMENT = 8  # bytes; the largest type's size
_WHAT = "a checkpoint"
_FIX = "use more data-parallel ranks, which share it"


@dataclass(frozen=True, slots=True)
class HostCopy:
    """Copies of tensors in host memory, in their order. On CUDA they are complete after `wait`."""

    tensors: list[Tensor]
    done: torch.cuda.Event | None

    def wait(self) -> None:
        """Wait until the copies are complete. From any thread."""
        if self.done is not None:
            self.done.synchronize()


class HostMemory:
    """Host memory for one model, page-locked if the model is on a GPU."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._sources: Sequence[Tensor] | None = None
        self._copies: list[Tensor] = []  # of `_sources`

    def reserve(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Prepare `copy` of this sequence of tensors. Raises InputError if CUDA refuses to page-lock the memory."""
        if self._sources is tensors:
            return
        places = _places(tensors)
        if self._buffer is None or self._buffer.numel() < places[-1]:
            self._buffer, self._copies = None, []  # before the larger one is allocated
            buffer = host_memory(places[-1], device, _WHAT, _FIX)
            self._buffer = buffer if device.type == "cuda" else buffer.zero_()  # its pages exist before the first copy
        self._sources = tensors
        self._copies = [
            self._buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for start, tensor in zip(places, tensors, strict=False)
        ]

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor], device: torch.device) -> HostCopy:
        """Copy the tensors, each contiguous, into this memory. The previous copy must no longer be in use.

        On CUDA the copies run on a stream of their own. Whoever changes the tensors lets its stream wait for `done`.
        """
        self.reserve(tensors, device)
        copies = self._copies
        if device.type != "cuda":
            copy_all(copies, tensors, non_blocking=False)
            return HostCopy(copies, None)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            copy_all(copies, tensors, non_blocking=True)
            return HostCopy(copies, stream.record_event())


def _places(tensors: Sequence[Tensor]) -> list[int]:
    """Where each tensor begins, in bytes; then the size of all."""
    places = [0]
    for tensor in tensors:
        places.append(places[-1] + tensor.nbytes + -tensor.nbytes % _ALIGNMENT)
    return places
