"""Communication over tensor ranks, recomputation, and the names of random states, which our models do not use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import checkpoint as torch_checkpoint

from transformer_engine.pytorch.fp8 import FP8GlobalStateManager, fp8_autocast


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone().contiguous()
    dist.all_reduce(x, group=group)
    return x


def _part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size())[group.rank()].contiguous()


def _joined(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _pair(name: str, forward: Callable[..., Tensor], backward: Callable[..., Tensor]) -> Any:
    """An operation over a group, and the operation on its gradient."""

    def onward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return forward(x, group)

    def back(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return backward(grad, ctx.group), None

    members = {"forward": staticmethod(onward), "backward": staticmethod(back)}
    return type(name, (torch.autograd.Function,), members)


Gathered = _pair("Gathered", _joined, lambda grad, group: _part(_sum(grad, group), group))
Scattered = _pair("Scattered", lambda x, group: _part(_sum(x, group), group), _joined)
Reduced = _pair("Reduced", _sum, lambda grad, group: grad)
ReducedInBackward = _pair("ReducedInBackward", lambda x, group: x.view_as(x), _sum)


def checkpoint(
    function: Callable[..., Any],
    *args: Any,
    distribute_saved_activations: bool = False,
    get_rng_state_tracker: Callable[[], Any] | None = None,
    tp_group: dist.ProcessGroup | None = None,
) -> Any:
    """The second pass is in FP8 as the first one was."""
    assert not distribute_saved_activations
    state = FP8GlobalStateManager
    given = {"enabled": state.enabled, "fp8_recipe": state.recipe, "fp8_group": state.group}

    def same(*inputs: Any) -> Any:
        with fp8_autocast(**given):
            return function(*inputs)

    return torch_checkpoint.checkpoint(same, *args, use_reentrant=True)


@contextmanager
def activation_recompute_forward(*_: Any, **__: Any) -> Iterator[None]:
    yield


class CudaRNGStatesTracker:
    pass
