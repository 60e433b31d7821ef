"""Of operations that can be fused, SwiGLU, and the names that Megatron-Core requires when it is imported."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from transformer_engine.pytorch.record import fused


class Sequential:
    pass


class FusibleOperation:
    pass


class SwiGLU(nn.Module):
    def __init__(self, *, cache_quantized_input: bool = False) -> None:
        super().__init__()
        assert not cache_quantized_input

    def forward(self, input: Tensor) -> Tensor:
        fused.add("swiglu")
        gate, linear = input.chunk(2, dim=-1)
        return functional.silu(gate) * linear
