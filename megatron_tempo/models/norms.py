"""Norms that Megatron-Core's spec lacks: under sequence parallelism, over whole projections, and after a block."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Root-mean-square norm in fp32 (Zhang & Sennrich 2019), scaled by a weight.

    Under sequence parallelism each tensor rank has a part of the tokens. The weight is marked, so that Megatron sums
    its gradient over the tensor ranks. Megatron's own torch norm does not support this case.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension, in the type of `x`."""
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class ProjectionNorm(nn.Module):
    """Root-mean-square norm in fp32 over all heads of a projection. Each tensor rank has a share of the heads.

    A rank holds the weights of its own heads. It processes all tokens, also under sequence parallelism, so their
    gradient is complete on the rank.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, heads: int, group: dist.ProcessGroup
    ) -> None:
        """`hidden_size`: of one head. `heads`: the number of heads on all tensor ranks, which are `group`."""
        super().__init__()
        self.eps = eps
        self.group = group
        self.weight = nn.Parameter(torch.ones(heads * hidden_size // self.group.size(), dtype=config.params_dtype))
        # Without the mark, Megatron treats the shards as copies and counts only one of them in the gradient norm.
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """[S, 1, heads of this rank, d] -> the same, in the type of `x`."""
        return _NormOverRanks.apply(x.flatten(2), self.weight, self.eps, self.group).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> ShardedStateDict:
        """For Megatron's checkpoints: the weight is sharded over the tensor ranks."""
        assert metadata is not None
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class _NormOverRanks(torch.autograd.Function):
    """y = n w with n = x r and r = (mean(x^2) + eps)^(-1/2), in fp32. A row of x is sharded over all ranks.

    With g = w dL/dy:  dL/dx = r (g - n mean(g n)),  and  dL/dw = sum of n dL/dy over the tokens. Both means are over
    all ranks, because every rank's y depends on every rank's x. The backward pass needs x in its own type, and r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup) -> Tensor:
        scale = (_mean_over_ranks(x.float().square(), group) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        ctx.group = group
        return (x.float() * scale * weight.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = x.float() * scale, grad.float()
        scaled = wide * weight.float()
        back = scale * (scaled - normed * _mean_over_ranks(scaled * normed, ctx.group))
        return back.to(x.dtype), (normed * wide).sum(dim=(0, 1)).to(weight.dtype), None, None


def _mean_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean over the last dimension, which is sharded equally over the ranks: [..., 1]."""
    total = x.sum(-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total / (x.shape[-1] * group.size())


class PostNorm(nn.Module):
    """Mixin for a row-parallel layer's class: norms the layer's output before it is added to the residual stream."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **others: Any) -> None:
        super().__init__(input_size, output_size, config=config, **others)
        self.norm = RMSNorm(config, output_size, config.layernorm_epsilon)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """[S, 1, input / tensor] -> [S (/ tensor), 1, output], and no bias."""
        output, bias = super().forward(input_)
        return self.norm(output), bias


class NormedRowParallelLinear(PostNorm, RowParallelLinear):
    """Megatron's row-parallel layer, followed by a norm."""
