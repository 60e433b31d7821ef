"""Communication over tensor ranks, and a product that accumulates, with their gradients.

TE's own is in its kernels and in `torch.autograd` classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from transformer_engine.pytorch.record import fused


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


class Accumulating(torch.autograd.Function):
    """A product whose backward pass adds the weight's gradient to `main_grad`, in its type."""

    @staticmethod
    def forward(ctx: Any, inp: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inp)
        ctx.weight = weight
        return functional.linear(inp, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        (inp,), weight = ctx.saved_tensors, ctx.weight
        onward = grad @ weight
        if not weight.requires_grad:
            return onward, None
        wide = weight.main_grad.dtype
        weight.main_grad += grad.flatten(0, -2).T.to(wide) @ inp.flatten(0, -2).to(wide)
        assert hasattr(weight, "grad_added_to_main_grad")
        weight.grad_added_to_main_grad = True
        fused.add("weight gradient")
        return onward, torch.full_like(weight, math.nan)  # TE's is whatever is in memory
