"""What all layers have, and a name of gradients that a kernel adds up, which we do not ask for."""

from __future__ import annotations

import pickle
from typing import Any

import torch
from torch import Tensor, nn


class TransformerEngineBaseModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fp8_recipe: str | None = None  # of the last pass
        self.fp8_meta: dict[str, Any] = {}

    def get_extra_state(self) -> Tensor:
        if self.fp8_recipe is None:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(bytearray(pickle.dumps({"recipe": self.fp8_recipe})), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is None or state.numel() == 0:
            return
        self.fp8_recipe = pickle.loads(state.numpy().tobytes())["recipe"]


def get_dummy_wgrad(*_: Any, **__: Any) -> None:
    raise NotImplementedError("gradient_accumulation_fusion is off")
