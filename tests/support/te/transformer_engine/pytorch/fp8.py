"""Whether FP8 is on, and by which recipe. Nothing is computed in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from transformer_engine.common.recipe import Recipe


class FP8GlobalStateManager:
    """The names that Megatron-Core and the stand-in's layers ask."""

    enabled = False
    recipe: Recipe | None = None
    group: dist.ProcessGroup | None = None
    updates = 0  # how often delayed scaling would have taken new scales

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        return cls.recipe


@contextmanager
def fp8_autocast(
    enabled: bool = True,
    calibrating: bool = False,
    fp8_recipe: Recipe | None = None,
    fp8_group: dist.ProcessGroup | None = None,
    _graph: bool = False,
) -> Iterator[None]:
    state = FP8GlobalStateManager
    before: tuple[Any, ...] = state.enabled, state.recipe, state.group
    state.enabled, state.recipe, state.group = enabled, fp8_recipe, fp8_group
    try:
        yield
    finally:
        state.enabled, state.recipe, state.group = before
        if enabled and not state.enabled and torch.is_grad_enabled():
            state.updates += 1


def fp8_model_init(*_: Any, **__: Any) -> None:
    raise NotImplementedError("weights stay in bf16")
