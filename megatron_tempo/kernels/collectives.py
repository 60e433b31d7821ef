"""Sums, maxima and gathers over process groups, with the gradients that the losses need."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the group's ranks; without a group, `tensor` itself.

    The gradient passes through unchanged: every rank has the same loss, and each needs the gradient of its own entries.
    """
    return tensor if group is None else _Sum.apply(tensor, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def max_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The element-wise maximum over the group's ranks. Without gradient."""
    if group is None:
        return tensor
    maximum = tensor.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    return maximum


def gather_over(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The group's tensors along a new first dimension: [...] -> [ranks, ...]. Without gradient."""
    if group is None or dist.get_world_size(group) == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)
