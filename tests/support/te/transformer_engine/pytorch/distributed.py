"""Recomputation, and the names of random states, which our models do not use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The second pass is in FP8 as the first one was."""
    assert set(kwargs) == {"distribute_saved_activations", "get_rng_state_tracker", "tp_group"}, "Megatron-Core's"
    assert not kwargs["distribute_saved_activations"]
    state = FP8GlobalStateManager
    given = {"enabled": state.enabled, "fp8_recipe": state.recipe, "fp8_group": state.group}

    def same(*inputs: Any) -> Any:
        with fp8_autocast(**given):
            return function(*inputs)

    return torch_checkpoint.checkpoint(same, *args, use_reentrant=True)


@contextmanager
def activation_recompute_forward(activation_recompute: bool = False, recompute_phase: bool = False) -> Iterator[None]:
    yield


class CudaRNGStatesTracker:
    pass
