"""A decoder layer for Megatron-Core: attention, then a gated MLP, each added to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_tempo.models.attention import PackedAttention, RotatedAttention
from megatron_tempo.models.norms import NormedRowParallelLinear, RMSNorm
from megatron_tempo.models.shape import LayerAttention, Shape


@dataclass(frozen=True, slots=True)
class Norms:
    """Where a family has its norms, and of what kind those of queries and keys are."""

    query: ModuleSpec | type
    key: ModuleSpec | type
    before: bool  # norms before attention and MLP, or else behind them


def decoder_layer(shape: Shape, attention: LayerAttention, norms: Norms) -> ModuleSpec:
    """The spec of a layer that attends so."""
    yarn = attention.rope.yarn
    before = RMSNorm if norms.before else IdentityOp
    output = RowParallelLinear if norms.before else NormedRowParallelLinear
    inner = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=partial(
            PackedAttention,
            window=attention.window,
            # YaRN's factor of both queries and keys, as one of their products.
            sharpness=yarn.attention_factor**2 if yarn else 1.0,
        ),
        linear_proj=output,
        q_layernorm=norms.query,
        k_layernorm=norms.key,
    )
    rotated = {"attn_mask_type": AttnMaskType.causal, "rope": shape.ropes.index(attention.rope)}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(RotatedAttention, rotated, inner),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=ModuleSpec(MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=output)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
