"""SwiGLU (Shazeer, arXiv 2002.05202) from torch's operations, for layers without Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from megatron_tempo.models.megatron_compat.versions import Operation


class SwiGLU(Operation):
    """Both halves of the first product [..., 2 f] -> silu(first) * second [..., f].

    Megatron's own operations add an offset of 0 to the second half and keep three tensors of f numbers a token more.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _SwiGLU.apply(x)
        return out


class _SwiGLU(torch.autograd.Function):
    """The backward pass computes silu again, from the input. It allocates only its result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, linear = x.chunk(2, dim=-1)
        return functional.silu(gate).mul_(linear)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        back = torch.empty_like(x)
        of_gate, of_linear = back.chunk(2, dim=-1)
        torch.ops.aten.silu.out(gate, out=of_linear)
        of_linear.mul_(grad)
        torch.mul(grad, linear, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return back
