"""Linear layers, over tensor ranks and with sequence parallelism, by torch's own products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from transformer_engine.pytorch.collectives import Accumulating, Gathered, Reduced, ReducedInBackward, Scattered
from transformer_engine.pytorch.fp8 import FP8GlobalStateManager
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule
from transformer_engine.pytorch.record import Call, calls

# What `is_quantizable` of a recipe's quantizer asks of a tensor that is gathered over tensor ranks.
_BLOCKS = {"Float8BlockScaling": 128, "MXFP8BlockScaling": 32}


class Linear(TransformerEngineBaseModule):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: torch.device | str = "cuda",
        name: str | None = None,
    ) -> None:
        super().__init__()
        assert not any((return_bias, rng_tracker_name)), "our models have none of these"
        assert not bias or parallel_mode == "column", "our models have biases on queries, keys and values only"
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        assert parallel_mode in ("column", "row")
        assert tp_group is not None
        assert tp_size == tp_group.size()
        assert init_method is not None
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.use_bias, self.save_original_input = bias, False
        self.sequence_parallel = sequence_parallel and tp_size > 1
        outs, ins = (tp_size, 1) if parallel_mode == "column" else (1, tp_size)
        assert out_features % outs == in_features % ins == 0
        self.out_features, self.in_features = out_features // outs, in_features // ins
        # NaN where TE has whatever is in memory: whoever forgets to load a weight will see it.
        weight = torch.full((self.out_features, self.in_features), math.nan, dtype=params_dtype, device=device)
        self.weight = nn.Parameter(weight)
        init_method(self.weight)
        # As TE sets them: without them Megatron-Core leaves the weight out of the gradient's norm.
        self.weight.tensor_model_parallel = True  # type: ignore[attr-defined]
        self.weight.partition_dim = 1 if parallel_mode == "row" else 0  # type: ignore[attr-defined]
        self.weight.partition_stride = 1  # type: ignore[attr-defined]
        if bias:
            self.bias = nn.Parameter(torch.full((self.out_features,), math.nan, dtype=params_dtype, device=device))
            self.bias.tensor_model_parallel = True  # type: ignore[attr-defined]
            self.bias.partition_dim, self.bias.partition_stride = 0, 1  # type: ignore[attr-defined]

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        assert inp.dtype == self.weight.dtype
        self._noted(inp, is_first_microbatch)
        if self.parallel_mode == "column":
            kind = Gathered if self.sequence_parallel else ReducedInBackward
            return self._product(kind.apply(inp, self.tp_group))
        kind = Scattered if self.sequence_parallel else Reduced
        return kind.apply(self._product(inp), self.tp_group)

    def _product(self, inp: Tensor) -> Tensor:
        bias = self.bias if self.use_bias else None
        if not self.fuse_wgrad_accumulation:
            return functional.linear(inp, self.weight, bias)
        product = Accumulating.apply(inp, self.weight)
        return product if bias is None else product + bias

    def _noted(self, inp: Tensor, first: bool | None) -> None:
        """Record the call, and refuse the shapes that TE refuses in FP8."""
        state = FP8GlobalStateManager
        self.fp8_recipe = type(state.recipe).__name__ if state.enabled else None
        tokens = math.prod(inp.shape[:-1])
        if state.enabled:
            state.add_fp8_tensors_to_global_buffer(self.fp8_meta)
            for outer, inner in ((tokens, inp.shape[-1]), self.weight.shape):
                assert outer % 8 == 0, f"FP8 execution requires dimensions divisible by 8 and 16, got {outer}, {inner}"
                assert inner % 16 == 0, f"FP8 execution requires dimensions divisible by 8 and 16, got {outer}, {inner}"
            if self.parallel_mode == "column" and self.sequence_parallel and self.fp8_recipe in _BLOCKS:
                block = _BLOCKS[self.fp8_recipe]
                assert tokens % block == inp.shape[-1] % block == 0, "All-gather requires quantizable tensor"
        group = 1 if state.group is None else state.group.size()
        sizes = tokens, self.in_features, self.out_features
        largest = float(inp.detach().abs().max()) if inp.numel() else 0.0
        calls.append(Call(self.parallel_mode, self.fp8_recipe, group, *sizes, first, torch.is_grad_enabled(), largest))


class LayerNormLinear(Linear):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        zero_centered_gamma: bool = False,
        device: torch.device | str = "cuda",
        name: str | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            sequence_parallel=sequence_parallel,
            fuse_wgrad_accumulation=fuse_wgrad_accumulation,
            tp_group=tp_group,
            tp_size=tp_size,
            get_rng_state_tracker=get_rng_state_tracker,
            init_method=init_method,
            bias=bias,
            return_bias=return_bias,
            params_dtype=params_dtype,
            parallel_mode=parallel_mode,
            device=device,
            name=name,
        )
        assert normalization == "RMSNorm", "that of our models"
        assert not return_layernorm_output
        assert not zero_centered_gamma
        del self.save_original_input  # TE's has no such field
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=params_dtype, device=device))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
        self.layer_norm_bias = None

    def forward(
        self,
        inp: Tensor,
        is_first_microbatch: bool | None = None,
        fp8_output: bool | None = False,
        fp8_grad: bool | None = False,
    ) -> Tensor:
        wide = inp.float()
        normed = wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.layer_norm_weight.float()
        return super().forward(normed.to(inp.dtype), is_first_microbatch, fp8_output, fp8_grad)
