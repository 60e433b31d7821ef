"""Communication over tensor ranks, with its gradients. TE's own is in its kernels and in `torch.autograd` classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


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
