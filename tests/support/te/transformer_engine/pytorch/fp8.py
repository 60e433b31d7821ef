"""Whether FP8 is on, and by which recipe. Nothing is computed in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from transformer_engine.common.recipe import DelayedScaling, Recipe
from transformer_engine.pytorch.record import reductions


class FP8GlobalStateManager:
    """The names that Megatron-Core and the stand-in's layers ask."""

    enabled = False
    recipe: Recipe | None = None
    group: dist.ProcessGroup | None = None
    updates = 0  # how often delayed scaling would have taken new scales
    # Delayed scaling keeps the largest magnitudes by recipe and group, for all models of a process.
    autocast_arguments: ClassVar[dict[str, tuple[Recipe | None, dist.ProcessGroup | None]]] = {}
    global_amax_buffer: ClassVar[dict[str, list[object]]] = {}

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.enabled

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        return cls.recipe

    @classmethod
    def add_fp8_tensors_to_global_buffer(cls, fp8_meta: dict[str, Any]) -> None:
        """Called by a layer in FP8. Its magnitudes are kept from its first pass on."""
        if isinstance(cls.recipe, DelayedScaling):
            kept = cls.global_amax_buffer.setdefault(f"{cls.recipe}:{hash(cls.group)}", [])
            if not any(one is fp8_meta for one in kept):
                kept.append(fp8_meta)

    @classmethod
    def reduce_and_update_fp8_tensors(cls, forward: bool = True) -> None:
        """As TE does, for every key: the collective is counted by its ranks, and not made, because it may hang."""
        cls.updates += 1
        for key in cls.global_amax_buffer:
            recipe, group = cls.autocast_arguments[key]
            assert isinstance(recipe, DelayedScaling)
            if recipe.reduce_amax and group is not None and group.size() > 1:
                reductions[tuple(dist.get_process_group_ranks(group))] += 1


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
    state.autocast_arguments[f"{fp8_recipe}:{hash(fp8_group)}"] = fp8_recipe, fp8_group
    try:
        yield
    finally:
        state.enabled, state.recipe, state.group = before
        if enabled and not state.enabled and torch.is_grad_enabled():
            state.reduce_and_update_fp8_tensors()


def fp8_model_init(*_: Any, **__: Any) -> None:
    raise NotImplementedError("weights stay in bf16")
