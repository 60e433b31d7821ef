"""The decoder layer of models/decoder.py, built from Transformer Engine's linear layers and attention.

Import this only if Transformer Engine is installed. Without it, Megatron's classes here are unusable placeholders.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import (
    TEActivationOp,
    TEColumnParallelGroupedLinear,
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelGroupedLinear,
    TERowParallelLinear,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_tempo.config.model_shape import LayerAttention, ModelShape
from megatron_tempo.models.attention import PackedAttention
from megatron_tempo.models.decoder import Norms, Parts, layer_of
from megatron_tempo.models.megatron_compat.transformer_engine import refuse_unfused_attention
from megatron_tempo.models.megatron_compat.versions import Operation
from megatron_tempo.models.norms import PostNorm, RMSNorm
from megatron_tempo.models.packing import Packing


def te_layer(shape: ModelShape, attention: LayerAttention, norms: Norms) -> ModuleSpec:
    """The spec of a layer with this attention. A norm before a linear layer is fused with it, but one before a router
    is not."""
    column, row = (TENormedColumn, TERow) if norms.pre_norm else (TEColumn, TENormedRow)
    mlp_norm = IdentityOp if shape.experts is None else RMSNorm
    of_experts = TEGroupedMLP, TEGroupedColumn, TEGroupedRow
    parts = Parts(IdentityOp, column, row, _core_attention, TESwiGLU, mlp_norm, *of_experts)
    return layer_of(parts, shape, attention, norms)


def _core_attention(config: TransformerConfig, **given: Any) -> nn.Module:
    """With context parallelism, our own attention, because Transformer Engine divides the tokens differently."""
    kind = PackedAttention if config.context_parallel_size > 1 else PackedTEAttention
    return kind(config, **given)


class PackedTEAttention(TEDotProductAttention):
    """Causal attention on packed sequences (thd), with the arguments of `PackedAttention`.

    Megatron gets the format "sbhd", so that it rotates by each token's position. Only this class converts to thd.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        window: int | None = None,
        softmax_scale_multiplier: float = 1.0,
        cp_comm_type: str | None = None,
    ) -> None:
        assert config.kv_channels is not None
        scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        own = copy(config)  # Megatron's config has one window for the whole model
        own.window_size = None if window is None else (window - 1, 0)
        super().__init__(
            own,
            layer_number,
            attn_mask_type,
            attention_type,
            softmax_scale=scale * softmax_scale_multiplier,
            cp_comm_type=cp_comm_type,
            pg_collection=pg_collection,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        /,
        *,
        attn_mask_type: AttnMaskType,
        attention_bias: Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> Tensor:
        """Query [S, 1, heads, d], key and value [S, 1, groups, d] -> [S, 1, heads * d]; sequences as in the packing."""
        assert packed_seq_params is not None, "every micro-batch carries its packing"
        packing = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=packed_seq_params.cu_seqlens_q,
            cu_seqlens_kv=packed_seq_params.cu_seqlens_kv,
            max_seqlen_q=packed_seq_params.max_seqlen_q,
            max_seqlen_kv=packed_seq_params.max_seqlen_kv,
        )
        parts = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        # Transformer Engine chooses again whenever a pass differs from the last one, such as the first of a step.
        in_fp8 = bool(self.config.fp8)
        try:
            out = super().forward(*parts, attention_mask, attn_mask_type, packed_seq_params=packing)
        except torch.OutOfMemoryError:
            refuse_unfused_attention(in_fp8=in_fp8)  # the likely cause
            raise
        refuse_unfused_attention(in_fp8=in_fp8)
        return out.reshape(query.shape[0], 1, -1)


class TESwiGLU(Operation):
    """Transformer Engine's operation: both halves of the first product [..., 2 f] -> silu(first) * second [..., f]."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self._hidden = (TEActivationOp(config),)  # in a tuple: as a submodule it would have a state, which is none

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self._hidden[0](x)
        return out


class _WeightGradients:
    """Mixin for the class of a linear layer of Transformer Engine: it adds its weight's gradient to the parameter's
    `main_grad`, in the product itself, if the network fuses that. Megatron's config has one setting for all layers."""

    def __init__(self, *sizes: int, config: TransformerConfig, **others: Any) -> None:
        if getattr(config, "fuses_te_weight_gradients", False):
            config = copy(config)
            config.gradient_accumulation_fusion = True
        super().__init__(*sizes, config=config, **others)  # type: ignore[call-arg]


class TENormedColumn(_WeightGradients, TELayerNormColumnParallelLinear):
    """A norm and a column-parallel layer."""


class TEColumn(_WeightGradients, TEColumnParallelLinear):
    """A column-parallel layer."""


class TERow(_WeightGradients, TERowParallelLinear):
    """A row-parallel layer."""


class TENormedRow(PostNorm, TERow):
    """A row-parallel layer, followed by a norm."""


class TEGroupedColumn(_WeightGradients, TEColumnParallelGroupedLinear):
    """The column-parallel layers of a rank's experts, one product of groups."""


class TEGroupedRow(_WeightGradients, TERowParallelGroupedLinear):
    """The row-parallel layers of a rank's experts, one product of groups."""
