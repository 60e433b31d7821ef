"""What is around a network when it is called."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_tempo.models.chunks import WrappedChunks
from megatron_tempo.models.gpt import PackedGPT


def nothing_saved() -> AbstractContextManager[None]:
    """Inside, autograd builds its graph without the tensors that a backward pass would need."""
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, _unsaved)


def _unsaved(_: None) -> Tensor:
    raise RuntimeError("no backward pass was planned: its tensors were not saved")


def as_one(modules: list[Any]) -> Any:
    """A rank's chunks of a model, each with its wrappers, as one is called."""
    return modules[0] if len(modules) == 1 else WrappedChunks(modules)


def on_device(net: PackedGPT, device: torch.device) -> Any:
    """The network on its device, with Megatron's wrapper for bf16."""
    module = net.cuda(device) if device.type == "cuda" else net
    return Float16Module(net.config, module) if net.config.bf16 else module
