"""GPU memory that a server on the same machine opens: CUDA's handles between processes.

torch counts the readers: memory that is freed here is not reused before each handle's reader has freed it too. A GPU is
named by its UUID, since a server may number the GPUs in another order.
"""

from __future__ import annotations

import base64
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.multiprocessing  # registers how tensors are pickled
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from megatron_tempo.models.megatron_compat.torch_private import share_cuda_storage

# Position of the GPU among the arguments of torch's `rebuild_cuda_tensor`.
_DEVICE = 6


def handle(storage: torch.UntypedStorage) -> list[Any]:
    """For one reader: the GPU's UUID and the other arguments of `UntypedStorage._new_shared_cuda`, bytes as base64."""
    device, *rest = share_cuda_storage(storage)
    return [_uuid(device), *(base64.b64encode(x).decode() if isinstance(x, bytes) else x for x in rest)]


class Pickler(ForkingPickler):
    """torch's pickling of tensors by their handles, each for one reader; its `load` looks the GPU up by the UUID."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.dispatch_table = {**self.dispatch_table, Tensor: _reduced}


def _reduced(tensor: Tensor) -> Any:
    rebuild, arguments = reduce_tensor(tensor)
    if tensor.is_cuda:
        arguments = (*arguments[:_DEVICE], _uuid(arguments[_DEVICE]), *arguments[_DEVICE + 1 :])
    return rebuild, arguments


def _uuid(device: int) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
